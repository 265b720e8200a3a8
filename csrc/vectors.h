// Sixteen lanes as one value (compiler vectors: one zmm, two ymm, four q registers …), for what needs no intrinsics.
#ifndef SIGNBIT_VECTORS_H
#define SIGNBIT_VECTORS_H

#include <stdint.h>
#include <string.h>

#include "floats.h"

namespace signbit {
namespace {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef int8_t vb __attribute__((vector_size(16)));
typedef int8_t vb2 __attribute__((vector_size(32)));

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

template <class V>
[[maybe_unused]] inline auto total(const V &v) {
  auto sum = v[0];
  for (int i = 1; i < 16; i++) sum += v[i];
  return sum;
}

} // namespace
} // namespace signbit
#endif
