// The int8 matrix of an output head, one byte a weight, times few tokens: with float activations (HEAD=0) or int8 ones
// (HEAD=1); ONE is 1 for one token.
#include "common.cuh"

struct HeadArguments {
  const uint4 *codes; // int8 [N][K], K a multiple of 16
  const void *scale, *x;
  void *y;
  int rows, columns, float_type, tokens, x_type;
};

// y = x · (scale ∘ codes)ᵀ for up to 16 tokens with int8 activations, for one with floats; a warp takes a row at a time.
extern "C" __global__ void __launch_bounds__(256, ONE ? 4 : 1) head(const HeadArguments a) {
  extern __shared__ __align__(128) u8 memory[];
  float *row = (float *)memory, *step = row + 16;
  u8 *prepared = memory + 256;
  let_next_begin();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  await_previous();
  auto read = [&](int token, int k) {
    const long long at = (long long)token * a.columns + k;
    return a.x_type == FLOAT32 ? __uint_as_float(fresh32((const float *)a.x + at))
                               : widen(fresh16((const u16 *)a.x + at), a.x_type);
  };
#if HEAD
  const int warps = a.tokens < 8 ? 8 / a.tokens : 1;
  for (int first = 0; first < a.tokens; first += 8 / warps) {
    const int token = first + warp / warps, from = warp % warps * 32 + lane;
    const bool mine = warp / warps < 8 / warps && token < a.tokens;
    u32 most = 0;
    if (mine)
      for (int k = from; k < a.columns; k += warps * 32) most = max(most, __float_as_uint(read(token, k)) & 0x7fffffff);
    for (int s = 16; s > 0; s /= 2) most = max(most, __shfl_xor_sync(~0u, most, s));
    if (lane == 0) row[warp] = __uint_as_float(most);
    __syncthreads();
    if (mine) {
      most = 0;
      for (int w = 0; w < warps; w++) most = max(most, __float_as_uint(row[warp / warps * warps + w]));
      const float largest = most >= 0x7f800000 ? __uint_as_float(0x7fffffff) : fmaxf(__uint_as_float(most), 1e-5f);
      if (lane == 0 && warp % warps == 0) step[token] = largest / 127.0f;
      for (int k = from; k < a.columns; k += warps * 32)
        prepared[token * a.columns + k] = (u8)__float2int_rn(__fdiv_rn(127.0f * read(token, k), largest));
    }
    __syncthreads();
  }
#else
  // A lane takes 16 columns as four vectors: those of all lanes lie side by side.
  for (int k = threadIdx.x; k < a.columns; k += 256)
    ((float *)prepared)[((k / 512 * 4 + k / 4 % 4) * 32 + k / 16 % 32) * 4 + k % 4] = read(0, k);
  __syncthreads();
#endif
  const int vectors = a.columns / 16, tokens = ONE ? 1 : a.tokens;
  for (int n = blockIdx.x * 8 + warp; n < a.rows; n += gridDim.x * 8) {
    const uint4 *codes = a.codes + (long long)n * vectors;
    const float scale = load(a.scale, n, a.float_type);
#if HEAD
    constexpr int MOST = ONE ? 1 : 16;
    int sums[MOST];
#pragma unroll
    for (int t = 0; t < MOST; t++) sums[t] = 0;
#pragma unroll 8
    for (int v = lane; v < vectors; v += 32) {
      const uint4 c = codes[v];
#pragma unroll
      for (int t = 0; t < MOST; t++)
        if (t < tokens) {
          const uint4 q = *(const uint4 *)(prepared + t * a.columns + v * 16);
          sums[t] = __dp4a((int)c.x, (int)q.x, sums[t]);
          sums[t] = __dp4a((int)c.y, (int)q.y, sums[t]);
          sums[t] = __dp4a((int)c.z, (int)q.z, sums[t]);
          sums[t] = __dp4a((int)c.w, (int)q.w, sums[t]);
        }
    }
#pragma unroll
    for (int t = 0; t < MOST; t++)
      if (t < tokens) {
        sums[t] = __reduce_add_sync(~0u, sums[t]);
        if (lane == 0) store(a.y, (long long)t * a.rows + n, float(sums[t]) * (scale * step[t]), a.x_type);
      }
#else
    float sum = 0;
#pragma unroll 4
    for (int v = lane; v < vectors; v += 32) {
      const uint4 c = codes[v];
      const u32 words[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float4 x = ((const float4 *)prepared)[(v / 32 * 4 + j) * 32 + lane];
        sum += x.x * float((signed char)(words[j])) + x.y * float((signed char)(words[j] >> 8)) +
               x.z * float((signed char)(words[j] >> 16)) + x.w * float((signed char)(words[j] >> 24));
      }
    }
    for (int s = 16; s > 0; s /= 2) sum += __shfl_xor_sync(~0u, sum, s);
    if (lane == 0) store(a.y, n, sum * scale, a.x_type);
#endif
  }
}
