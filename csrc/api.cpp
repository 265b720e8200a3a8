// The C interface: which instruction set runs, and how tokens and rows are shared out among threads.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(SIGNBIT_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "floats.h"
#include "kernels.h"
#include "pool.h"
#include "signbit.h"

namespace signbit {
namespace {

struct Entry {
  const Kernels *kernels;
  bool (*runs)();
};

#if defined(__x86_64__)
// Compilers know the names of some features only lately, so those are read from the processor.
bool has_f16c() {
  unsigned a = 1, b, c = 0, d;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return c >> 29 & 1;
}
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && has_f16c();
}
bool has_avxvnni() {
  unsigned a = 7, b, c = 1, d; // leaf 7.1
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return has_avx2() && (a >> 4 & 1);
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2");
}
bool has_amx_int8() {
  unsigned a = 7, b, c = 0, d;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return has_avx512() && (d >> 24 & 3) == 3; // amx-tile, amx-int8
}
#if defined(SIGNBIT_AMX)
// Linux gives tiles to a process, with all its threads, that asks for room to save them (ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool may_use_amx() { return has_amx_int8() && syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#endif
#elif defined(__aarch64__)
bool has_dot_product() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; // not in an ARMv8.0, such as a Cortex-A72
#else
  return true; // every processor of Apple's with macOS has it
#endif
}
#endif
bool always() { return true; }

const Entry ENTRIES[] = {
#if defined(__x86_64__)
#if defined(SIGNBIT_AMX)
    {&amx_kernels, may_use_amx},
#endif
#if !defined(SIGNBIT_EMULATE_INSTEAD)
    {&avx512_kernels, has_avx512},
    {&avxvnni_kernels, has_avxvnni},
#endif
    {&avx2_kernels, has_avx2},
#elif defined(__aarch64__)
    {&neon_kernels, has_dot_product},
#endif
    {&portable_kernels, always},
#if defined(SIGNBIT_EMULATE)
#if defined(__x86_64__)
    {&emulated_avxvnni_kernels, has_avx2},
#endif
    {&emulated_avx512_kernels, always},
    {&emulated_amx_kernels, always},
#endif
};
constexpr int COUNT = sizeof ENTRIES / sizeof ENTRIES[0];

// Asked once: a virtual machine's cpuid takes longer than a small layer.
bool runs_here(int isa) {
  static const std::array<bool, COUNT> runs = [] {
    std::array<bool, COUNT> found{};
    for (int i = 0; i < COUNT; i++) found[i] = ENTRIES[i].runs();
    return found;
  }();
  return runs[isa];
}

int error_of(int isa) {
  if (isa < 0 || isa >= COUNT || !runs_here(isa)) return SIGNBIT_NO_SUCH_ISA;
  return SIGNBIT_OK;
}

// Few tokens: each thread takes some rows and reads a share of the weights. Many: each takes some tokens, and so
// prepares only those (the packed weights are small enough to be read by all).
constexpr int64_t TOKENS_A_THREAD = 12;

template <class Matrix>
struct Job {
  const Matrix &w;
  const signbit_call &call;
  const Input &input;
  int (*run)(const Matrix &, const signbit_call &, const Input &, const Part &);
  int64_t units, tasks;
  bool by_token;
  std::atomic<int> error{0};

  static void task(void *self, int i) {
    auto &job = *static_cast<Job *>(self);
    const int64_t total = job.by_token ? job.input.tokens : job.units;
    const int64_t first = total * i / job.tasks, last = total * (i + 1) / job.tasks;
    const Part part = job.by_token ? Part{first, last, 0, job.units} : Part{0, job.input.tokens, first, last};
    if (const int error = job.run(job.w, job.call, job.input, part)) job.error = error;
  }
};

template <class Matrix>
int run(const Matrix &w, const signbit_call &call, const Input &input, int64_t units,
        int (*kernel)(const Matrix &, const signbit_call &, const Input &, const Part &)) {
  const int64_t threads = std::max(1, call.threads);
  const bool by_token = input.tokens >= threads * TOKENS_A_THREAD;
  Job<Matrix> job{w, call, input, kernel, units, std::min(threads, by_token ? input.tokens : units), by_token};
  parallel(static_cast<int>(threads), static_cast<int>(job.tasks), Job<Matrix>::task, &job);
  return job.error;
}

// F.layer_norm without weights, then the bias, each rounded to the type of y as torch's own operations would be.
void finish(const signbit_call &call, int64_t tokens, int64_t rows, const float *wide, void *y) {
  for (int64_t t = 0; t < tokens; t++) {
    const float *row = wide + t * rows;
    double mean = 0, square = 0;
    for (int64_t n = 0; n < rows; n++) mean += row[n];
    mean /= static_cast<double>(rows);
    for (int64_t n = 0; n < rows; n++) square += (row[n] - mean) * (row[n] - mean);
    const double inverse = 1 / std::sqrt(square / static_cast<double>(rows) + call.norm_out_eps);
    for (int64_t n = 0; n < rows; n++) {
      float value = rounded(static_cast<float>((row[n] - mean) * inverse), call.x_type);
      if (call.bias_type != SIGNBIT_NONE) value += load(call.bias, n, call.bias_type);
      store(y, t * rows + n, value, call.x_type);
    }
  }
}

bool is_float(int type) { return type >= SIGNBIT_FLOAT32 && type <= SIGNBIT_FLOAT16; }

} // namespace
} // namespace signbit

using namespace signbit;

int signbit_abi(void) { return SIGNBIT_ABI; }

const char *signbit_features(void) {
  static const std::string features = [] {
    std::string found;
#if defined(__x86_64__)
#define SIGNBIT_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found += name " ";
    SIGNBIT_FEATURE("sse4.2") SIGNBIT_FEATURE("avx2") SIGNBIT_FEATURE("fma")
    SIGNBIT_FEATURE("avx512f") SIGNBIT_FEATURE("avx512bw") SIGNBIT_FEATURE("avx512vl") SIGNBIT_FEATURE("avx512dq")
    SIGNBIT_FEATURE("avx512vnni") SIGNBIT_FEATURE("avx512vbmi") SIGNBIT_FEATURE("avx512vbmi2")
    if (has_f16c()) found += "f16c ";
    if (has_avxvnni()) found += "avxvnni ";
    if (has_amx_int8()) found += "amx-int8 ";
#elif defined(__aarch64__)
    found = has_dot_product() ? "neon dotprod " : "neon ";
#endif
    if (!found.empty()) found.pop_back();
    return found;
  }();
  return features.c_str();
}

int signbit_isa_count(void) { return COUNT; }
const char *signbit_isa_name(int isa) { return isa >= 0 && isa < COUNT ? ENTRIES[isa].kernels->name : nullptr; }
int signbit_isa_runs(int isa) { return error_of(isa) == SIGNBIT_OK; }

int signbit_linear(const signbit_matrix *w, const signbit_call *call, const void *x, int64_t tokens, int64_t stride,
                   void *y) {
  if (const int error = error_of(call->isa)) return error;
  const int64_t width = w->groups > 0 ? w->columns / w->groups : 0;
  if (w->groups < 1 || width * w->groups != w->columns || (w->groups > 1 && width % 32) || !is_float(w->float_type) ||
      !is_float(call->x_type) || w->columns > 65536)
    return SIGNBIT_BAD_ARGUMENT;
  if (tokens == 0) return SIGNBIT_OK;
  std::unique_ptr<float[]> wide;
  if (call->norm_out != SIGNBIT_NORM_NONE) {
    wide.reset(new (std::nothrow) float[tokens * w->rows]);
    if (!wide) return SIGNBIT_NO_MEMORY;
  }
  const Input input{x, tokens, stride, y, wide.get()};
  const int error = run(*w, *call, input, (w->rows + 15) / 16, ENTRIES[call->isa].kernels->linear);
  if (error == SIGNBIT_OK && wide) finish(*call, tokens, w->rows, wide.get(), y);
  return error;
}

int signbit_int8_linear(const signbit_int8_matrix *w, const signbit_call *call, const void *x, int64_t tokens,
                        int64_t stride, void *y) {
  if (const int error = error_of(call->isa)) return error;
  if (!is_float(w->float_type) || !is_float(call->x_type) || w->columns > 65536) return SIGNBIT_BAD_ARGUMENT;
  if (tokens == 0) return SIGNBIT_OK;
  const Input input{x, tokens, stride, y, nullptr};
  return run(*w, *call, input, w->rows, ENTRIES[call->isa].kernels->int8_linear);
}

int64_t signbit_clear_salient(uint8_t *signs, int32_t sign_planes, int64_t rows, int64_t columns, const uint8_t *positions,
                              int64_t bytes, const uint8_t *counts) {
  const int64_t width = (columns + 7) / 8, blocks = (columns + 255) / 256;
  int64_t total = 0;
  if (counts == nullptr) {
    if (bytes != rows * width) return -1;
    for (int64_t i = 0; i < bytes; i++) {
      if (i % width == width - 1 && columns % 8 != 0 && positions[i] >> columns % 8 != 0) return -1;
      for (unsigned left = positions[i]; left != 0; left &= left - 1) total++;
      for (int32_t p = 0; p < sign_planes; p++) signs[p * rows * width + i] &= static_cast<uint8_t>(~positions[i]);
    }
    return total;
  }
  for (int64_t n = 0; n < rows; n++)
    for (int64_t b = 0; b < blocks; b++) {
      int last = -1;
      for (int e = counts[n * blocks + b]; e > 0; e--, total++) {
        if (total >= bytes || positions[total] <= last || b * 256 + positions[total] >= columns) return -1;
        last = positions[total];
        for (int32_t p = 0; p < sign_planes; p++)
          signs[(p * rows + n) * width + b * 32 + last / 8] &= static_cast<uint8_t>(~(1u << last % 8));
      }
    }
  return total == bytes ? total : -1;
}
