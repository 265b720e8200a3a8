// The three float types as they lie in memory, one value at a time. Static: each file keeps its own copy, compiled for
// its own instruction set (an inline function would be merged into one, perhaps one that this processor cannot run).
#ifndef SIGNBIT_FLOATS_H
#define SIGNBIT_FLOATS_H

#include <stdint.h>
#include <string.h>

#include "signbit.h"

namespace signbit {

[[maybe_unused]] static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

[[maybe_unused]] static float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

[[maybe_unused]] static float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13); // infinity, NaN
  if (rest >= 0x400) return float_of(sign | ((rest << 13) + (112u << 23)));
  return float_of(sign | bits_of(static_cast<float>(rest) * 0x1p-24f)); // subnormal
}

[[maybe_unused]] static uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
  uint32_t rest = bits & 0x7fffffff;
  if (rest >= 0x7f800000) return static_cast<uint16_t>(sign | 0x7c00 | (rest > 0x7f800000 ? 0x200 : 0));
  if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00); // rounds above 65504
  if (rest < 0x38800000) { // a subnormal half: adding 0.5 puts its last bit at the end of the mantissa
    return static_cast<uint16_t>(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
  }
  rest += 0xfff + (rest >> 13 & 1); // to nearest, ties to even
  return static_cast<uint16_t>(sign | ((rest - (112u << 23)) >> 13));
}

[[maybe_unused]] static uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

[[maybe_unused]] static float load(const void *from, int64_t i, int type) {
  if (type == SIGNBIT_FLOAT32) return static_cast<const float *>(from)[i];
  const uint16_t half = static_cast<const uint16_t *>(from)[i];
  return type == SIGNBIT_BFLOAT16 ? float_of(static_cast<uint32_t>(half) << 16) : half_to_float(half);
}

[[maybe_unused]] static void store(void *to, int64_t i, float value, int type) {
  if (type == SIGNBIT_FLOAT32) static_cast<float *>(to)[i] = value;
  else static_cast<uint16_t *>(to)[i] = type == SIGNBIT_BFLOAT16 ? float_to_bfloat(value) : float_to_half(value);
}

[[maybe_unused]] static float rounded(float value, int type) {
  if (type == SIGNBIT_FLOAT32) return value;
  return type == SIGNBIT_BFLOAT16 ? float_of(static_cast<uint32_t>(float_to_bfloat(value)) << 16)
                                  : half_to_float(float_to_half(value));
}

} // namespace signbit
#endif
