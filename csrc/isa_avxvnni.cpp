// AVX2 with AVX-VNNI: Alder Lake and later, without AVX-512. Included by isa_emulated_avxvnni.cpp, which has AVX2 alone.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "pool.h"
#include "vectors.h"

namespace signbit {
namespace {

#if defined(SIGNBIT_EMULATED_AVXVNNI)
#define avxvnni_kernels emulated_avxvnni_kernels
constexpr const char *NAME = "emulated-avxvnni";
// Bytes of a plane are 0 or 1, so that no pair of products passes 16 bits.
__m256i add_products(__m256i acc, __m256i plane, __m256i q) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(plane, q), _mm256_set1_epi16(1)));
}
#else
constexpr const char *NAME = "avxvnni";
__m256i add_products(__m256i acc, __m256i plane, __m256i q) { return _mm256_dpbusd_avx_epi32(acc, plane, q); }
#endif

struct Bytes {
  __m256i acc = _mm256_setzero_si256();
  static __m256i plane(__m256i bits, int p) { return _mm256_and_si256(_mm256_srli_epi32(bits, p), _mm256_set1_epi8(1)); }
  void add(__m256i plane, int, __m256i q) { acc = add_products(acc, plane, q); }
  __m256i sums() const { return acc; }
};

#include "isa_avx2.inl"
#include "kernels.inl"

} // namespace

const Kernels avxvnni_kernels = {NAME, linear<Isa>, int8_linear<Isa>};

} // namespace signbit
#endif
