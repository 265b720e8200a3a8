// AVX2 with AVX-VNNI: Alder Lake and later, without AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "pool.h"
#include "vectors.h"

namespace signbit {
namespace {

struct Bytes {
  __m256i acc = _mm256_setzero_si256();
  static __m256i plane(__m256i bits, int p) { return _mm256_and_si256(_mm256_srli_epi32(bits, p), _mm256_set1_epi8(1)); }
  void add(__m256i plane, int, __m256i q) { acc = _mm256_dpbusd_avx_epi32(acc, plane, q); }
  __m256i sums() const { return acc; }
};

#include "isa_avx2.inl"
#include "kernels.inl"

} // namespace

const Kernels avxvnni_kernels = {"avxvnni", linear<Isa>, int8_linear<Isa>};

} // namespace signbit
#endif
