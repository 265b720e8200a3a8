// Any processor: plain loops over the lanes, which the compiler turns into what the base instruction set has.
#include "kernels.h"
#include "pool.h"
#include "vectors.h"

namespace signbit {
namespace {

#include "isa_portable.inl"
using Isa = Portable;
#include "kernels.inl"

} // namespace

const Kernels portable_kernels = {"portable", linear<Isa>, int8_linear<Isa>};

} // namespace signbit
