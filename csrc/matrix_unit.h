// Matrix units: eight tiles of 16 rows of 64 bytes. Intel's AMX, or the same in plain C++, so that what is written for
// them can be tested where there are none. A tile is named by a template argument, for an instruction names it.
//   begin, end       before and after a thread's use of tiles
//   zero<D>, load<D>(from, bytes between rows), store<D>(to, bytes between rows)
//   multiply<C, A, B>      C[m][n] += Σ A[m][4k + j] · B[k][4n + j], bytes with a sign to int32
#ifndef SIGNBIT_MATRIX_UNIT_H
#define SIGNBIT_MATRIX_UNIT_H

#include <stdint.h>
#include <string.h>

namespace signbit {
namespace {

#if defined(SIGNBIT_AMX)
// As assembly: gcc's own intrinsics take only literal numbers, and do not tell the compiler that loads read memory.
struct Amx {
  static void begin() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  static void end() { asm volatile("tilerelease"); }
  template <int D>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(D));
  }
  template <int D>
  static void load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(D), "r"(from), "r"(stride) : "memory");
  }
  template <int D>
  static void store(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(D), "r"(to), "r"(stride) : "memory");
  }
  template <int C, int A, int B>
  static void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};
#endif

#if defined(SIGNBIT_EMULATE)
struct Emulated {
  static inline thread_local int8_t tiles[8][16][64];
  static inline thread_local bool ready = false; // else the instructions would trap

  static void begin() { memset(tiles, 0, sizeof tiles), ready = true; }
  static void end() { need(), ready = false; }
  static void need() {
    if (!ready) __builtin_trap();
  }
  template <int D>
  static void zero() {
    need(), memset(tiles[D], 0, sizeof tiles[D]);
  }
  template <int D>
  static void load(const void *from, int64_t stride) {
    need();
    for (int m = 0; m < 16; m++) memcpy(tiles[D][m], static_cast<const int8_t *>(from) + m * stride, 64);
  }
  template <int D>
  static void store(void *to, int64_t stride) {
    need();
    for (int m = 0; m < 16; m++) memcpy(static_cast<int8_t *>(to) + m * stride, tiles[D][m], 64);
  }
  template <int C, int A, int B>
  static void multiply() {
    need();
    for (int m = 0; m < 16; m++)
      for (int n = 0; n < 16; n++) {
        int32_t sum;
        memcpy(&sum, tiles[C][m] + 4 * n, 4);
        for (int k = 0; k < 16; k++)
          for (int j = 0; j < 4; j++) sum += tiles[A][m][4 * k + j] * tiles[B][k][4 * n + j];
        memcpy(tiles[C][m] + 4 * n, &sum, 4);
      }
  }
};
#endif

} // namespace
} // namespace signbit
#endif
