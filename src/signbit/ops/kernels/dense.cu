// The kernels around the dense product that many tokens take: W as a dense matrix, int8 activations, and the scales after it.
#include "common.cuh"

// Eight neighbouring columns of a row of the dense matrix, of which `words` hold four each as bit p of their bytes.
__device__ __forceinline__ void store_signs(const Arguments &a, long long at, u32 first, u32 second, int p, float scale) {
  const u32 words[2] = {first, second};
  if (a.x_type < 0) {
    *(uint2 *)((u8 *)a.y + at) =
        make_uint2((first >> p & 0x01010101) * 254 + 0x01010101, (second >> p & 0x01010101) * 254 + 0x01010101);
  } else if (a.x_type == FLOAT32) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 w = words[i] >> p;
      *(float4 *)((float *)a.y + at + i * 4) = make_float4(w & 1 ? -scale : scale, w >> 8 & 1 ? -scale : scale,
                                                           w >> 16 & 1 ? -scale : scale, w >> 24 & 1 ? -scale : scale);
    }
  } else {
    const u32 both = narrow(scale, a.x_type) * 0x10001u;
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 w = words[i / 2] >> (i % 2 * 16) >> p; // bits 0 and 8
      pairs[i] = both ^ ((w & 1) << 15 | (w & 0x100) << 23);
    }
    *(uint4 *)((u16 *)a.y + at) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

// As unpack, or with x_type −1 the signs as int8, of one plane without other terms, K a multiple of 8: what is stored lies
// together.
extern "C" __global__ void __launch_bounds__(256) unpack_signs(const Arguments a) {
  const int row_tiles = (a.rows + 15) / 16, column_tiles = (a.columns + 255) / 256;
  const long long index = (long long)blockIdx.x * 8 + threadIdx.x / 32;
  if (index >= (long long)row_tiles * column_tiles) return;
  const int tile = index / column_tiles, column_tile = index % column_tiles;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint4 w = a.signs[index * 32 + lane];
  // An even lane gives its neighbour the h = 1 words of both rows for the neighbour's h = 0 words.
  const u32 low = __shfl_xor_sync(~0u, t % 2 ? w.x : w.z, 1), high = __shfl_xor_sync(~0u, t % 2 ? w.y : w.w, 1);
  const int from = column_tile * 256 + t % 2 * 16 + t / 2 * 8;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = g + 8 * r, n = tile * 16 + row;
    if (n >= a.rows) continue;
    const u32 theirs = r ? high : low, own = t % 2 ? (r ? w.w : w.z) : (r ? w.y : w.x);
    float scale = a.x_type < 0 ? 1 : scale_in_memory(a, row_tiles, 0, tile, 0, row);
#pragma unroll
    for (int p = 0; p < 8; p++) {
      const int k = from + 32 * p;
      if (k >= a.columns) break;
      if (a.groups > 1) scale = scale_in_memory(a, row_tiles, 0, tile, k / a.width, row);
      store_signs(a, (long long)n * a.columns + k, t % 2 ? theirs : own, t % 2 ? own : theirs, p, scale);
    }
  }
}

struct TokenArguments {
  const void *x; // of x_type [T][K]
  void *codes;   // int8, or float16 or bfloat16 by code_type [T][K]
  float *step;   // [T]
  int columns, x_type, code_type;
};

// q and a/127 of one token a block, as everywhere: a = max(max|x|, 1e-5), q = round_half_even(127·x/a).
extern "C" __global__ void __launch_bounds__(256) quantize(const TokenArguments a) {
  __shared__ u32 most_of[8];
  const long long at = (long long)blockIdx.x * a.columns;
  u32 most = 0;
  for (int k = threadIdx.x; k < a.columns; k += 256) most = max(most, __float_as_uint(load(a.x, at + k, a.x_type)) & 0x7fffffff);
  for (int s = 16; s > 0; s /= 2) most = max(most, __shfl_xor_sync(~0u, most, s));
  if (threadIdx.x % 32 == 0) most_of[threadIdx.x / 32] = most;
  __syncthreads();
  for (int w = 0; w < 8; w++) most = max(most, most_of[w]);
  const float largest = most >= 0x7f800000 ? __uint_as_float(0x7fffffff) : fmaxf(__uint_as_float(most), 1e-5f);
  if (threadIdx.x == 0) a.step[blockIdx.x] = largest / 127.0f;
  for (int k = threadIdx.x; k < a.columns; k += 256) {
    const float q = rintf(__fdiv_rn(127.0f * load(a.x, at + k, a.x_type), largest));
    if (a.code_type < 0) ((signed char *)a.codes)[at + k] = (signed char)q;
    else store(a.codes, at + k, most >= 0x7f800000 ? 0 : q, a.code_type);
  }
}

struct SumArguments {
  const void *sums; // [T][N]: int32, or float32 where the scales are in them
  const float *step;
  const void *scale, *bias; // scale null: in the sums
  void *y;
  int rows, row_blocks, scale_rows, float_type, bias_type, x_type;
};

// y = sum · (scale · step), rounded, + bias; `row_blocks` blocks of 1024 results a token.
extern "C" __global__ void __launch_bounds__(256) finish(const SumArguments a) {
  const int token = blockIdx.x / a.row_blocks, first = blockIdx.x % a.row_blocks * 1024 + threadIdx.x;
  const float step = a.step[token];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int n = first + i * 256;
    if (n >= a.rows) break;
    const long long at = (long long)token * a.rows + n;
    float y = a.scale == 0 ? ((const float *)a.sums)[at] * step
                           : float(((const int *)a.sums)[at]) * (load(a.scale, a.scale_rows ? n : 0, a.float_type) * step);
    y = rounded(y, a.x_type);
    if (a.bias != 0) y += load(a.bias, n, a.bias_type);
    store(a.y, at, y, a.x_type);
  }
}

// The dense matrix, what bits.dense means, salient values left to each_salient: put(n, k, values, count) gets four
// neighbouring columns of a row, or the last few of it. A warp makes a tile of 16 rows and 256 columns.
template <class Put> __device__ __forceinline__ void each_weight(const Arguments &a, Put put) {
  const int row_tiles = (a.rows + 15) / 16, column_tiles = (a.columns + 255) / 256;
  const long long index = (long long)blockIdx.x * 8 + threadIdx.x / 32;
  if (index >= (long long)row_tiles * column_tiles) return;
  const int tile = index / column_tiles, column_tile = index % column_tiles;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int r = 0; r < 2; r++) {
    const int row = g + 8 * r, n = tile * 16 + row;
    if (n >= a.rows) continue;
    for (int p = 0; p < 8; p++)
      for (int h = 0; h < 2; h++) {
        const int k = column_tile * 256 + 32 * p + 16 * h + 4 * t;
        if (k >= a.columns) continue;
        float values[4] = {0, 0, 0, 0};
        const int group = a.groups == 1 ? 0 : k / a.width;
        for (int plane = 0; plane < a.planes; plane++) {
          const long long at = ((long long)(a.sign_planes == 1 ? 0 : plane) * row_tiles + tile) * column_tiles;
          const u32 word = ((const u32 *)(a.signs + (at + column_tile) * 32 + lane))[2 * h + r];
          const float scale = scale_in_memory(a, row_tiles, plane, tile, group, row);
          for (int b = 0; b < 4; b++) {
            if (k + b >= a.columns) break;
            float term = word >> (8 * b + p) & 1 ? -scale : scale;
            if (a.in_scale != 0)
              term = __fmul_rn(term, load(a.in_scale, (long long)min(plane, a.in_scale_planes - 1) * a.columns + k + b,
                                          FLOAT_TYPE(a)));
            values[b] = __fadd_rn(values[b], term);
          }
        }
        for (int b = 0; b < 4; b++) {
          if (k + b >= a.columns) break;
          if (a.shift != 0)
            values[b] = __fadd_rn(values[b], load(a.shift, ((long long)tile * a.groups + group) * 16 + row, FLOAT_TYPE(a)));
          if (a.in_shift != 0) values[b] = __fadd_rn(values[b], load(a.in_shift, k + b, FLOAT_TYPE(a)));
        }
        put(n, k, values, min(4, a.columns - k));
      }
  }
}

// put(n, k, value) gets each salient value; a warp takes a row.
template <class Put> __device__ __forceinline__ void each_salient(const Arguments &a, Put put) {
  const int n = blockIdx.x * 8 + threadIdx.x / 32;
  if (n >= a.rows) return;
  const float scale = load(a.salient_scale, n, FLOAT_TYPE(a));
  const int zero = a.zeros[n];
  for (u32 at = a.starts[n] + threadIdx.x % 32; at < a.starts[n + 1]; at += 32) {
    const uint4 packet = a.packets[at];
    for (int i = 0; i < packet_count(packet); i++)
      put(n, packet_block(packet) * 256 + packet_column(packet, i), __fmul_rn(scale, float(packet_code(packet, i) - zero)));
  }
}

__device__ __forceinline__ void store4(const Arguments &a, void *to, long long at, const float (&values)[4], int count, int type) {
  if (a.columns % 4 != 0) {
    for (int b = 0; b < count; b++) store(to, at + b, values[b], type);
  } else if (type == FLOAT32) {
    *(float4 *)((float *)to + at) = make_float4(values[0], values[1], values[2], values[3]);
  } else {
    *(uint2 *)((u16 *)to + at) = make_uint2(narrow(values[0], type) | (u32)narrow(values[1], type) << 16,
                                            narrow(values[2], type) | (u32)narrow(values[3], type) << 16);
  }
}

// W in a.y, of type x_type [N][K].
extern "C" __global__ void __launch_bounds__(256) unpack(const Arguments a) {
  each_weight(a, [&](int n, int k, const float (&values)[4], int count) {
    store4(a, a.y, (long long)n * a.columns + k, values, count, a.x_type);
  });
}
extern "C" __global__ void __launch_bounds__(256) put_salient(const Arguments a) {
  each_salient(a, [&](int n, int k, float value) { store(a.y, (long long)n * a.columns + k, value, a.x_type); });
}

struct HalvesArguments {
  Arguments w;       // y: the high halves, float16 [N][K]
  void *low;         // as y
  const float *unit; // [N], powers of two
};

// W·unit as high + low·2⁻¹².
__device__ __forceinline__ void in_halves(float value, float unit, float &high, float &low) {
  const float v = __fmul_rn(value, unit);
  high = rounded(v, FLOAT16);
  low = (v - high) * 4096;
}
extern "C" __global__ void __launch_bounds__(256) unpack_halves(const HalvesArguments h) {
  const Arguments &a = h.w;
  each_weight(a, [&](int n, int k, const float (&values)[4], int count) {
    float high[4], low[4];
    for (int b = 0; b < 4; b++) in_halves(values[b], h.unit[n], high[b], low[b]);
    const long long at = (long long)n * a.columns + k;
    store4(a, a.y, at, high, count, FLOAT16);
    store4(a, h.low, at, low, count, FLOAT16);
  });
}
extern "C" __global__ void __launch_bounds__(256) put_salient_halves(const HalvesArguments h) {
  const Arguments &a = h.w;
  each_salient(a, [&](int n, int k, float value) {
    float high, low;
    in_halves(value, h.unit[n], high, low);
    const long long at = (long long)n * a.columns + k;
    store(a.y, at, high, FLOAT16);
    store(h.low, at, low, FLOAT16);
  });
}
