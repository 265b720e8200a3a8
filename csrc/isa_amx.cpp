// AVX-512 and AMX's matrix units for bytes: Sapphire Rapids and later.
#if defined(SIGNBIT_AMX)
#include <immintrin.h>

#include "kernels.h"
#include "matrix_unit.h"
#include "pool.h"
#include "vectors.h"

namespace signbit {
namespace {

#include "isa_avx512.inl"
struct Isa : Avx512 {
  using Unit = Amx;
};
#include "kernels.inl"

int linear(const signbit_matrix &w, const signbit_call &call, const Input &input, const Part &part) {
  return linear_by_matrix<Isa>(w, call, input, part, avx512_kernels);
}

int int8_linear(const signbit_int8_matrix &w, const signbit_call &call, const Input &input, const Part &part) {
  return avx512_kernels.int8_linear(w, call, input, part);
}

} // namespace

const Kernels amx_kernels = {"amx", linear, int8_linear};

} // namespace signbit
#endif
