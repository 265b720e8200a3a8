// Those of AVX-512's intrinsics that isa_avx512.inl takes, in plain C++, so that it can be tested where they do not run.
// In place of <immintrin.h>; what each does is told in Intel's intrinsics guide.
#ifndef SIGNBIT_EMULATED_AVX512_H
#define SIGNBIT_EMULATED_AVX512_H

#include <stdint.h>
#include <string.h>

#include "floats.h"

namespace signbit {
namespace {

typedef int64_t __m512i __attribute__((vector_size(64), may_alias));
typedef int64_t __m256i __attribute__((vector_size(32), may_alias));
typedef int64_t __m128i __attribute__((vector_size(16), may_alias));
typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef uint64_t __mmask64;
enum { _MM_HINT_T0 };

// A register's lanes, all of them or its first N.
template <class S, int N = 64 / sizeof(S)>
struct Lanes {
  S at[N];

  template <class V>
  static Lanes of(const V &v) {
    static_assert(sizeof(Lanes) == sizeof(V));
    Lanes lanes;
    memcpy(&lanes, &v, sizeof v);
    return lanes;
  }
  // f of each lane's number
  template <class F>
  static auto made(F f) {
    Lanes lanes;
    for (int i = 0; i < N; i++) lanes.at[i] = static_cast<S>(f(i));
    return lanes;
  }
  template <class V>
  V as() const {
    static_assert(sizeof(Lanes) == sizeof(V));
    V v;
    memcpy(&v, at, sizeof v);
    return v;
  }
};

// f of the lanes of one register, or of two.
template <class S, class F>
__m512i each(__m512i a, F f) {
  const auto x = Lanes<S>::of(a);
  return Lanes<S>::made([&](int i) { return f(x.at[i]); }).template as<__m512i>();
}
template <class S, class F>
__m512i each(__m512i a, __m512i b, F f) {
  const auto x = Lanes<S>::of(a), y = Lanes<S>::of(b);
  return Lanes<S>::made([&](int i) { return f(x.at[i], y.at[i]); }).template as<__m512i>();
}

template <class V>
V loaded(const void *from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
V aligned(const void *from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(V) != 0) __builtin_trap();
  return loaded<V>(from);
}

inline __m512i _mm512_loadu_si512(const void *from) { return loaded<__m512i>(from); }
inline __m512 _mm512_loadu_ps(const void *from) { return loaded<__m512>(from); }
inline __m256i _mm256_loadu_si256(const __m256i *from) { return loaded<__m256i>(from); }
inline __m128i _mm_load_si128(const __m128i *from) { return aligned<__m128i>(from); }
inline void _mm512_storeu_si512(void *to, __m512i a) { memcpy(to, &a, sizeof a); }
inline void _mm512_store_si512(void *to, __m512i a) {
  aligned<__m512i>(to);
  memcpy(to, &a, sizeof a);
}
inline void _mm_prefetch(const char *, int) {}

inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_set1_epi8(char a) {
  return Lanes<char>::made([&](int) { return a; }).as<__m512i>();
}
inline __m512i _mm512_set1_epi16(int16_t a) {
  return Lanes<int16_t>::made([&](int) { return a; }).as<__m512i>();
}
inline __m512i _mm512_set1_epi32(int32_t a) {
  return Lanes<int32_t>::made([&](int) { return a; }).as<__m512i>();
}
inline __m512i _mm512_broadcast_i32x4(__m128i a) {
  const auto x = Lanes<int64_t, 2>::of(a);
  return Lanes<int64_t>::made([&](int i) { return x.at[i % 2]; }).as<__m512i>();
}
inline __m512i _mm512_castsi128_si512(__m128i a) {
  const auto x = Lanes<int64_t, 2>::of(a);
  return Lanes<int64_t>::made([&](int i) { return i < 2 ? x.at[i] : 0x5a5a5a5a5a5a5a5a; }).as<__m512i>(); // undefined
}

inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i all = {};
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) all |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return all;
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
template <class S>
__m512i sum(__m512i a, __m512i b) {
  return each<S>(a, b, [](S x, S y) { return x + y; });
}
template <class S>
__m512i difference(__m512i a, __m512i b) {
  return each<S>(a, b, [](S x, S y) { return x - y; });
}
inline __m512i _mm512_add_epi8(__m512i a, __m512i b) { return sum<uint8_t>(a, b); }
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) { return sum<uint16_t>(a, b); }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return sum<uint32_t>(a, b); }
inline __m512i _mm512_sub_epi8(__m512i a, __m512i b) { return difference<uint8_t>(a, b); }
inline __m512i _mm512_sub_epi16(__m512i a, __m512i b) { return difference<uint16_t>(a, b); }
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return difference<uint32_t>(a, b); }
inline __m512i _mm512_max_epi8(__m512i a, __m512i b) {
  return each<int8_t>(a, b, [](int8_t x, int8_t y) { return x > y ? x : y; });
}
inline int32_t _mm512_reduce_add_epi32(__m512i a) {
  uint32_t all = 0;
  for (const uint32_t x : Lanes<uint32_t>::of(a).at) all += x;
  return static_cast<int32_t>(all);
}

// Products of N lanes of an int32 lane each, which are added to it.
template <class A, class B>
__m512i dot(__m512i sums, __m512i a, __m512i b) {
  constexpr int N = 4 / sizeof(A);
  const auto x = Lanes<A>::of(a);
  const auto y = Lanes<B>::of(b);
  auto all = Lanes<uint32_t>::of(sums);
  for (int i = 0; i < 16 * N; i++) all.at[i / N] += static_cast<uint32_t>(x.at[i] * y.at[i]);
  return all.template as<__m512i>();
}
inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) { return dot<uint8_t, int8_t>(sums, a, b); }
inline __m512i _mm512_dpwssd_epi32(__m512i sums, __m512i a, __m512i b) { return dot<int16_t, int16_t>(sums, a, b); }

inline __m512i _mm512_slli_epi16(__m512i a, unsigned by) {
  return each<uint16_t>(a, [&](uint16_t x) { return by < 16 ? uint32_t(x) << by : 0; });
}
inline __m512i _mm512_srli_epi16(__m512i a, unsigned by) {
  return each<uint16_t>(a, [&](uint16_t x) { return by < 16 ? x >> by : 0; });
}
inline __m512i _mm512_sllv_epi32(__m512i a, __m512i by) {
  return each<uint32_t>(a, by, [](uint32_t x, uint32_t n) { return n < 32 ? x << n : 0; });
}
inline __m512i _mm512_srlv_epi32(__m512i a, __m512i by) {
  return each<uint32_t>(a, by, [](uint32_t x, uint32_t n) { return n < 32 ? x >> n : 0; });
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned by) { return _mm512_sllv_epi32(a, _mm512_set1_epi32(int(by))); }
inline __m512i _mm512_srli_epi32(__m512i a, unsigned by) { return _mm512_srlv_epi32(a, _mm512_set1_epi32(int(by))); }
inline __m512i _mm512_srai_epi32(__m512i a, unsigned by) {
  return each<int32_t>(a, [&](int32_t x) { return x >> (by < 32 ? by : 31); });
}
inline __m512i _mm512_shrdv_epi32(__m512i a, __m512i b, __m512i by) {
  const auto low = Lanes<uint32_t>::of(a), high = Lanes<uint32_t>::of(b), n = Lanes<uint32_t>::of(by);
  return Lanes<uint32_t>::made([&](int i) {
           return (uint64_t(high.at[i]) << 32 | low.at[i]) >> (n.at[i] & 31);
         }).as<__m512i>();
}

// Lanes of `from` that `index` names.
template <class I, class V>
V permuted(__m512i index, const V &from) {
  const auto x = Lanes<I>::of(from), at = Lanes<I>::of(index);
  return Lanes<I>::made([&](int i) { return x.at[at.at[i] % (64 / sizeof(I))]; }).template as<V>();
}
inline __m512i _mm512_permutexvar_epi8(__m512i index, __m512i a) { return permuted<uint8_t>(index, a); }
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) { return permuted<uint16_t>(index, a); }
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 a) { return permuted<uint32_t>(index, a); }
inline __m512i _mm512_mask_blend_epi8(__mmask64 mask, __m512i a, __m512i b) {
  const auto x = Lanes<uint8_t>::of(a), y = Lanes<uint8_t>::of(b);
  return Lanes<uint8_t>::made([&](int i) { return mask >> i & 1 ? y.at[i] : x.at[i]; }).as<__m512i>();
}
inline __m512i _mm512_maskz_permutex2var_epi8(__mmask64 mask, __m512i a, __m512i index, __m512i b) {
  const auto x = Lanes<uint8_t>::of(a), y = Lanes<uint8_t>::of(b), at = Lanes<uint8_t>::of(index);
  return Lanes<uint8_t>::made([&](int i) {
           return mask >> i & 1 ? (at.at[i] & 64 ? y : x).at[at.at[i] % 64] : 0;
         }).as<__m512i>();
}
inline __m512i _mm512_packus_epi16(__m512i a, __m512i b) { // in each quarter eight of a, then eight of b
  const auto x = Lanes<int16_t>::of(a), y = Lanes<int16_t>::of(b);
  return Lanes<uint8_t>::made([&](int i) {
           const int16_t from = (i & 8 ? y : x).at[i / 16 * 8 + i % 8];
           return from < 0 ? 0 : from > 255 ? 255 : from;
         }).as<__m512i>();
}

inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  const auto x = Lanes<int32_t>::of(a);
  return Lanes<int8_t, 16>::made([&](int i) { return x.at[i]; }).as<__m128i>();
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  const auto x = Lanes<uint16_t, 16>::of(a);
  return Lanes<float>::made([&](int i) { return half_to_float(x.at[i]); }).as<__m512>();
}

} // namespace
} // namespace signbit
#endif
