// The C interface of signbit's CPU kernels: y = norm_out(W · norm_in(x)) + bias on packed bits, and int8 matrices.
//
// Plain C, no torch: Python loads the library with ctypes (src/signbit/ops/cpu.py).
// Dims: N rows, K columns, G groups of K/G columns, P planes. A "block" is 16 rows, a "word" 32 columns, a "chunk"
// 32 words. Layouts of what the kernels stream (src/signbit/ops/layout.py makes them from the stored form):
//   signs   uint32 [planes][chunk][block][word of the chunk][16 rows], bit k of a word is column 32·word + k, 1 = +1;
//           rows and columns beyond N and K are 0, and so are the bits at salient positions
//   scale   [P][block][G][16] with a scale a row, else [P][G];  shift [block][G][16]
// in_scale [P or 1][K], in_shift [K] and everything salient stay as they are stored.
#ifndef SIGNBIT_H
#define SIGNBIT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SIGNBIT_ABI 2

#if defined(_WIN32)
#define SIGNBIT_API
#else
#define SIGNBIT_API __attribute__((visibility("default")))
#endif

enum { SIGNBIT_FLOAT32 = 0, SIGNBIT_BFLOAT16 = 1, SIGNBIT_FLOAT16 = 2, SIGNBIT_NONE = -1 };
enum { SIGNBIT_EXACT = 0, SIGNBIT_INT8 = 1 };
enum { SIGNBIT_NORM_NONE = 0, SIGNBIT_NORM_RMS = 1, SIGNBIT_NORM_LAYER = 2 };
enum { SIGNBIT_OK = 0, SIGNBIT_NO_SUCH_ISA = 1, SIGNBIT_NO_MEMORY = 2, SIGNBIT_BAD_ARGUMENT = 3 };

typedef struct {
  int64_t rows, columns, groups;
  int32_t planes, sign_planes, scale_rows, in_scale_planes, float_type, salient_bits;
  const uint32_t *signs;
  const void *scale, *shift, *in_scale, *in_shift; // of float_type; the last three may be null
  const uint8_t *salient_codes, *salient_positions, *salient_counts, *salient_zeros; // counts null: a bitmap
  const uint32_t *salient_starts; // [N + 1]: how many salient values lie before each row
  const void *salient_scale;
} signbit_matrix;

// int8 codes [N][K] row-major, scale [N] of float_type.
typedef struct {
  int64_t rows, columns;
  int32_t float_type;
  const int8_t *codes;
  const void *scale;
} signbit_int8_matrix;

typedef struct {
  int32_t isa, activations, threads, x_type; // y has the type of x
  int32_t norm_in, norm_out, bias_type;      // bias_type SIGNBIT_NONE: no bias
  float norm_in_eps, norm_out_eps;
  const void *bias;
} signbit_call;

SIGNBIT_API int signbit_abi(void);
SIGNBIT_API const char *signbit_features(void);    // what this processor has, separated by blanks
SIGNBIT_API int signbit_isa_count(void);           // instruction sets that are compiled in, best first
SIGNBIT_API const char *signbit_isa_name(int isa); // null beyond the last
SIGNBIT_API int signbit_isa_runs(int isa);         // whether this processor has it

// x [tokens][K] with `stride` elements between tokens, y [tokens][N] contiguous. 0 or one of the errors above.
SIGNBIT_API int signbit_linear(const signbit_matrix *w, const signbit_call *call, const void *x, int64_t tokens, int64_t stride,
                   void *y);
SIGNBIT_API int signbit_int8_linear(const signbit_int8_matrix *w, const signbit_call *call, const void *x, int64_t tokens,
                        int64_t stride, void *y);

// Sets the stored sign bits [sign_planes][N][⌈K/8⌉] under salient positions to 0; `positions` has `bytes` bytes. Returns how
// many positions there are, or −1 if they do not ascend inside the matrix.
SIGNBIT_API int64_t signbit_clear_salient(uint8_t *signs, int32_t sign_planes, int64_t rows, int64_t columns,
                                          const uint8_t *positions, int64_t bytes, const uint8_t *counts);

#ifdef __cplusplus
}
#endif
#endif
