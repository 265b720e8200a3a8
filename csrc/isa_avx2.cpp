// AVX2, FMA and F16C: Haswell, Zen and later.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "pool.h"
#include "vectors.h"

namespace signbit {
namespace {

// Bit p of each byte stays where it is, worth 2ᵖ: pairs of products fit 16 bits (2·128·127), and the next multiplication
// brings all planes to 2⁷, so that one sum holds them all.
struct Bytes {
  __m256i acc = _mm256_setzero_si256();
  static __m256i plane(__m256i bits, int p) { return _mm256_and_si256(bits, _mm256_set1_epi8(static_cast<char>(1 << p))); }
  void add(__m256i plane, int p, __m256i q) {
    const __m256i pairs = _mm256_maddubs_epi16(plane, q);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(static_cast<int16_t>(128 >> p))));
  }
  __m256i sums() const { return _mm256_srai_epi32(acc, 7); }
};

#include "isa_avx2.inl"
#include "kernels.inl"

} // namespace

const Kernels avx2_kernels = {"avx2", linear<Isa>, int8_linear<Isa>};

} // namespace signbit
#endif
