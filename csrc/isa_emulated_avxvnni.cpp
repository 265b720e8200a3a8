// The kernels for AVX-VNNI where the processor has AVX2 alone, to be tested (CMake's SIGNBIT_EMULATE).
#define SIGNBIT_EMULATED_AVXVNNI
#include "isa_avxvnni.cpp"
