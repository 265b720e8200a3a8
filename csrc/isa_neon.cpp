// 64-bit Arm with the dot product instructions: Apple silicon, Neoverse, Cortex-A76 and later.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "kernels.h"
#include "pool.h"
#include "vectors.h"

namespace signbit {
namespace {

struct Isa {
  static constexpr int EXACT_TOKENS = 4, INT8_TOKENS = 4, LOOKUP_TOKENS = 0, GROUP_WORDS = 0;
  static constexpr int HEAD_ROWS = 2, HEAD_TOKENS = 2;

  static vf half(const uint16_t *from) {
    vf v;
    for (int h = 0; h < 4; h++)
      vst1q_f32(reinterpret_cast<float *>(&v) + 4 * h, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * h))));
    return v;
  }

  static vb narrow(const vi &v) {
    const int32_t *from = reinterpret_cast<const int32_t *>(&v);
    int16x4_t quarter[4];
    for (int i = 0; i < 4; i++) quarter[i] = vmovn_s32(vld1q_s32(from + 4 * i));
    return vb(vcombine_s8(vmovn_s16(vcombine_s16(quarter[0], quarter[1])), vmovn_s16(vcombine_s16(quarter[2], quarter[3]))));
  }

  // tbl looks up bytes in 64, the size of one table: four bytes of float i lie at 4i, 4i + 1, 4i + 2, 4i + 3.
  template <int R, int T>
  static void exact(const uint32_t *w, int64_t stride, int64_t words, const float *tables, int64_t table_stride,
                    vf (&result)[R][T]) {
    const uint32x4_t four = vdupq_n_u32(0x04040404), within = vdupq_n_u32(0x03020100), low = vdupq_n_u32(15);
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        float32x4_t acc[4][4]; // [sum][quarter]: four short sums round less than one long one
        for (int c = 0; c < 4; c++)
          for (int h = 0; h < 4; h++) acc[c][h] = vdupq_n_f32(0);
        for (int64_t word = 0; word < words; word++) {
          uint32x4_t index[4];
          for (int h = 0; h < 4; h++) index[h] = vld1q_u32(w + r * stride + word * 16 + 4 * h);
          for (int i = 0; i < 8; i++) {
            const uint8x16x4_t table =
                vld1q_u8_x4(reinterpret_cast<const uint8_t *>(tables + t * table_stride + (word * 8 + i) * 16));
            for (int h = 0; h < 4; h++) {
              const uint32x4_t bytes = vmlaq_u32(within, vandq_u32(index[h], low), four);
              acc[i % 4][h] = vaddq_f32(acc[i % 4][h], vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes))));
              index[h] = vshrq_n_u32(index[h], 4);
            }
          }
        }
        vf sums;
        for (int h = 0; h < 4; h++) vst1q_f32(reinterpret_cast<float *>(&sums) + 4 * h,
                                              vaddq_f32(vaddq_f32(acc[0][h], acc[1][h]), vaddq_f32(acc[2][h], acc[3][h])));
        result[r][t] = sums;
      }
  }

  // A byte with the plane's bit set becomes −1, so the dot products are −Σq.
  template <int R, int T>
  static void int8(const uint32_t *w, int64_t stride, int64_t words, const int8_t *q, int64_t q_stride,
                   const int32_t (&all)[T], vi (&result)[R][T]) {
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 4; h++) {
        int32x4_t acc[T];
        for (int t = 0; t < T; t++) acc[t] = vdupq_n_s32(0);
        for (int64_t word = 0; word < words; word++) {
          const uint8x16_t bits = vreinterpretq_u8_u32(vld1q_u32(w + r * stride + word * 16 + 4 * h));
          for (int p = 0; p < 8; p++) {
            const int8x16_t minus = vreinterpretq_s8_u8(vtstq_u8(bits, vdupq_n_u8(static_cast<uint8_t>(1 << p))));
            for (int t = 0; t < T; t++) {
              int32_t some;
              memcpy(&some, q + t * q_stride + word * 32 + p * 4, 4);
              acc[t] = vdotq_s32(acc[t], minus, vreinterpretq_s8_s32(vdupq_n_s32(some)));
            }
          }
        }
        for (int t = 0; t < T; t++) {
          int32_t *to = reinterpret_cast<int32_t *>(&result[r][t]) + 4 * h;
          vst1q_s32(to, vsubq_s32(vdupq_n_s32(-all[t]), vshlq_n_s32(acc[t], 1)));
        }
      }
  }

  template <int R, int T>
  static void dot(const int8_t *codes, int64_t stride, const int8_t *q, int64_t q_stride, int64_t columns,
                  int32_t (&sums)[R][T]) {
    int32x4_t acc[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) acc[r][t] = vdupq_n_s32(0);
    for (int64_t k = 0; k < columns; k += 16)
      for (int r = 0; r < R; r++) {
        const int8x16_t c = vld1q_s8(codes + r * stride + k);
        for (int t = 0; t < T; t++) acc[r][t] = vdotq_s32(acc[r][t], c, vld1q_s8(q + t * q_stride + k));
      }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) sums[r][t] += vaddvq_s32(acc[r][t]);
  }
};

#include "kernels.inl"

} // namespace

const Kernels neon_kernels = {"neon", linear<Isa>, int8_linear<Isa>};

} // namespace signbit
#endif
