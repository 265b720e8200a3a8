// AVX-512 with VNNI: Ice Lake, Sapphire Rapids, Zen 4 and later.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "pool.h"
#include "vectors.h"

namespace signbit {
namespace {

struct Isa {
  static constexpr int EXACT_TOKENS = 8, INT8_TOKENS = 12, HEAD_ROWS = 4, HEAD_TOKENS = 4;

  static vf half(const uint16_t *from) {
    return vf(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from))));
  }

  // vpermps takes the low four bits of each lane as an index into 16 floats: one lookup adds four weights of 16 rows.
  template <int R, int T>
  static void exact(const uint32_t *w, int64_t stride, int64_t words, const float *tables, int64_t table_stride,
                    vf (&result)[R][T]) {
    constexpr int CHAINS = R * T == 1 ? 4 : R * T <= 4 ? 2 : 1; // additions that need not wait for each other
    __m512 acc[R][T][CHAINS];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++)
        for (int c = 0; c < CHAINS; c++) acc[r][t][c] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; word++) {
      __m512i index[R];
      for (int r = 0; r < R; r++) index[r] = _mm512_loadu_si512(w + r * stride + word * 16);
      if (T == 1) prefetch(w + word * 16);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        for (int t = 0; t < T; t++) {
          const __m512 table = _mm512_loadu_ps(tables + t * table_stride + (word * 8 + i) * 16);
          for (int r = 0; r < R; r++)
            acc[r][t][i % CHAINS] = _mm512_add_ps(acc[r][t][i % CHAINS], _mm512_permutexvar_ps(index[r], table));
        }
        for (int r = 0; r < R; r++) index[r] = _mm512_srli_epi32(index[r], 4);
      }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        for (int c = 1; c < CHAINS; c++) acc[r][t][0] = _mm512_add_ps(acc[r][t][0], acc[r][t][c]);
        result[r][t] = vf(acc[r][t][0]);
      }
  }

  template <int R, int T>
  static void int8(const uint32_t *w, int64_t stride, int64_t words, const int8_t *q, int64_t q_stride,
                   const int32_t (&all)[T], vi (&result)[R][T]) {
    // As many sums as registers allow; but a short group would spend its time on adding them up.
    constexpr int SUMS = R * T == 1 ? 8 : R * T <= 4 ? 4 : R * T <= 8 ? 2 : 1;
    if (SUMS == 8 && words <= 8) planes<R, T, 4>(w, stride, words, q, q_stride, all, result);
    else planes<R, T, SUMS>(w, stride, words, q, q_stride, all, result);
  }

  // Bit p of each byte is left where it is, worth 2ᵖ, and has a sum of its own that is shifted at the end: two
  // instructions for 64 weights. With fewer sums than planes the bits move by so many places, and one place up from
  // where they lie, so that a set bit counts 2: a sum that begins at −Σq ends as Σ ±q.
  template <int R, int T, int SUMS>
  static void planes(const uint32_t *w, int64_t stride, int64_t words, const int8_t *q, int64_t q_stride,
                     const int32_t (&all)[T], vi (&result)[R][T]) {
    constexpr int UP = SUMS < 8 ? 1 : 0;
    __m512i acc[R][T][SUMS], mask[SUMS];
    for (int s = 0; s < SUMS; s++) mask[s] = _mm512_set1_epi8(static_cast<char>(1 << (s + UP)));
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        acc[r][t][0] = UP ? _mm512_set1_epi32(-all[t]) : _mm512_setzero_si512();
        for (int s = 1; s < SUMS; s++) acc[r][t][s] = _mm512_setzero_si512();
      }
    for (int64_t word = 0; word < words; word++) {
      __m512i bits[R];
      for (int r = 0; r < R; r++) bits[r] = _mm512_loadu_si512(w + r * stride + word * 16);
      if (T == 1) prefetch(w + word * 16);
#pragma GCC unroll 8
      for (int p = 0; p < 8; p++) {
        const int s = p % SUMS, down = p - s - UP;
        __m512i plane[R];
        for (int r = 0; r < R; r++) {
          const __m512i moved = down < 0 ? _mm512_slli_epi32(bits[r], 1) : _mm512_srli_epi32(bits[r], down);
          plane[r] = _mm512_and_si512(moved, mask[s]);
        }
        for (int t = 0; t < T; t++) {
          const __m512i four = _mm512_set1_epi32(load32(q + t * q_stride + word * 32 + p * 4));
          for (int r = 0; r < R; r++) acc[r][t][s] = _mm512_dpbusd_epi32(acc[r][t][s], plane[r], four);
        }
      }
    }
    // Every acc[…][s] is a multiple of 2ˢ, so the shifts lose nothing.
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        for (int s = 1; s < SUMS; s++) acc[r][t][0] = _mm512_add_epi32(acc[r][t][0], _mm512_srai_epi32(acc[r][t][s], s));
        result[r][t] = UP ? vi(acc[r][t][0]) : 2 * vi(acc[r][t][0]) - all[t];
      }
  }

  // dpbusd wants an unsigned side: codes + 128, and 128·Σq taken back.
  template <int R, int T>
  static void dot(const int8_t *codes, int64_t stride, const int8_t *q, int64_t q_stride, int64_t columns,
                  int32_t (&sums)[R][T]) {
    __m512i acc[R][T], plain[T];
    for (int t = 0; t < T; t++) {
      plain[t] = _mm512_setzero_si512();
      for (int r = 0; r < R; r++) acc[r][t] = _mm512_setzero_si512();
    }
    const __m512i high = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t k = 0; k < columns; k += 64) {
      __m512i c[R];
      for (int r = 0; r < R; r++) c[r] = _mm512_xor_si512(_mm512_loadu_si512(codes + r * stride + k), high);
      for (int t = 0; t < T; t++) {
        const __m512i some = _mm512_loadu_si512(q + t * q_stride + k);
        plain[t] = _mm512_dpbusd_epi32(plain[t], high, some);
        for (int r = 0; r < R; r++) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], c[r], some);
      }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) sums[r][t] += _mm512_reduce_add_epi32(_mm512_sub_epi32(acc[r][t], plain[t]));
  }

  // One token goes through the weights faster than the processor fetches ahead by itself: 4 KiB further on.
  static void prefetch(const uint32_t *w) { _mm_prefetch(reinterpret_cast<const char *>(w) + 4096, _MM_HINT_T0); }

  static int32_t load32(const int8_t *from) {
    int32_t value;
    memcpy(&value, from, 4);
    return value;
  }
};

#include "kernels.inl"

} // namespace

const Kernels avx512_kernels = {"avx512", linear, int8_linear};

} // namespace signbit
#endif
