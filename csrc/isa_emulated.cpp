// The kernels for AVX-512 and matrix units on any processor, to be tested (CMake's SIGNBIT_EMULATE); too slow for use.
#include "emulated_avx512.h"
#include "kernels.h"
#include "matrix_unit.h"
#include "pool.h"
#include "vectors.h"

namespace signbit {
namespace {

#include "isa_avx512.inl"
struct Isa : Avx512 {
  using Unit = Emulated;
};
#include "kernels.inl"

int linear(const signbit_matrix &w, const signbit_call &call, const Input &input, const Part &part) {
  return linear_by_matrix<Isa>(w, call, input, part, emulated_avx512_kernels);
}

} // namespace

const Kernels emulated_avx512_kernels = {"emulated-avx512", linear<Isa>, int8_linear<Isa>};
const Kernels emulated_amx_kernels = {"emulated-amx", linear, int8_linear<Isa>};

} // namespace signbit
