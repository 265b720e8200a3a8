// Sixteen lanes as one value (compiler vectors: one zmm, two ymm, four q registers …), for what needs no intrinsics.
#ifndef SIGNBIT_VECTORS_H
#define SIGNBIT_VECTORS_H

#include <float.h>
#include <stdint.h>
#include <string.h>

#include "floats.h"

namespace signbit {
namespace {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef int32_t vi8 __attribute__((vector_size(32)));
typedef int32_t vi4 __attribute__((vector_size(16)));
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef int8_t vb __attribute__((vector_size(16)));
typedef int8_t vb2 __attribute__((vector_size(32)));
typedef int8_t vb4 __attribute__((vector_size(64)));

template <class V, class S>
[[maybe_unused]] inline V vload(const S *from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class S>
[[maybe_unused]] inline void vstore(S *to, const V &v) {
  memcpy(to, &v, sizeof v);
}

[[maybe_unused]] inline vf splat(float value) { return vf{} + value; }

// By halves.
[[maybe_unused]] inline float total(const vf &v) {
  const vf8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const vf4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[1]) + (b[2] + b[3]);
}

[[maybe_unused]] inline int32_t total(const vi &v) {
  const vi8 low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const vi8 a = low + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const vi4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  const vi4 c = b + __builtin_shufflevector(b, b, 2, 3, 0, 1);
  return c[0] + c[1];
}

[[maybe_unused]] inline int32_t largest(const vi &v) {
  const vi8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
  const vi8 b = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const vi8 c = a > b ? a : b, d = __builtin_shufflevector(c, c, 4, 5, 6, 7, 0, 1, 2, 3), e = c > d ? c : d;
  int32_t most = e[0];
  for (int i = 1; i < 4; i++) most = e[i] > most ? e[i] : most;
  return most;
}

} // namespace
} // namespace signbit
#endif
