// y = W · x for up to 16 tokens on packed bits. The macros that choose a variant are set by cuda.py; code that does not run
// is not in a kernel: a launch is so short that fetching instructions counts.
//   MODE      0 int8, one token, no groups: the eight bit planes of its codes are the columns of a one-bit product
//             1 int8, signs as ±64 in bytes; 2 exact, float16; 3 exact, bfloat16, signs as ±1 in halves: up to
//               8·COLUMNS tokens
//   COLUMNS   blocks of eight tokens: 1 or 2
//   ONE       1 for one token
//   SCALES    float type of scales and shifts;  SHARED_SCALES 1 if those of a block's rows lie in shared memory
//   X_TYPE    float type of x and y;  VECTORS 1 if eight of its halves can be read at a time
//   GROUPED   1 if a row has several scales
//   STAGES    tiles of 512 bytes that a warp fetches ahead
//   SHIFT, IN_SCALE, IN_SHIFT, SALIENT   1 for each of these terms that there is
//   SIMPLE    1 if one plane, whose columns all lie prepared at once, is the whole product but for salient values
#include "common.cuh"

#ifndef MODE
#define MODE 0 // for editors: a variant of all terms
#define COLUMNS 1
#define ONE 1
#define X_TYPE 0
#define VECTORS 0
#define SHARED_SCALES 0
#define GROUPED 0
#define SHIFT 1
#define IN_SCALE 1
#define IN_SHIFT 1
#define SALIENT 1
#define SIMPLE 0
#define STAGES 4
#endif
// float16 ends at 65504: x times input scales is held in units of the largest, which are put back with the other scales.
#if IN_SCALE && MODE == 2
#define IN_UNIT(a) (a).in_unit
#else
#define IN_UNIT(a) 1.0f
#endif
#define WARPS 16
#define THREADS (32 * WARPS)
#define TOKENS (8 * COLUMNS)
#define INT8 (MODE < 2)
#define BATCH (!VECTORS ? 1 : ONE ? 3 : COLUMNS == 1 ? 8 : 4) // vectors of eight activations that a thread reads at a time
#define AT_ONCE (MODE == 0 ? 4 : 2) // row tiles that a warp multiplies at a time

__device__ __forceinline__ void copy_async(void *shared, const void *global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(global)
               : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void await_oldest_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(STAGES / AT_ONCE - 1) : "memory");
}

__device__ __forceinline__ void multiply_bits(int (&acc)[4], const uint4 &a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_halves(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if MODE < 3
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_bytes(int (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What the matrix units add up, and what a warp adds up of a row tile: with several scales the products with them.
#if INT8
typedef int Product;
#else
typedef float Product;
#endif
#if INT8 && !GROUPED
typedef int Sum;
#else
typedef float Sum;
#endif

// Where everything lies in shared memory.
struct Shared {
  uint4 *ring;    // [WARPS][STAGES][32]
  u8 *activations; // [T][pitch] bytes or halves; MODE 0: the warp's own, [its column tiles][32 lanes][2] words of bit planes
  u8 *bytes;       // MODE 0: the warp's own, [256] codes of a column tile
  u8 *codes;       // MODE 0 with shift or salient values: [column tile][256] codes
  Sum *partial; // [tiles at a time][slots][16][T or 8·COLUMNS]
  Sum *sums;    // [tiles][16][T]: of one plane
  float *result;    // [tiles][16][T], if it is not what comes out of the one plane
  float *scales;    // [P][tiles][G][16], or none
  float *group_sums; // [T][G]
  float *step, *dot; // [TOKENS] each
  float *row;       // [3][WARPS]
  // Of the block's rows, of salient values: where their packets begin, [rows + 1], their scale and zero.
  u32 *starts;
  float *salient_scale;
  int *zeros;
};

#define WIDE (ONE ? 1 : TOKENS)

// How a block shares out its work. It has the row tiles [first, first + tiles); `slots` warps side by side take the column
// tiles of one, this warp those from `slot` on, of the row tiles warp_tile, warp_tile + warp_stride …
struct Plan {
  int row_tiles, column_tiles, first, tiles;
  int slots, slot, warp_tile, warp_stride;
  int planes;
  int chunks, chunk_tiles; // of prepared columns
  int pitch;               // bytes from one token's prepared activations to the next's
};

// Eight neighbouring columns of a token; zero beyond the last.
__device__ __forceinline__ void widen8(const uint4 &v, int type, float (&f)[8]) {
  const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    f[2 * i] = widen(u16(w[i] & 0xffff), type);
    f[2 * i + 1] = widen(u16(w[i] >> 16), type);
  }
}

__device__ __forceinline__ void read8(const Arguments &a, int token, int k, float (&f)[8]) {
  const long long at = (long long)token * a.columns + k;
#if VECTORS
  uint4 v = make_uint4(0, 0, 0, 0);
  if (k < a.columns) v = fresh128((const u16 *)a.x + at);
  widen8(v, X_TYPE, f);
#else
  for (int i = 0; i < 8; i++) {
    if (k + i >= a.columns) f[i] = 0;
    else if (X_TYPE == FLOAT32) f[i] = __uint_as_float(fresh32((const float *)a.x + at + i));
    else f[i] = widen(fresh16((const u16 *)a.x + at + i), X_TYPE);
  }
#endif
}

__device__ __forceinline__ void scale8(const Arguments &a, int plane, int k, float (&f)[8]) {
#if IN_SCALE
  if (plane < 0) return;
  const long long row = (long long)min(plane, a.in_scale_planes - 1) * a.columns;
  for (int i = 0; i < 8; i++)
    if (k + i < a.columns) f[i] *= load(a.in_scale, row + k + i, FLOAT_TYPE(a)) / IN_UNIT(a);
#endif
}

// BATCH vectors of eight activations of a token that are under way together; vector i is at `from` + i·stride. Other
// activations than vectors of halves are read when they are asked for.
struct Batch {
  uint4 v[BATCH];

  __device__ __forceinline__ void read(const Arguments &a, int token, int from, int stride) {
#if VECTORS
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      const int k = from + i * stride;
      v[i] = make_uint4(0, 0, 0, 0);
      if (k < a.columns) v[i] = fresh128((const u16 *)a.x + (long long)token * a.columns + k);
    }
#endif
  }
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int i = 1; i < BATCH; i++) v[i - 1] = v[i];
  }
  __device__ __forceinline__ void widen(const Arguments &a, int token, int i, int k, int plane, float (&f)[8]) {
#if VECTORS
    widen8(v[i], X_TYPE, f);
#else
    read8(a, token, k, f);
#endif
    scale8(a, plane, k, f);
  }
};

// q = round_half_even(127·u/a) of eight activations, as floats plus MAGIC, whose lowest byte then is q's. The quotient is
// the product with 1/a, corrected by its own remainder: what a division gives (Markstein's theorem), without its branches.
#define MAGIC 12582912.0f
__device__ __forceinline__ void quantize8(float (&f)[8], float a, float reciprocal) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float u = __fmul_rn(127.0f, f[j]), near = __fmul_rn(u, reciprocal);
    f[j] = __fadd_rn(__fmaf_rn(__fmaf_rn(-near, a, u), reciprocal, near), MAGIC);
  }
}

__device__ __forceinline__ u32 lowest_bytes(float a, float b, float c, float d) {
  const u32 low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  return __byte_perm(low, __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040), 0x5410);
}

__device__ __forceinline__ u32 halves(float low, float high) {
  u32 both;
#if MODE == 3
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}

// Which token a warp prepares, with how many others, as which of them.
struct Share {
  int warps, token, part;
  bool mine;
};
__device__ __forceinline__ Share share_of(const Arguments &a) {
  const int warp = threadIdx.x / 32;
#if ONE
  return {WARPS, 0, warp, true};
#else
  const int warps = WARPS / a.tokens;
  return {warps, warp / warps, warp % warps, warp / warps < a.tokens};
#endif
}

// Prepares the activations of columns [begin, end) for a plane (−1: without input scales): their steps at the first
// chunk, then codes or halves in the order of the matrix units.
__device__ __forceinline__ void prepare(const Arguments &a, const Plan &plan, const Shared &s, int plane, int begin, int end,
                                        bool first) {
  [[maybe_unused]] const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
#if MODE == 0
  // A warp prepares the very column tiles that it will multiply, and waits for no other but to know the largest.
  const Share share = {plan.slots, 0, plan.slot, true};
#else
  const Share share = share_of(a);
#endif
  const int stride = share.warps * 256, from = (share.part * 32 + lane) * 8;
  Batch batch;
  bool kept = false; // the batch that was read last is the only one
#if INT8
  float largest = 1;
  if (first) {
    u32 most = 0;
    if (share.mine) {
      for (int k = from; k == from || k < a.columns; k += stride * BATCH) { // at least once: a batch that is kept was read
        batch.read(a, share.token, k, stride);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          float f[8];
          batch.widen(a, share.token, i, k + i * stride, plane, f);
#pragma unroll
          for (int j = 0; j < 8; j++) most = max(most, __float_as_uint(f[j]) & 0x7fffffff);
        }
      }
      kept = a.columns <= stride * BATCH;
    }
    most = __reduce_max_sync(~0u, most);
    if (lane == 0) s.row[warp] = __uint_as_float(most);
    __syncthreads();
    most = lane < share.warps && share.mine ? __float_as_uint(s.row[share.token * share.warps + lane]) : 0;
    most = __reduce_max_sync(~0u, most);
    // The bits of floats are ordered as they are; from infinity on, nothing is a number.
    largest = most >= 0x7f800000 ? __uint_as_float(0x7fffffff) : fmaxf(__uint_as_float(most), 1e-5f);
    if (lane == 0 && share.part == 0 && share.mine) s.step[share.token] = largest;
  } else if (share.mine) {
    largest = s.step[share.token];
  }
  const float reciprocal = __frcp_rn(largest);
#endif
#if MODE == 0
  int total = 0, done = 0;
#endif
  if (share.mine)
    for (int k0 = begin + from; k0 < end; k0 += stride * BATCH) {
      if (!kept) batch.read(a, share.token, k0, stride);
#if ONE
#pragma unroll 1 // one copy of the instructions
#else
#pragma unroll
#endif
      for (int i = 0; i < BATCH; i++) {
        const int k = k0 + i * stride;
        if (k >= end) break;
        float f[8];
        batch.widen(a, share.token, ONE ? 0 : i, k, plane, f);
        if (ONE) batch.advance();
#if INT8
        quantize8(f, largest, reciprocal);
#endif
#if MODE == 0
        // Columns k … k + 3 and k + 4 … k + 7: two neighbours t of the same h. Words of bytes [t][h][p].
        const u32 low = lowest_bytes(f[0], f[1], f[2], f[3]), high = lowest_bytes(f[4], f[5], f[6], f[7]);
        total = __dp4a((int)low, 0x01010101, __dp4a((int)high, 0x01010101, total));
        u32 *to = (u32 *)s.bytes + lane % 2 * 32 + lane / 2 % 2 * 8 + lane / 4;
        to[0] = low;
        to[16] = high;
#if SHIFT || SALIENT
        if (warp < plan.slots) *(uint2 *)(s.codes + (k - begin)) = make_uint2(low, high);
#endif
        __syncwarp();
        // Of the bytes of a place (t, h) this lane collects bit g: its bit plane's word.
        u32 planes[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4 *words = (const uint4 *)(s.bytes + lane % 4 * 64 + h * 32);
          const uint4 four = words[0], more = words[1];
          const u32 v[8] = {four.x, four.y, four.z, four.w, more.x, more.y, more.z, more.w};
          u32 word = 0;
#pragma unroll
          for (int p = 7; p >= 0; p--) word = word * 2 + (v[p] >> lane / 4 & 0x01010101);
          planes[h] = word;
        }
        *(uint2 *)(s.activations + done * 256 + lane * 8) = make_uint2(planes[0], planes[1]);
        done++;
        __syncwarp();
#elif MODE == 1
        // Both h of a product side by side.
        u32 *to = (u32 *)(s.activations + share.token * plan.pitch + (k - begin) / 32 * 32) + k / 4 % 4 * 2 + k / 16 % 2;
        to[0] = lowest_bytes(f[0], f[1], f[2], f[3]);
        to[2] = lowest_bytes(f[4], f[5], f[6], f[7]);
#else
        // Bits j and j + 16 of a word meet in one register: columns b and b + 2; and the two h of a product side by side.
        u32 *to = (u32 *)(s.activations + share.token * plan.pitch + (k - begin) / 32 * 64) + k % 16 + k / 16 % 2;
        to[0] = halves(f[0], f[2]);
        to[2] = halves(f[1], f[3]);
        to[4] = halves(f[4], f[6]);
        to[6] = halves(f[5], f[7]);
#endif
      }
    }
#if MODE == 0
  total = __reduce_add_sync(~0u, total);
  // Over all chunks; of warps that prepare the same column tiles only the first count.
  if (lane == 0) {
    const int before = first ? 0 : __float_as_int(s.row[WARPS + warp]);
    s.row[WARPS + warp] = __int_as_float(before + (warp < plan.slots ? total : 0));
  }
#endif
#if MODE > 0 || SHIFT || SALIENT
  __syncthreads();
#endif
}

// A prepared activation of a token; `k` counts from the chunk's first column.
__device__ __forceinline__ float activation(const Plan &plan, const Shared &s, int token, int k) {
#if MODE == 0
  return ((const signed char *)s.codes)[k];
#elif MODE == 1
  const int at = k / 32 * 32 + k / 4 % 4 * 8 + k / 16 % 2 * 4 + k % 4;
  return ((const signed char *)(s.activations + token * plan.pitch))[at];
#else
  const int at = k / 32 * 32 + (k / 4 % 4) * 8 + (k % 2) * 4 + (k / 16 % 2) * 2 + k / 2 % 2;
  return widen(((const u16 *)(s.activations + token * plan.pitch))[at], MODE == 3 ? BFLOAT16 : FLOAT16);
#endif
}

// Of the block's own row tiles, which are counted from 0.
__device__ __forceinline__ float scale_of(const Arguments &a, const Plan &plan, const Shared &s, int plane, int tile, int group,
                                          int row) {
  if (SHARED_SCALES) return s.scales[((plane * plan.tiles + tile) * (GROUPED ? a.groups : 1) + group) * 16 + row];
  return scale_in_memory(a, plan.row_tiles, plane, plan.first + tile, group, row) * IN_UNIT(a);
}

#if SALIENT
#define PACKETS 2 // of a lane, that it fetches while it adds up those before

// A warp's rows are every WARPS-th of the block's; their packets come 32·PACKETS at a time.
struct Packets {
  uint4 of[PACKETS];
  int row, count; // whose they are, and how many from the first lane's first on; row ≥ rows: none are left
  bool last;      // of the row
};
struct PacketWalk {
  int row, rows;
  u32 at, end;

  __device__ __forceinline__ void begin(const Arguments &a, const Plan &plan) {
    rows = min(plan.tiles * 16, a.rows - plan.first * 16);
    row = (int)(threadIdx.x / 32) - WARPS;
    at = end = 0;
  }
  __device__ __forceinline__ Packets next(const Arguments &a, const Shared &s) {
    while (at >= end && row < rows) {
      row += WARPS;
      if (row < rows) at = s.starts[row], end = s.starts[row + 1];
    }
    Packets p;
    p.row = row;
    p.count = row < rows ? end - at : 0;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int u = 0; u < PACKETS; u++)
      if (lane + 32 * u < p.count) p.of[u] = __ldg(a.packets + at + lane + 32 * u);
    at += 32 * PACKETS;
    p.last = at >= end;
    return p;
  }
};

// Where the activations of four columns of a block lie, counted in activations: see prepare.
__device__ __forceinline__ u32 places(u32 columns) {
#if MODE == 0
  return columns;
#elif MODE == 1
  return (columns & 0xe3e3e3e3) | (columns & 0x0c0c0c0c) << 1 | (columns >> 2 & 0x04040404);
#else
  return (columns & 0xe0e0e0e0) | (columns & 0x0c0c0c0c) << 1 | (columns & 0x01010101) << 2 | (columns >> 3 & 0x02020202) |
         (columns >> 1 & 0x01010101);
#endif
}

// Of one token and one packet: `codes` += Σ code·q (floats: Σ (code − zero)·q) and `all` += Σ q over its columns.
__device__ __forceinline__ void add_packet(const uint4 &packet, const uint4 &place, const u8 *block, float zero, Product &codes,
                                           Product &all) {
  const int missing = 7 - packet_count(packet);
#if INT8
  u32 q[7];
#pragma unroll
  for (int i = 0; i < 7; i++) q[i] = block[packet_column(place, i)];
  const u32 low = __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
  const u32 high = __byte_perm(__byte_perm(q[4], q[5], 0x0040), q[6], 0x5410);
  asm("dp4a.s32.u32 %0, %1, %2, %0;" : "+r"(codes) : "r"(low), "r"(packet.z));
  asm("dp4a.s32.u32 %0, %1, %2, %0;" : "+r"(codes) : "r"(high), "r"(packet.w));
  all = __dp4a((int)low, 0x01010101, __dp4a((int)high, 0x01010101, all)) - missing * (signed char)q[0];
#else
  float first;
#pragma unroll
  for (int i = 0; i < 7; i++) {
    const float q = widen(((const u16 *)block)[packet_column(place, i)], MODE == 3 ? BFLOAT16 : FLOAT16);
    // The float whose last byte is the code: 2²³ + code.
    codes += (__uint_as_float(0x4b000000 | packet_code(packet, i)) - (8388608.0f + zero)) * q;
    all += q;
    if (i == 0) first = q;
  }
  if (missing > 0) all -= missing * first, codes += missing * zero * first;
#endif
}

// Salient values take the place of what stands at their positions. There all sign bits say −1 and the shifts are as
// everywhere: that much is taken back, of the activations that are prepared now, and the values meet x itself.
__device__ __forceinline__ void add_salient(const Arguments &a, const Plan &plan, const Shared &s, int plane, int begin, int end,
                                            PacketWalk &walk, Packets p) {
  constexpr int MOST = ONE ? 1 : TOKENS;
  const int lane = threadIdx.x % 32;
  const bool whole = plane < 0 || (plane == 0 && !IN_SCALE);
  Product codes[MOST], all[MOST];
  float grouped[MOST], plain[MOST];
#pragma unroll
  for (int t = 0; t < MOST; t++) codes[t] = all[t] = 0, grouped[t] = plain[t] = 0;
  while (p.row < walk.rows) {
    const Packets next = walk.next(a, s);
    const float zero = s.zeros[p.row];
    auto factor = [&](int group) { // of what is taken back
      float f = plane < 0 ? 0 : scale_of(a, plan, s, plane, p.row / 16, group, p.row % 16);
      if (SHIFT && whole)
        f -= load(a.shift, ((long long)(plan.first + p.row / 16) * a.groups + group) * 16 + p.row % 16, FLOAT_TYPE(a));
      return f;
    };
#pragma unroll
    for (int u = 0; u < PACKETS; u++) {
      const uint4 &packet = p.of[u];
      if (lane + 32 * u >= p.count) continue;
      const int in_chunk = packet_block(packet) * 256 - begin;
      if (in_chunk < 0 || in_chunk >= end - begin) continue;
      const uint4 place = make_uint4(places(packet.x & 0xffff0000), places(packet.y), 0, places(packet.w & 0xff000000));
      [[maybe_unused]] const float group_factor =
          GROUPED ? factor((packet_block(packet) * 256 + packet_column(packet, 0)) / a.width) : 0;
#pragma unroll
      for (int t = 0; t < MOST; t++)
        if (ONE || t < a.tokens) {
#if MODE == 0
          const u8 *block = s.codes + in_chunk;
#else
          const u8 *block = s.activations + t * plan.pitch + in_chunk * (INT8 ? 1 : 2);
#endif
#if GROUPED
          Product own = 0;
          add_packet(packet, place, block, zero, codes[t], own);
          grouped[t] += group_factor * float(own);
          all[t] += own;
#else
          add_packet(packet, place, block, zero, codes[t], all[t]);
#endif
#if IN_SHIFT
          if (whole)
            for (int i = 0; i < packet_count(packet); i++) {
              const int column = packet_block(packet) * 256 + packet_column(packet, i);
              const long long at = (long long)t * a.columns + column;
              plain[t] += load(a.in_shift, column, FLOAT_TYPE(a)) *
                          (X_TYPE == FLOAT32 ? __uint_as_float(fresh32((const float *)a.x + at))
                                             : widen(fresh16((const u16 *)a.x + at), X_TYPE));
            }
#endif
        }
    }
    if (p.last) {
      const float scale = whole ? s.salient_scale[p.row] : 0, row_factor = GROUPED ? 0 : factor(0);
#pragma unroll
      for (int t = 0; t < MOST; t++)
        if (ONE || t < a.tokens) {
          float sum = scale * (INT8 ? float(codes[t]) - zero * float(all[t]) : float(codes[t]));
          sum += GROUPED ? grouped[t] : row_factor * float(all[t]);
          if (INT8) sum *= s.step[t] / 127.0f;
          sum -= plain[t];
          for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
          if (lane == 0) s.result[p.row * WIDE + t] += sum;
          codes[t] = all[t] = 0, grouped[t] = plain[t] = 0;
        }
    }
    p = next;
  }
}
#endif

// The highest bits of both halves as the signs of two ones, or those of four bytes as the signs of four 64s: one
// instruction, if `ones` is in a register (it takes only one constant, and the compiler would make two instructions of two
// constants).
__device__ __forceinline__ u32 signed_ones(u32 word, u32 ones) {
  u32 all;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(all) : "r"(word), "r"(MODE == 1 ? 0x80808080 : 0x80008000), "r"(ones));
  return all; // (word & mask) ^ ones
}

// AT_ONCE tiles of 16 rows and 256 columns each, so that no product waits for the one before it. The last row tiles may
// be none of the block's: what comes out of them is not looked at.
__device__ __forceinline__ void units(const Arguments &a, const Plan &plan, const Shared &s, const uint4 (&w)[AT_ONCE],
                                      int plane, int tile, int column_tile, int in_chunk,
                                      Sum (&partial)[AT_ONCE][COLUMNS][4]) {
  const int lane = threadIdx.x % 32;
#if MODE == 0
  const uint2 b = *(const uint2 *)(s.activations + in_chunk * 256 + lane * 8);
#pragma unroll
  for (int u = 0; u < AT_ONCE; u++) multiply_bits(partial[u][0], w[u], b.x, b.y);
#else
  const int g = lane / 4, t = lane % 4;
  const u32 ones = (MODE == 1 ? 0x40404040 : MODE == 2 ? 0x3c003c00 : 0x3f803f80) | (u32)a.rows >> 31; // 0 there, but no constant
#if GROUPED
  Product acc[AT_ONCE][COLUMNS][4];
#pragma unroll
  for (int u = 0; u < AT_ONCE; u++)
#pragma unroll
    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[u][n][i] = 0;
#else
  Sum(&acc)[AT_ONCE][COLUMNS][4] = partial;
#endif
  u32 words[AT_ONCE][4];
#pragma unroll
  for (int u = 0; u < AT_ONCE; u++) words[u][0] = w[u].x, words[u][1] = w[u].y, words[u][2] = w[u].z, words[u][3] = w[u].w;
  const u8 *from[COLUMNS];
#pragma unroll
  for (int n = 0; n < COLUMNS; n++) {
    // Columns beyond the last token repeat it: nobody looks at them, and no lane goes another way.
    const int token = ONE ? 0 : min(n * 8 + g, a.tokens - 1);
    from[n] = s.activations + token * plan.pitch + (INT8 ? in_chunk * 256 + t * 8 : in_chunk * 512 + t * 16);
  }
  // 32 columns at a time, those of bit p of the bytes: the bits come up from below.
#pragma unroll
  for (int p = 7; p >= 0; p--) {
#if MODE == 1
    uint2 b[COLUMNS];
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) b[n] = *(const uint2 *)(from[n] + p * 32);
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      u32 signs[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        signs[i] = signed_ones(words[u][i], ones);
        words[u][i] <<= 1;
      }
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) multiply_bytes(acc[u][n], signs, b[n].x, b[n].y);
    }
#else
    uint4 b[COLUMNS];
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) b[n] = *(const uint4 *)(from[n] + p * 64);
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      u32 low[4], high[4]; // of the lower and the upper byte of each half
#pragma unroll
      for (int i = 0; i < 4; i++) {
        low[i] = signed_ones(words[u][i] << 8, ones);
        high[i] = signed_ones(words[u][i], ones);
        words[u][i] <<= 1;
      }
#pragma unroll
      for (int n = 0; n < COLUMNS; n++) {
        multiply_halves(acc[u][n], low, b[n].x, b[n].y);
        multiply_halves(acc[u][n], high, b[n].z, b[n].w);
      }
    }
#endif
#if GROUPED
    const int begin = column_tile * 256 + p * 32;
    if (begin % a.width == 0 || p == 0) {
      const int group = min(begin / a.width, a.groups - 1);
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++) {
        const int row_tile = min(tile + u * plan.warp_stride, plan.tiles - 1);
        const float one = INT8 ? 1.0f / 64 : 1;
        const float low = scale_of(a, plan, s, plane, row_tile, group, g) * one;
        const float high = scale_of(a, plan, s, plane, row_tile, group, g + 8) * one;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            partial[u][n][i] += float(acc[u][n][i]) * (i < 2 ? low : high);
            acc[u][n][i] = 0;
          }
      }
    }
#endif
  }
#endif
}

// The units of a warp in the order in which it takes them: plane, chunk of columns, AT_ONCE row tiles, column tile.
struct Walk {
  int plane, chunk, tile, column;

  __device__ __forceinline__ void begin(const Plan &p) {
    plane = chunk = 0;
    tile = p.warp_tile;
    column = p.slot;
  }
  __device__ __forceinline__ bool settle(const Plan &p) {
    while (plane < p.planes) {
      if (column < min((chunk + 1) * p.chunk_tiles, p.column_tiles) && tile < p.tiles) return true;
      if (tile < p.tiles) tile += p.warp_stride * AT_ONCE;
      if (tile >= p.tiles) {
        tile = p.warp_tile;
        if (++chunk == p.chunks) chunk = 0, plane++;
        if (tile >= p.tiles) return false;
      }
      column = chunk * p.chunk_tiles + p.slot;
    }
    return false;
  }
  __device__ __forceinline__ void fetch(const Arguments &a, const Plan &p, uint4 *to) {
    if (settle(p)) {
      const long long at = (long long)(a.sign_planes == 1 ? 0 : plane) * p.row_tiles + p.first + tile;
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++)
        if (tile + u * p.warp_stride < p.tiles)
          copy_async(to + u * 32, a.signs + ((at + u * p.warp_stride) * p.column_tiles + column) * 32 + threadIdx.x % 32);
      column += p.slots;
    }
    copies_end();
  }
};

#define TURNS (WIDE == 1 ? 16 : WIDE == 8 ? 4 : 2) // a multiple of AT_ONCE: row tiles of a warp that are summed at a time

// What a plane's sum, i of [tiles][16][WIDE], gives to y; `total` is Σq in MODE 0.
__device__ __forceinline__ float contribution(const Arguments &a, const Plan &plan, const Shared &s, int plane, int i,
                                              Sum sum, int total) {
#if INT8
  const float step = s.step[i % WIDE] / 127.0f;
#else
  const float step = 1;
#endif
#if GROUPED
  return sum * step;
#else
  const int row = i / WIDE;
  const float scale = scale_of(a, plan, s, plane, row / 16, 0, row % 16) * step;
#if MODE == 0
  return float(total - 2 * sum) * scale;
#else
  return (INT8 ? float(sum / 64) : float(sum)) * scale;
#endif
#endif
}

__device__ __forceinline__ void write(const Arguments &a, const Plan &plan, int i, float y) {
  const int token = i % WIDE, n = plan.first * 16 + i / WIDE;
  if (n >= a.rows) return;
  y = rounded(y, X_TYPE);
  if (a.bias != 0) y += load(a.bias, n, a.bias_type);
  store(a.y, (long long)token * a.rows + n, y, X_TYPE);
}

// Two on a multiprocessor: the next layer's fetches its weights while this one computes.
extern "C" __global__ void __launch_bounds__(THREADS, ONE && !SHIFT && !IN_SCALE && !IN_SHIFT ? 2 : 1)
    linear(const Arguments a) {
  extern __shared__ __align__(128) u8 memory[];
  let_next_begin();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Plan plan;
  plan.row_tiles = (a.rows + 15) / 16;
  plan.column_tiles = (a.columns + 255) / 256;
  plan.first = (int)((long long)plan.row_tiles * blockIdx.x / gridDim.x);
  plan.tiles = (int)((long long)plan.row_tiles * (blockIdx.x + 1) / gridDim.x) - plan.first;
  // Of a simple product the compiler is to know that nothing is repeated: a third of the registers and instructions.
  plan.planes = SIMPLE ? 1 : a.planes;
  plan.chunk_tiles = SIMPLE ? plan.column_tiles : a.chunk / 256;
  plan.chunks = SIMPLE ? 1 : (plan.column_tiles + plan.chunk_tiles - 1) / plan.chunk_tiles;
  plan.slots = 1;
  while (plan.slots < WARPS && plan.slots < plan.chunk_tiles && plan.slots < plan.column_tiles) plan.slots *= 2;
  plan.slot = warp % plan.slots;
  plan.warp_tile = warp / plan.slots; // the warp's first row tile
  plan.warp_stride = WARPS / plan.slots;
  plan.pitch = INT8 ? a.chunk + 32 : a.chunk * 2 + 64; // eight tokens' in different banks

  // Row tiles of a warp whose partial sums lie in shared memory at a time.
  const int turns = min(TURNS, (plan.tiles + plan.warp_stride - 1) / plan.warp_stride);

  Shared s;
  u8 *next = memory;
  auto take = [&](int bytes) {
    u8 *piece = next;
    next += (bytes + 127) / 128 * 128;
    return piece;
  };
  s.ring = (uint4 *)take(WARPS * STAGES * 512) + warp * STAGES * 32 + lane;
#if MODE == 0
  const int own_bytes = (plan.chunk_tiles + plan.slots - 1) / plan.slots * 256;
  s.activations = take(WARPS * own_bytes) + warp * own_bytes;
  s.bytes = take(WARPS * 256) + warp * 256;
  s.codes = take(SHIFT || SALIENT ? a.chunk : 0);
#else
  s.activations = take(a.tokens * plan.pitch);
#endif
  s.partial = (Sum *)take(turns * WARPS * 16 * WIDE * 4);
  s.sums = (Sum *)take(SIMPLE ? 0 : plan.tiles * 16 * WIDE * 4);
  s.result = (float *)take(SIMPLE && !SALIENT ? 0 : plan.tiles * 16 * WIDE * 4);
  s.scales = (float *)take(SHARED_SCALES ? a.planes * plan.tiles * a.groups * 16 * 4 : 0);
  s.group_sums = (float *)take(SHIFT ? a.tokens * a.groups * 4 : 0);
  s.step = (float *)take(16 * 4);
  s.dot = (float *)take(16 * 4);
  s.row = (float *)take(3 * WARPS * 4);
  s.starts = (u32 *)take(SALIENT ? (plan.tiles * 16 + 1) * 4 : 0);
  s.salient_scale = (float *)take(SALIENT ? plan.tiles * 16 * 4 : 0);
  s.zeros = (int *)take(SALIENT ? plan.tiles * 16 * 4 : 0);

  Walk ahead;
  ahead.begin(plan);
  for (int stage = 0; stage < STAGES; stage += AT_ONCE) ahead.fetch(a, plan, s.ring + stage * 32);
  const int groups = GROUPED ? a.groups : 1;
  if (SHARED_SCALES)
    for (int i = threadIdx.x; i < a.planes * plan.tiles * groups * 16; i += THREADS) {
      const int plane = SIMPLE ? 0 : i / (plan.tiles * groups * 16), line = i / 16 - plane * plan.tiles * groups;
      const int tile = line / groups;
      s.scales[i] = scale_in_memory(a, plan.row_tiles, plane, plan.first + tile, line - tile * groups, i % 16) * IN_UNIT(a);
    }
#if !SIMPLE || SALIENT
  for (int i = threadIdx.x; i < plan.tiles * 16 * WIDE; i += THREADS) s.result[i] = 0;
#endif
#if SALIENT
  PacketWalk walk;
  walk.begin(a, plan);
  for (int i = threadIdx.x; i <= walk.rows; i += THREADS) {
    const int n = plan.first * 16 + i;
    s.starts[i] = a.starts[n];
    if (i < walk.rows) s.salient_scale[i] = load(a.salient_scale, n, FLOAT_TYPE(a)), s.zeros[i] = a.zeros[n];
  }
  __syncthreads();
  Packets packets = walk.next(a, s);
#endif
  await_previous();

  // What meets x itself: the sums of its groups, and the input shift's one number a token.
#if SHIFT
  for (int i = threadIdx.x; i < a.tokens * a.groups; i += THREADS) s.group_sums[i] = 0;
#endif
#if IN_SHIFT
  {
    const Share share = share_of(a);
    float dot = 0;
    if (share.mine)
      for (int k = (share.part * 32 + lane) * 8; k < a.columns; k += share.warps * 256) {
        float f[8];
        read8(a, share.token, k, f);
        for (int j = 0; j < 8; j++)
          if (k + j < a.columns) dot += f[j] * load(a.in_shift, k + j, FLOAT_TYPE(a));
      }
    for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(~0u, dot, step);
    if (lane == 0) s.row[2 * WARPS + warp] = dot;
    __syncthreads();
    if (threadIdx.x < a.tokens) {
      float all = 0;
      for (int w = 0; w < share.warps; w++) all += s.row[2 * WARPS + threadIdx.x * share.warps + w];
      s.dot[threadIdx.x] = all;
    }
  }
#endif
  constexpr int first_plane = IN_SCALE && (SHIFT || SALIENT) ? -1 : 0;

  int stage = 0;
  for (int plane = first_plane; plane < plan.planes; plane++) {
#if !SIMPLE
    for (int i = threadIdx.x; i < plan.tiles * 16 * WIDE; i += THREADS) s.sums[i] = 0;
#endif
    for (int chunk = 0; chunk < plan.chunks; chunk++) {
      const int begin = chunk * a.chunk, end = min(begin + a.chunk, plan.column_tiles * 256);
      if (SIMPLE || plane <= first_plane || plan.chunks > 1 || (IN_SCALE && plane < a.in_scale_planes))
        prepare(a, plan, s, plane, begin, end, chunk == 0);
#if SHIFT
      if (plane == first_plane)
        for (int i = warp; i < a.tokens * a.groups; i += WARPS) {
          const int token = i / a.groups, group = i % a.groups;
          const int from = max(group * a.width, begin), to = min((group + 1) * a.width, end);
          float sum = 0;
          for (int k = from + lane; k < to; k += 32) sum += activation(plan, s, token, k - begin);
          for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
          if (lane == 0) s.group_sums[i] += INT8 ? sum * (s.step[token] / 127.0f) : sum;
        }
#endif
#if SALIENT
      if (plane > first_plane || chunk > 0) {
        walk.begin(a, plan);
        packets = walk.next(a, s);
      }
      add_salient(a, plan, s, plane, begin, end, walk, packets);
#endif
      if (plane < 0) {
        __syncthreads();
        continue;
      }
      for (int tile0 = 0; tile0 < plan.tiles; tile0 += TURNS * plan.warp_stride) {
        const int tiles = min(TURNS * plan.warp_stride, plan.tiles - tile0);
        for (int tile = tile0 + plan.warp_tile; tile < tile0 + tiles; tile += plan.warp_stride * AT_ONCE) {
          Sum partial[AT_ONCE][COLUMNS][4];
#pragma unroll
          for (int u = 0; u < AT_ONCE; u++)
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
              for (int i = 0; i < 4; i++) partial[u][n][i] = 0;
          [[maybe_unused]] int own = 0; // of the warp's column tiles
          for (int column = begin / 256 + plan.slot; column * 256 < end; column += plan.slots) {
            await_oldest_copies();
            uint4 w[AT_ONCE];
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) w[u] = s.ring[(stage + u) * 32];
            ahead.fetch(a, plan, s.ring + stage * 32);
            stage = stage + AT_ONCE == STAGES ? 0 : stage + AT_ONCE;
            units(a, plan, s, w, plane, tile, column, MODE == 0 ? own++ : column - begin / 256, partial);
          }
          const int g = lane / 4, t = lane % 4;
#pragma unroll
          for (int u = 0; u < AT_ONCE; u++) {
            if (tile + u * plan.warp_stride >= tile0 + tiles) break;
            Sum *to = s.partial + ((tile + u * plan.warp_stride - tile0) * plan.slots + plan.slot) * 16 * WIDE;
#if MODE == 0
            // Columns are bit planes: 2t is worth 2²ᵗ, 2t + 1 twice that, the last is the sign.
            int low = (partial[u][0][0] << (2 * t)) + (t == 3 ? -(partial[u][0][1] << 7) : partial[u][0][1] << (2 * t + 1));
            int high = (partial[u][0][2] << (2 * t)) + (t == 3 ? -(partial[u][0][3] << 7) : partial[u][0][3] << (2 * t + 1));
            for (int step = 1; step < 4; step *= 2) {
              low += __shfl_xor_sync(~0u, low, step);
              high += __shfl_xor_sync(~0u, high, step);
            }
            if (t == 0) to[g] = low, to[g + 8] = high;
#else
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
              for (int i = 0; i < 4; i++) {
                const int token = n * 8 + 2 * t + i % 2;
                if (token < (ONE ? 1 : a.tokens)) to[(g + i / 2 * 8) * WIDE + token] = partial[u][n][i];
              }
#endif
          }
        }
        __syncthreads();
#if MODE == 0
        const int total = __reduce_add_sync(~0u, lane < WARPS ? __float_as_int(s.row[WARPS + lane]) : 0);
#else
        const int total = 0;
#endif
        for (int i = threadIdx.x; i < tiles * 16 * WIDE; i += THREADS) {
          if (i % WIDE >= a.tokens) continue;
          Sum sum = 0;
          const Sum *from = s.partial + i / (16 * WIDE) * plan.slots * 16 * WIDE + i % (16 * WIDE);
#pragma unroll
          for (int slot = 0; slot < WARPS; slot++)
            if (slot < plan.slots) sum += from[slot * 16 * WIDE];
#if SIMPLE
          const int at = tile0 * 16 * WIDE + i;
          write(a, plan, at, contribution(a, plan, s, plane, at, sum, total) + (SALIENT ? s.result[at] : 0));
#else
          if (chunk + 1 < plan.chunks) s.sums[tile0 * 16 * WIDE + i] += sum;
          else {
            const int at = tile0 * 16 * WIDE + i;
            s.result[at] += contribution(a, plan, s, plane, at, s.sums[at] + sum, total);
          }
#endif
        }
        __syncthreads();
      }
    }
  }

#if !SIMPLE
  for (int i = threadIdx.x; i < plan.tiles * 16 * WIDE; i += THREADS) {
    const int token = i % WIDE, row = i / WIDE;
    if (token >= a.tokens) continue;
    float y = s.result[i];
    if (SHIFT)
      for (int group = 0; group < a.groups; group++)
        y += load(a.shift, ((long long)(plan.first + row / 16) * a.groups + group) * 16 + row % 16, FLOAT_TYPE(a)) *
             s.group_sums[token * a.groups + group];
    if (IN_SHIFT) y += s.dot[token];
    write(a, plan, i, y);
  }
#endif
}

