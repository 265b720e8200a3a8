// The kernel for matrix units on any processor, to be tested (CMake's SIGNBIT_EMULATE_MATRIX_UNIT); too slow for use.
#include "kernels.h"
#include "matrix_unit.h"
#include "pool.h"
#include "vectors.h"

namespace signbit {
namespace {

#include "isa_portable.inl"
struct Isa : Portable {
  using Unit = Emulated;
};
#include "kernels.inl"

int linear(const signbit_matrix &w, const signbit_call &call, const Input &input, const Part &part) {
  return linear_by_matrix<Isa>(w, call, input, part, portable_kernels);
}

int int8_linear(const signbit_int8_matrix &w, const signbit_call &call, const Input &input, const Part &part) {
  return portable_kernels.int8_linear(w, call, input, part);
}

} // namespace

const Kernels emulated_kernels = {"emulated", linear, int8_linear};

} // namespace signbit
