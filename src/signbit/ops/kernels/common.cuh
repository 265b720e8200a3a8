// What the kernels share: types, floats in memory, what a launch is told, and salient values in packets.
//
// No header but this is included, so that nothing but a driver and NVRTC (which torch brings) is needed. SCALES, where it
// is set, is the float type of scales and shifts: see linear.cu.
//
// Dims: N rows, K columns, G groups of `width` columns, P planes, T tokens. A row tile is 16 rows, a column tile 256
// columns. Signs lie as the matrix units take them (layout.lay_tiles): [P][row tile][column tile][lane][4 words], a set
// bit for −1. Lane 4g + t of a warp holds of rows g and g + 8 the columns 32p + 16h + 4t + b as bit 8b + p of a word,
// h = 0, 1: word 2h + (row ≥ 8). So the bits p of the bytes of all lanes make 32 neighbouring columns, which is why groups of 32
// columns or more need no other order. Scales and shifts lie as [P][row tile][G][16].
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;

#ifdef SCALES
#define FLOAT_TYPE(a) SCALES
#else
#define FLOAT_TYPE(a) (a).float_type
#endif

struct Arguments {
  const uint4 *signs;
  const void *scale, *shift, *in_scale, *in_shift, *bias;
  const uint4 *packets; // of salient values
  const u32 *starts;    // [N + 1]: how many packets lie before each row
  const void *salient_scale; // [N]
  const u8 *zeros;           // [N]
  const void *x;
  void *y;
  int rows, columns, groups, width, planes, sign_planes, in_scale_planes, scale_rows, float_type;
  int tokens, x_type, bias_type;
  int chunk; // columns that lie prepared in shared memory at a time, a multiple of 256
  float in_unit; // a power of two, at least the largest input scale
};

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

__device__ __forceinline__ float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ u16 float_to_bfloat(float f) {
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ float widen(u16 h, int type) {
  return type == BFLOAT16 ? __uint_as_float(u32(h) << 16) : half_to_float(h);
}
__device__ __forceinline__ u16 narrow(float f, int type) { return type == BFLOAT16 ? float_to_bfloat(f) : float_to_half(f); }
__device__ __forceinline__ float load(const void *from, long long i, int type) {
  return type == FLOAT32 ? ((const float *)from)[i] : widen(((const u16 *)from)[i], type);
}
__device__ __forceinline__ float rounded(float f, int type) { return type == FLOAT32 ? f : widen(narrow(f, type), type); }
__device__ __forceinline__ void store(void *to, long long i, float f, int type) {
  if (type == FLOAT32) ((float *)to)[i] = f;
  else ((u16 *)to)[i] = narrow(f, type);
}

// Activations come from the kernel before this one, which may still run when this one begins: they are read where all
// multiprocessors see them, past the first-level cache, which may hold what stood there earlier.
__device__ __forceinline__ u32 fresh32(const void *p) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ u16 fresh16(const void *p) {
  u16 v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint4 fresh128(const void *p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Lets the next kernel begin, which reads its weights while this one computes; and waits for all of the one before.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void await_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float scale_in_memory(const Arguments &a, int row_tiles, int plane, int tile, int group, int row) {
  return a.scale_rows ? load(a.scale, (((long long)plane * row_tiles + tile) * a.groups + group) * 16 + row, FLOAT_TYPE(a))
                      : load(a.scale, plane * a.groups + group, FLOAT_TYPE(a));
}

// A packet holds up to seven salient values of one row, of one block of 256 columns and one group of scales
// (layout.lay_packets): bits 0 to 11 the block, 12 to 14 how many; their columns in the block are bytes 4 to 7, 2, 3, 15,
// their codes bytes 8 to 14. Those that are missing stand in the first one's column with code 0.
__device__ __forceinline__ int packet_block(const uint4 &packet) { return packet.x & 0xfff; }
__device__ __forceinline__ int packet_count(const uint4 &packet) { return packet.x >> 12 & 7; }
__device__ __forceinline__ int packet_column(const uint4 &packet, int i) {
  return (i < 4 ? packet.y >> 8 * i : i < 6 ? packet.x >> (8 * i - 16) : packet.w >> 24) & 255;
}
__device__ __forceinline__ int packet_code(const uint4 &packet, int i) {
  return (i < 4 ? packet.z >> 8 * i : packet.w >> (8 * i - 32)) & 255;
}
