// AVX-512 with VNNI: Ice Lake, Sapphire Rapids, Zen 4 and later.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "pool.h"
#include "vectors.h"

namespace signbit {
namespace {

#include "isa_avx512.inl"
using Isa = Avx512;
#include "kernels.inl"

} // namespace

const Kernels avx512_kernels = {"avx512", linear<Isa>, int8_linear<Isa>};

} // namespace signbit
#endif
