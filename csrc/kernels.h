// What each instruction set's file gives: the same two functions, compiled for it.
#ifndef SIGNBIT_KERNELS_H
#define SIGNBIT_KERNELS_H

#include "signbit.h"

namespace signbit {

// So many lookups, ten of six columns and one of four, are a piece: 64 columns of int8 by lookup (isa_avx512.inl).
constexpr int LOOKUPS = 11;

// Some rows (in blocks of 16; of an int8 matrix: in rows) for some tokens.
struct Part {
  int64_t first_token, last_token, first_row, last_row;
};

struct Input {
  const void *x;
  int64_t tokens, stride;
  void *y;
  float *wide; // [tokens][N], given if the norm over a token's outputs is still to come
};

struct Kernels {
  const char *name;
  int (*linear)(const signbit_matrix &, const signbit_call &, const Input &, const Part &);
  int (*int8_linear)(const signbit_int8_matrix &, const signbit_call &, const Input &, const Part &);
};

extern const Kernels amx_kernels, avx512_kernels, avxvnni_kernels, avx2_kernels, neon_kernels, portable_kernels,
    emulated_avxvnni_kernels, emulated_avx512_kernels, emulated_amx_kernels;

} // namespace signbit
#endif
