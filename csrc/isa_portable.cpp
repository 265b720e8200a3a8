// Any processor: plain loops over the lanes, which the compiler turns into what the base instruction set has.
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
    for (int i = 0; i < 16; i++) v[i] = half_to_float(from[i]);
    return v;
  }

  static vb narrow(const vi &v) { return __builtin_convertvector(v, vb); }

  template <int R, int T>
  static void exact(const uint32_t *w, int64_t stride, int64_t words, const float *tables, int64_t table_stride,
                    vf (&acc)[R][T]) {
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        float sums[4][16] = {}; // four short sums round less than one long one
        for (int64_t word = 0; word < words; word++)
          for (int i = 0; i < 8; i++) {
            const float *table = tables + t * table_stride + (word * 8 + i) * 16;
            for (int lane = 0; lane < 16; lane++)
              sums[i % 4][lane] += table[w[r * stride + word * 16 + lane] >> (4 * i) & 15];
          }
        acc[r][t] = (vload<vf>(sums[0]) + vload<vf>(sums[1])) + (vload<vf>(sums[2]) + vload<vf>(sums[3]));
      }
  }

  template <int R, int T>
  static void int8(const uint32_t *w, int64_t stride, int64_t words, const int8_t *q, int64_t q_stride,
                   const int32_t (&all)[T], vi (&acc)[R][T]) {
    for (int r = 0; r < R; r++) {
      for (int t = 0; t < T; t++) acc[r][t] = vi{};
      for (int64_t word = 0; word < words; word++) {
        const vi bits = vload<vi>(w + r * stride + word * 16);
        for (int k = 0; k < 32; k++) {
          const vi mask = -(bits >> k & 1);
          for (int t = 0; t < T; t++) acc[r][t] += mask & static_cast<int32_t>(q[t * q_stride + word * 32 + k % 8 * 4 + k / 8]);
        }
      }
      for (int t = 0; t < T; t++) acc[r][t] = 2 * acc[r][t] - all[t];
    }
  }

  template <int R, int T>
  static void dot(const int8_t *codes, int64_t stride, const int8_t *q, int64_t q_stride, int64_t columns,
                  int32_t (&sums)[R][T]) {
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++)
        for (int64_t k = 0; k < columns; k++) sums[r][t] += codes[r * stride + k] * q[t * q_stride + k];
  }
};

#include "kernels.inl"

} // namespace

const Kernels portable_kernels = {"portable", linear<Isa>, int8_linear<Isa>};

} // namespace signbit
