// Replays the cases that `python -m tests.laws.record FILE` wrote, on every instruction set that this processor has:
//   signbit_replay FILE [threads [ISA]]      ISA: on this set alone, to the first case that is wrong
// Built where the kernels are to run under sanitizers or an emulator, where there is no Python. Exit status 1 and one
// line a wrong case; every operand lies in memory of exactly its own size, so that a read beyond it is seen.
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "floats.h"
#include "signbit.h"

namespace {

struct Reader {
  std::FILE *file;

  void read(void *to, size_t bytes) {
    if (bytes != 0 && std::fread(to, 1, bytes, file) != bytes) {
      std::fprintf(stderr, "the file of cases ends too early\n");
      std::exit(2);
    }
  }
  int64_t number() {
    int64_t value;
    read(&value, sizeof value);
    return value;
  }
  int32_t small() { return static_cast<int32_t>(number()); }
  double real() {
    double value;
    read(&value, sizeof value);
    return value;
  }
};

// One operand: its bytes, or none.
struct Blob {
  std::unique_ptr<char[]> bytes;
  explicit Blob(Reader &from) {
    const int64_t size = from.number();
    if (size < 0) return;
    bytes.reset(new char[static_cast<size_t>(size)]);
    from.read(bytes.get(), static_cast<size_t>(size));
  }
  template <class S>
  const S *as() const {
    return reinterpret_cast<const S *>(bytes.get());
  }
};

} // namespace

int main(int argc, char **argv) {
  std::FILE *file = argc > 1 ? std::fopen(argv[1], "rb") : nullptr;
  if (file == nullptr) {
    std::fprintf(stderr, "usage: %s FILE [threads [ISA]]: no such file of cases\n", argv[0]);
    return 2;
  }
  const int threads = argc > 2 ? std::atoi(argv[2]) : 2;
  const char *only = argc > 3 ? argv[3] : nullptr;
  Reader in{file};
  char magic[8];
  in.read(magic, 8);
  if (std::memcmp(magic, "signbit1", 8) != 0) {
    std::fprintf(stderr, "%s is no file of cases\n", argv[1]);
    return 2;
  }
  const int64_t cases = in.number();
  int wrong = 0, run = 0;
  for (int64_t c = 0; c < cases && !(only && wrong > 0); c++) {
    const Blob name(in);
    const bool int8 = in.number() != 0;
    const int64_t tokens = in.number();
    signbit_call call{};
    call.activations = in.small(), call.threads = threads, call.x_type = in.small();
    call.norm_in = in.small(), call.norm_out = in.small(), call.bias_type = in.small();
    call.norm_in_eps = static_cast<float>(in.real()), call.norm_out_eps = static_cast<float>(in.real());
    signbit_matrix w{};
    w.rows = in.number(), w.columns = in.number(), w.groups = in.number();
    w.planes = in.small(), w.sign_planes = in.small(), w.scale_rows = in.small(), w.in_scale_planes = in.small();
    w.float_type = in.small(), w.salient_bits = in.small();
    const Blob signs(in), scale(in), shift(in), in_scale(in), in_shift(in), codes(in), positions(in), counts(in);
    const Blob salient_scale(in), zeros(in), starts(in), bias(in), x(in), want(in), slack(in);
    w.signs = signs.as<uint32_t>(), w.scale = scale.as<void>(), w.shift = shift.as<void>();
    w.in_scale = in_scale.as<void>(), w.in_shift = in_shift.as<void>(), w.salient_codes = codes.as<uint8_t>();
    w.salient_positions = positions.as<uint8_t>(), w.salient_counts = counts.as<uint8_t>();
    w.salient_zeros = zeros.as<uint8_t>(), w.salient_starts = starts.as<uint32_t>();
    w.salient_scale = salient_scale.as<void>(), call.bias = bias.as<void>();
    const signbit_int8_matrix head{w.rows, w.columns, w.float_type, codes.as<int8_t>(), scale.as<void>()};
    const size_t count = static_cast<size_t>(tokens * w.rows), width = call.x_type == SIGNBIT_FLOAT32 ? 4 : 2;
    for (int isa = 0; isa < signbit_isa_count(); isa++) {
      if (!signbit_isa_runs(isa) || (only && std::strcmp(only, signbit_isa_name(isa)) != 0)) continue;
      call.isa = isa;
      const std::unique_ptr<char[]> y(new char[count * width]);
      std::memset(y.get(), 0xff, count * width); // NaN in all three types
      const int error = int8 ? signbit_int8_linear(&head, &call, x.as<void>(), tokens, w.columns, y.get())
                             : signbit_linear(&w, &call, x.as<void>(), tokens, w.columns, y.get());
      int64_t bad = 0;
      for (size_t i = 0; i < count; i++) {
        const float off = std::fabs(signbit::load(y.get(), static_cast<int64_t>(i), call.x_type) - want.as<float>()[i]);
        bad += !(off <= slack.as<float>()[i]);
      }
      run++;
      if (error == 0 && bad == 0) continue;
      wrong++;
      std::printf("wrong: %s on %s: error %d, %" PRId64 " of %zu values\n", name.as<char>(), signbit_isa_name(isa), error,
                  bad, count);
    }
  }
  std::fclose(file);
  std::printf("%" PRId64 " cases, %d runs, %d wrong;", cases, run, wrong);
  for (int isa = 0; isa < signbit_isa_count(); isa++)
    if (signbit_isa_runs(isa)) std::printf(" %s", signbit_isa_name(isa));
  std::printf("\n");
  return wrong != 0;
}
