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
        result[r][t] += vf(acc[r][t][0]);
      }
  }

  template <int R, int T>
  static void int8(const uint32_t *w, int64_t stride, int64_t words, const int8_t *q, int64_t q_stride,
                   vi (&result)[R][T]) {
    if constexpr (R == 1 && T == 1) {
      planes(w, words, q, result[0][0]);
      return;
    }
    __m512i acc[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) acc[r][t] = _mm512_setzero_si512();
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t word = 0; word < words; word++) {
      __m512i bits[R];
      for (int r = 0; r < R; r++) bits[r] = _mm512_loadu_si512(w + r * stride + word * 16);
#pragma GCC unroll 8
      for (int p = 0; p < 8; p++) {
        __m512i plane[R];
        for (int r = 0; r < R; r++) plane[r] = _mm512_and_si512(_mm512_srli_epi32(bits[r], p), ones);
        for (int t = 0; t < T; t++) {
          const __m512i four = _mm512_set1_epi32(load32(q + t * q_stride + word * 32 + p * 4));
          for (int r = 0; r < R; r++) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], plane[r], four);
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) result[r][t] += vi(acc[r][t]);
  }

  // One token: bit p of each byte is left where it is, worth 2ᵖ, and has a sum of its own that is shifted at the end:
  // two instructions for 64 weights. Few words (a group) are better off with one more shift and half of the sums.
  static void planes(const uint32_t *w, int64_t words, const int8_t *q, vi &result) {
    if (words > 8) planes_of<8>(w, words, q, result);
    else planes_of<4>(w, words, q, result);
  }

  template <int SUMS>
  static void planes_of(const uint32_t *w, int64_t words, const int8_t *q, vi &result) {
    __m512i acc[SUMS], mask[SUMS];
    for (int p = 0; p < SUMS; p++) {
      acc[p] = _mm512_setzero_si512();
      mask[p] = _mm512_set1_epi8(static_cast<char>(1 << p));
    }
    for (int64_t word = 0; word < words; word++) {
      __m512i bits = _mm512_loadu_si512(w + word * 16);
#pragma GCC unroll 8
      for (int p = 0; p < 8; p++) {
        if (p > 0 && p % SUMS == 0) bits = _mm512_srli_epi32(bits, SUMS);
        const __m512i four = _mm512_set1_epi32(load32(q + word * 32 + p * 4));
        acc[p % SUMS] = _mm512_dpbusd_epi32(acc[p % SUMS], _mm512_and_si512(bits, mask[p % SUMS]), four);
      }
    }
    // Every acc[p] is a multiple of 2ᵖ, so the shifts lose nothing.
    for (int p = 1; p < SUMS; p++) acc[0] = _mm512_add_epi32(acc[0], _mm512_srai_epi32(acc[p], p));
    result += vi(acc[0]);
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
