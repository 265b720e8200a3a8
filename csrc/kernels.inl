// The multiplication, once for all instruction sets. Each isa_*.cpp defines `struct Isa` and includes this file inside
// an unnamed namespace, so that no compiled line is shared between instruction sets. No standard library here, for the
// same reason.
//
// struct Isa has
//   EXACT_TOKENS, INT8_TOKENS, HEAD_ROWS, HEAD_TOKENS      largest tiles that fit its registers
//   vf half(const uint16_t *)                              16 float16
//   vb narrow(vi)                                          16 integers of −128 … 127 as bytes
//   exact<R, T>(w, block stride, words, tables, table stride, acc[R][T])   acc = Σ ±x, 4 columns a table of 16 sums
//   int8<R, T>(w, block stride, words, q, q stride, all[T], acc[R][T])     acc = Σ ±q, of which all = Σ q
//   GROUP_WORDS                                            int8 for one token and so short groups by group; 0: none
//   vi group<WORDS>(w, q, begin)                           GROUP_UNIT·Σ ±q, where begin = −GROUP_UNIT·Σq
//   LOOKUP_TOKENS                                          int8 for so many tokens by the functions below; 0: none
//   lookup_tables, lookup_indices, lookup<R>               see isa_avx512.inl
//   Unit                                                   for linear_by_matrix alone: see matrix_unit.h
//   dot<R, T>(codes, row stride, q, q stride, columns, sums[R][T])         int8 · int8, columns a multiple of 64

constexpr int64_t CHUNK = 32;        // words
constexpr int64_t LOOKUP_WORDS = 8; // what lookup allows; its indices lie in the first-level cache, all tables in the second
constexpr int64_t LOOKUP_PIECES = LOOKUP_WORDS / 2;
constexpr int LEAST_LOOKUP_TOKENS = 2;
// What matrix units take: of two blocks so many words, 16 KiB as bytes, which lie in the first-level cache beside the codes
// that they meet; so many blocks, whose results lie in the second beside all codes; so many tokens, at least half a tile.
constexpr int64_t PANEL_WORDS = 16, SEGMENT_BLOCKS = 32;
constexpr int MATRIX_TOKENS = 128, LEAST_MATRIX_TOKENS = 8;

// How int8 is multiplied: bit planes by Isa::int8, or the two below. What is not int8 has one way.
enum class Way { PLANES, LOOKUP, MATRIX };

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline vf load16(const void *from, int64_t i, int type) {
  if (type == SIGNBIT_FLOAT32) return vload<vf>(static_cast<const float *>(from) + i);
  const uint16_t *halves = static_cast<const uint16_t *>(from) + i;
  if (type == SIGNBIT_FLOAT16) return Isa::half(halves);
  return reinterpret_cast<vf>(__builtin_convertvector(vload<vh>(halves), vu) << 16);
}

// Memory of a task, handed out piece by piece.
struct Memory {
  char *next;
  template <class S>
  S *take(int64_t count) {
    S *piece = reinterpret_cast<S *>(next);
    next += bytes<S>(count);
    return piece;
  }
  template <class S>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(S)) + 63) / 64 * 64;
  }
};

// One token as float32, zero beyond `columns`, after the norm of its inputs (rounded to the type of x, as torch's own
// operations would be).
inline void read_token(const signbit_call &call, const void *x, int64_t start, int64_t columns, int64_t padded,
                       float *to) {
  const int type = call.x_type;
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16) vstore(to + k, load16(x, start + k, type));
  for (; k < columns; k++) to[k] = load(x, start + k, type);
  for (; k < padded; k++) to[k] = 0;
  if (call.norm_in == SIGNBIT_NORM_NONE) return;
  float mean = 0;
  vf sums = {};
  if (call.norm_in == SIGNBIT_NORM_LAYER) {
    for (k = 0; k < padded; k += 16) sums += vload<vf>(to + k);
    mean = total(sums) / static_cast<float>(columns);
    for (k = 0; k < columns; k++) to[k] -= mean;
  }
  sums = vf{};
  for (k = 0; k < padded; k += 16) {
    const vf v = vload<vf>(to + k);
    sums += v * v;
  }
  const float inverse = 1 / __builtin_sqrtf(total(sums) / static_cast<float>(columns) + call.norm_in_eps);
  if (type == SIGNBIT_FLOAT32) {
    for (k = 0; k < padded; k += 16) vstore(to + k, vload<vf>(to + k) * inverse);
  } else {
    for (k = 0; k < columns; k++) to[k] = rounded(to[k] * inverse, type);
  }
}

// Each group of four activations as the sixteen sums ±x₀ ±x₁ ±x₂ ±x₃, bit j of the index for +xⱼ.
inline void build_tables(const float *x, int64_t columns, float *tables) {
  constexpr float m = -1, p = 1;
  const vf s0 = {m, p, m, p, m, p, m, p, m, p, m, p, m, p, m, p}, s1 = {m, m, p, p, m, m, p, p, m, m, p, p, m, m, p, p};
  const vf s2 = {m, m, m, m, p, p, p, p, m, m, m, m, p, p, p, p}, s3 = {m, m, m, m, m, m, m, m, p, p, p, p, p, p, p, p};
  for (int64_t k = 0; k < columns; k += 4, tables += 16)
    vstore(tables, (s0 * x[k] + s1 * x[k + 1]) + (s2 * x[k + 2] + s3 * x[k + 3]));
}

// 127·u is infinite where |u| is within a 127th of the largest float.
inline vf clamped(const vf &v) {
  const vf most = splat(127), capped = v < most ? v : most;
  return capped > -most ? capped : -most;
}

// a = max(max|u|, 1e-5), q = round_half_even(127·u/a): q in the order in which a word's bits meet it (see int8 in
// Isa: byte 4p + j is column 8j + p), or as it stands; `sums` [words + 1] counts up over the words, if it is there.
// Returns a/127, NaN if an activation is not finite.
template <bool BIT_ORDER>
inline float quantize_token(const float *u, int64_t padded, int8_t *q, int32_t *sums) {
  // Without their sign, floats are in the order of their bits; infinities and NaN come last.
  vi most = {};
  for (int64_t k = 0; k < padded; k += 16) {
    const vi size = vload<vi>(u + k) & 0x7fffffff;
    most = size > most ? size : most;
  }
  const int32_t bits = largest(most);
  float size;
  memcpy(&size, &bits, 4);
  if (!(size <= FLT_MAX)) {
    memset(q, 0, static_cast<size_t>(padded));
    if (sums != nullptr) memset(sums, 0, static_cast<size_t>(padded / 32 + 1) * 4);
    return size - size;
  }
  const float a = size > 1e-5f ? size : 1e-5f;
  // Adding 1.5·2²³ leaves no bits for a fraction, rounded half to even. Unsigned, for gcc 12 with -fsanitize=
  // signed-integer-overflow -fno-sanitize-recover loses a vector subtraction here (clang does not).
  const float magic = 12582912.0f;
  const vu base = reinterpret_cast<vu>(splat(magic));
  if (sums != nullptr) sums[0] = 0;
  for (int64_t k = 0; k < padded; k += 32) {
    const vf low = clamped(vload<vf>(u + k) * 127.0f / a), high = clamped(vload<vf>(u + k + 16) * 127.0f / a);
    const vi i = reinterpret_cast<vi>(reinterpret_cast<vu>(low + magic) - base);
    const vi j = reinterpret_cast<vi>(reinterpret_cast<vu>(high + magic) - base);
    const vb first = Isa::narrow(i), second = Isa::narrow(j);
    vb2 bytes;
    if (BIT_ORDER)
      bytes = __builtin_shufflevector(first, second, 0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27, 4, 12, 20,
                                      28, 5, 13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31);
    else
      bytes = __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18,
                                      19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
    vstore(q + k, bytes);
    if (sums != nullptr) sums[k / 32 + 1] = sums[k / 32] + total(i + j);
  }
  return a / 127.0f;
}

// Results of one token: rounded to the type of y; then the bias, unless the norm of the outputs comes first.
inline void write_token(const signbit_call &call, const Input &input, int64_t token, int64_t rows, int64_t first,
                        int64_t last, const float *values) {
  const int type = call.x_type;
  const int64_t start = token * rows;
  if (input.wide != nullptr) {
    for (int64_t n = first; n < last; n++) input.wide[start + n] = rounded(values[n - first], type);
  } else if (call.bias_type != SIGNBIT_NONE) {
    for (int64_t n = first; n < last; n++)
      store(input.y, start + n, rounded(values[n - first], type) + load(call.bias, n, call.bias_type), type);
  } else if (type == SIGNBIT_FLOAT32) {
    memcpy(static_cast<float *>(input.y) + start + first, values, static_cast<size_t>(last - first) * 4);
  } else if (type == SIGNBIT_BFLOAT16) {
    uint16_t *y = static_cast<uint16_t *>(input.y) + start;
    for (int64_t n = first; n < last; n++) y[n] = float_to_bfloat(values[n - first]);
  } else {
    uint16_t *y = static_cast<uint16_t *>(input.y) + start;
    for (int64_t n = first; n < last; n++) y[n] = float_to_half(values[n - first]);
  }
}

template <bool INT8>
inline auto sum_type() {
  if constexpr (INT8) return vi{};
  else return vf{};
}

// What A tiles of 16 tokens' codes and R panels of a block's signs add to A·R tiles of sums, [block][token][16 rows].
template <class Unit, int A, int R>
struct Products {
  static void zero() {
    Unit::template zero<0>();
    if (A > 1) Unit::template zero<1>();
    if (R > 1) Unit::template zero<2>();
    if (A > 1 && R > 1) Unit::template zero<3>();
  }

  static void load(const int32_t *block, const int32_t *next) {
    Unit::template load<0>(block, 64);
    if (A > 1) Unit::template load<1>(block + 256, 64);
    if (R > 1) Unit::template load<2>(next, 64);
    if (A > 1 && R > 1) Unit::template load<3>(next + 256, 64);
  }

  static void store(int32_t *block, int32_t *next) {
    Unit::template store<0>(block, 64);
    if (A > 1) Unit::template store<1>(block + 256, 64);
    if (R > 1) Unit::template store<2>(next, 64);
    if (A > 1 && R > 1) Unit::template store<3>(next + 256, 64);
  }

  static void add(const int8_t *codes, int64_t pitch, const int8_t *panel, int64_t steps) {
    for (int64_t step = 0; step < steps; step++, codes += 64, panel += R * 1024) {
      Unit::template load<6>(panel, 64);
      Unit::template load<4>(codes, pitch);
      Unit::template multiply<0, 4, 6>();
      if (A > 1) {
        Unit::template load<5>(codes + 16 * pitch, pitch);
        Unit::template multiply<1, 5, 6>();
      }
      if (R > 1) {
        Unit::template load<7>(panel + 1024, 64);
        Unit::template multiply<2, 4, 7>();
      }
      if (A > 1 && R > 1) Unit::template multiply<3, 5, 7>();
    }
  }
};

// T tokens, or by matrix units up to T, times some blocks of rows.
template <int T, bool INT8, Way WAY>
struct Tile {
  static constexpr bool LOOKUP = WAY == Way::LOOKUP, MATRIX = WAY == Way::MATRIX;
  using Sum = decltype(sum_type<INT8>());
  const signbit_matrix &w;
  const signbit_call &call;
  const Input &input;
  const int64_t first_row, last_row, most; // blocks: the part's, and how many of them are multiplied at once
  int64_t first, last;                     // those that are
  const int64_t blocks, words, padded, width;
  const int64_t x_pitch; // between tokens in x and u: 0 where the codes are all that is needed of them
  const int64_t pitch; // bytes between tokens in q: not a power of two, which would put them all in one cache set
  // So many words that the tables of T tokens, 16 bytes a column, lie in 16 KiB, half of a first-level cache.
  static constexpr int64_t TABLE_WORDS = T <= 8 ? CHUNK / T : 2;
  // A token's tables: sums of four floats, or the bytes of lookup_tables.
  static constexpr int64_t TABLE_FLOATS = LOOKUP ? LOOKUP_PIECES * LOOKUPS * 128 / 4 : INT8 ? 0 : TABLE_WORDS * 128;

  float *x, *u, *tables, *y, *y_plane, *group_sums, *row;
  int8_t *q, *panel;
  uint8_t *indices;
  int32_t *q_sums, *y_integers, *sizes, *group_products;
  int some = T; // tokens
  float step[T] = {}, x_step[T], shifted[T]; // of u, of x; the input shift's share

  Tile(const signbit_matrix &matrix, const signbit_call &how, const Input &in, const Part &part)
      : w(matrix), call(how), input(in), first_row(part.first_row), last_row(part.last_row),
        // Where planes have codes of their own, those that lie in q meet all rows.
        most(least(last_row - first_row, MATRIX && matrix.in_scale_planes < 2 ? SEGMENT_BLOCKS : last_row - first_row)),
        blocks((matrix.rows + 15) / 16), words((matrix.columns + 31) / 32), padded(words * 32),
        width(matrix.columns / matrix.groups),
        x_pitch(INT8 && !w.in_scale && !w.in_shift && !w.salient_codes ? 0 : padded), pitch(padded + 64) {}

  int tokens() const { return MATRIX ? some : T; }

  // Rows at once; for a lookup rounded up to four blocks, which are written together.
  int64_t lanes() const { return LOOKUP ? (most + 3) / 4 * 64 : most * 16; }

  // Where a token's 16 results of a block lie in y and y_integers: beside what is written with them, all T of a block, or
  // in a lookup all blocks of a token, which T·64 bytes apart would fall into a few cache sets.
  int64_t cell(int64_t block, int t) const {
    return LOOKUP ? t * lanes() + (block - first) * 16 : ((block - first) * T + t) * 16;
  }

  int64_t bytes() const {
    return 3 * Memory::bytes<float>(T * padded) + Memory::bytes<float>(T * TABLE_FLOATS) +
           Memory::bytes<float>(T * w.groups) + (2 * T + 1) * Memory::bytes<float>(lanes()) +
           Memory::bytes<int8_t>(T * pitch) + Memory::bytes<int32_t>(T * (words + 1)) +
           LOOKUP * Memory::bytes<uint8_t>(LOOKUP_PIECES * LOOKUPS * 4 * 64) +
           LOOKUP * Memory::bytes<int32_t>(T * (LOOKUP_PIECES + 1)) +
           MATRIX * (Memory::bytes<int8_t>(PANEL_WORDS * 1024) + Memory::bytes<int32_t>(2 * 1024)) +
           Memory::bytes<uint32_t>(padded) + Memory::bytes<uint8_t>(padded + 8);
  }

  bool run(int64_t token) {
    void *piece = scratch(static_cast<size_t>(bytes()));
    if (piece == nullptr) return false;
    Memory memory{static_cast<char *>(piece)};
    x = memory.take<float>(T * padded);
    u = memory.take<float>(T * padded);
    tables = memory.take<float>(T * TABLE_FLOATS);
    group_sums = memory.take<float>(T * w.groups);
    y = memory.take<float>(T * lanes());
    y_plane = INT8 && w.planes > 1 ? memory.take<float>(T * lanes()) : y; // a single plane's sums become y
    y_integers = reinterpret_cast<int32_t *>(y_plane);
    row = memory.take<float>(lanes());
    q = memory.take<int8_t>(T * pitch);
    q_sums = memory.take<int32_t>(T * (words + 1));
    if constexpr (LOOKUP) {
      indices = memory.take<uint8_t>(LOOKUP_PIECES * LOOKUPS * 4 * 64);
      sizes = memory.take<int32_t>(T * (LOOKUP_PIECES + 1));
    }
    if constexpr (MATRIX) {
      panel = memory.take<int8_t>(PANEL_WORDS * 1024);
      group_products = memory.take<int32_t>(2 * 1024); // of two groups, at most four tiles each
      memset(q + some * pitch, 0, static_cast<size_t>((some + 15) / 16 * 16 - some) * pitch); // tokens of the last tile
    }
    if (WAY != Way::PLANES)
      for (int t = 0; t < tokens(); t++) memset(q + t * pitch + padded, 0, 32); // a word beyond an odd number of them

    for (int t = 0; t < tokens(); t++) {
      read_token(call, input.x, (token + t) * input.stride, w.columns, padded, x + t * x_pitch);
      if (INT8) x_step[t] = quantize(x, t);
    }
    if (w.shift != nullptr) sum_groups();
    for (int t = 0; t < tokens(); t++) {
      shifted[t] = 0;
      if (w.in_shift == nullptr) continue;
      vf sums = {};
      float rest = 0;
      int64_t k = 0;
      for (; k + 16 <= w.columns; k += 16) sums += load16(w.in_shift, k, w.float_type) * vload<vf>(x + t * x_pitch + k);
      for (; k < w.columns; k++) rest += load(w.in_shift, k, w.float_type) * x[t * x_pitch + k];
      shifted[t] = total(sums) + rest;
    }
    if (MATRIX && w.in_scale_planes < 2) take_plane(0);
    for (first = first_row; first < last_row; first = last) {
      last = least(first + most, last_row);
      run_rows(token, memory);
    }
    return true;
  }

  // The rows [first, last); what is taken of `memory` is free again afterwards.
  void run_rows(int64_t token, Memory memory) {
    if (!INT8) memset(y, 0, static_cast<size_t>(T * lanes()) * 4);
    for (int plane = 0; plane < w.planes; plane++) {
      const uint32_t *signs = w.signs + (w.sign_planes == 1 ? 0 : plane) * words * blocks * 16;
      if constexpr (MATRIX) {
        if (w.in_scale_planes > 1) take_plane(plane);
        multiply_matrix<Isa>(signs, plane);
      } else {
        const float *from = take_plane(plane);
        if (INT8 && !LOOKUP) memset(y_plane, 0, static_cast<size_t>(T * lanes()) * 4);
        if constexpr (LOOKUP) look_up<Isa>(signs, plane);
        else
          for (int64_t word = 0; word < words; word += CHUNK) {
            const int64_t count = least(CHUNK, words - word);
            multiply(signs + word * blocks * 16, from, word, count, plane);
          }
      }
      if (INT8) add_plane(plane);
    }
    if (w.shift != nullptr) add_shift();
    if constexpr (!MATRIX)
      if (w.salient_codes != nullptr) {
        uint32_t *columns = memory.take<uint32_t>(padded);
        uint8_t *codes = memory.take<uint8_t>(padded + 8);
        add_salient(columns, codes, memory.take<float>(T * padded));
      }
    for (int t = 0; t < tokens(); t++) {
      for (int64_t block = first; block < last; block++)
        vstore(row + (block - first) * 16, vload<vf>(y + cell(block, t)) + shifted[t]);
      write_token(call, input, token + t, w.rows, first * 16, least(last * 16, w.rows), row);
    }
  }

  float quantize(const float *from, int t) {
    return quantize_token<!LOOKUP>(from + t * x_pitch, padded, q + t * pitch,
                                  WAY != Way::PLANES && !w.shift ? nullptr : q_sums + t * (words + 1));
  }

  void quantize(const float *from, float *steps) {
    for (int t = 0; t < tokens(); t++) steps[t] = quantize(from, t);
  }

  // What the signs of a plane meet: x, or x times the plane's input scale; for int8 its codes, in q.
  const float *take_plane(int plane) {
    if (w.in_scale == nullptr) {
      for (int t = 0; t < tokens(); t++) step[t] = x_step[t];
      return x;
    }
    if (plane < w.in_scale_planes) {
      scale_inputs(plane);
      if (INT8) quantize(u, step);
    }
    return u;
  }

  void scale_inputs(int plane) {
    const int64_t row = plane * w.columns;
    for (int t = 0; t < tokens(); t++) {
      const float *from = x + t * x_pitch;
      float *to = u + t * x_pitch;
      int64_t k = 0;
      for (; k + 16 <= w.columns; k += 16)
        vstore(to + k, vload<vf>(from + k) * load16(w.in_scale, row + k, w.float_type));
      for (; k < w.columns; k++) to[k] = from[k] * load(w.in_scale, row + k, w.float_type);
      for (; k < padded; k++) to[k] = 0;
    }
  }

  void sum_groups() {
    for (int t = 0; t < tokens(); t++)
      for (int64_t g = 0; g < w.groups; g++) {
        float sum = 0;
        if (INT8) { // a width is a multiple of 32 unless there is one group
          const int32_t *sums = q_sums + t * (words + 1);
          const int64_t begin = g * width / 32, end = w.groups == 1 ? words : (g + 1) * width / 32;
          sum = static_cast<float>(sums[end] - sums[begin]) * x_step[t];
        } else {
          const float *from = x + t * x_pitch + g * width;
          vf sums = {};
          int64_t k = 0;
          for (; k + 16 <= width; k += 16) sums += vload<vf>(from + k);
          for (; k < width; k++) sum += from[k];
          sum += total(sums);
        }
        group_sums[t * w.groups + g] = sum;
      }
  }

  vf scale_of(int plane, int64_t block, int64_t group) const {
    if (w.scale_rows) return load16(w.scale, ((plane * blocks + block) * w.groups + group) * 16, w.float_type);
    return splat(load(w.scale, plane * w.groups + group, w.float_type));
  }

  // The scales of a chunk's groups lie far from those of the next rows: no processor guesses where.
  void fetch_scales(int plane, int64_t block, int64_t group, int64_t count) const {
    if (!w.scale_rows) return;
    const int64_t bytes = w.float_type == SIGNBIT_FLOAT32 ? 4 : 2;
    const char *ahead = static_cast<const char *>(w.scale) + ((plane * blocks + block) * w.groups + group) * 16 * bytes;
    for (int64_t line = 0; line < count * 16 * bytes; line += 64) __builtin_prefetch(ahead + line);
  }

  // One chunk of columns: words [word, word + count), lying at `signs` block after block.
  void multiply(const uint32_t *signs, const float *from, int64_t word, int64_t count, int plane) {
    if constexpr (INT8 && T == 1 && Isa::GROUP_WORDS > 0)
      if (w.groups > 1) {
        if (width == 32) return multiply_groups<Isa, 1>(signs, word, count, plane);
        if (width == 64) return multiply_groups<Isa, 2>(signs, word, count, plane);
        if (width == 128) return multiply_groups<Isa, 4>(signs, word, count, plane);
        if (width == 256) return multiply_groups<Isa, 8>(signs, word, count, plane);
      }
    const int64_t step_words = INT8 ? count : TABLE_WORDS;
    for (int64_t part = 0; part < count; part += step_words) {
      const int64_t some = least(step_words, count - part);
      if (!INT8)
        for (int t = 0; t < T; t++)
          build_tables(from + t * x_pitch + (word + part) * 32, some * 32, tables + t * TABLE_WORDS * 128);
      int64_t block = first;
      if (T > 1)
        for (; block + 2 <= last; block += 2) rows<2>(signs, count, word, part, some, block, plane);
      for (; block < last; block++) rows<1>(signs, count, word, part, some, block, plane);
    }
  }

  template <int R>
  void rows(const uint32_t *signs, int64_t count, int64_t word, int64_t part, int64_t some, int64_t block, int plane) {
    const uint32_t *w0 = signs + block * count * 16;
    if constexpr (INT8)
      if (w.groups == 1) {
        Sum acc[R][T];
        add_words<R>(w0, count, word, part, part, part + some, acc);
        for (int r = 0; r < R; r++)
          for (int t = 0; t < T; t++) {
            int32_t *at = y_integers + cell(block + r, t);
            vstore(at, vload<vi>(at) + acc[r][t]);
          }
        return;
      }
    // The sums of a chunk's groups meet in registers. In int8 the step comes later, once a plane.
    float *const to = INT8 ? y_plane : y;
    vf sums[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) sums[r][t] = vload<vf>(to + cell(block + r, t));
    const int64_t group_words = w.groups == 1 ? words : width / 32;
    int64_t group = w.groups == 1 ? 0 : (word + part) / group_words;
    if (T == 1) fetch_scales(plane, block + 4, group, (some + group_words - 1) / group_words);
    for (int64_t begin = part; begin < part + some; group++) {
      const int64_t end = least(part + some, (group + 1) * group_words - word);
      Sum acc[R][T];
      add_words<R>(w0, count, word, part, begin, end, acc);
      for (int r = 0; r < R; r++) {
        const vf scale = scale_of(plane, block + r, group);
        for (int t = 0; t < T; t++) sums[r][t] += as_floats(acc[r][t]) * scale;
      }
      begin = end;
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) vstore(to + cell(block + r, t), sums[r][t]);
  }

  // A chunk in int8 for one token, in groups of WORDS words, which begin and end with chunks.
  template <class Set, int WORDS>
  void multiply_groups(const uint32_t *signs, int64_t word, int64_t count, int plane) const {
    static_assert(CHUNK % WORDS == 0);
    const int64_t groups = count / WORDS, first_group = word / WORDS;
    int32_t begin[CHUNK / WORDS];
    for (int64_t g = 0; g < groups; g++)
      begin[g] = Set::GROUP_UNIT * (q_sums[word + g * WORDS] - q_sums[word + (g + 1) * WORDS]);
    for (int64_t block = first; block < last; block++) {
      fetch_scales(plane, block + 4, first_group, groups);
      const uint32_t *from = signs + block * count * 16;
      const int8_t *codes = q + word * 32;
      vf sum = {};
      for (int64_t g = 0; g < groups; g++, from += WORDS * 16, codes += WORDS * 32)
        sum += as_floats(Set::template group<WORDS>(from, codes, begin[g])) * scale_of(plane, block, first_group + g);
      float *to = y_plane + cell(block, 0);
      vstore(to, vload<vf>(to) + sum * (1.0f / Set::GROUP_UNIT));
    }
  }

  // acc = Σ ±q, or Σ ±x, over the words [begin, end) of a chunk, of which the tables begin with `part`.
  template <int R>
  void add_words(const uint32_t *w0, int64_t count, int64_t word, int64_t part, int64_t begin, int64_t end,
                 Sum (&acc)[R][T]) const {
    const uint32_t *from = w0 + begin * 16;
    const int64_t stride = count * 16, some = end - begin;
    if constexpr (INT8) {
      int32_t all[T];
      for (int t = 0; t < T; t++) {
        const int32_t *sums = q_sums + t * (words + 1) + word;
        all[t] = sums[end] - sums[begin];
      }
      Isa::template int8<R, T>(from, stride, some, q + (word + begin) * 32, pitch, all, acc);
    } else {
      Isa::template exact<R, T>(from, stride, some, tables + (begin - part) * 128, TABLE_WORDS * 128, acc);
    }
  }

  // A template, for only a set that looks up has the functions.
  template <class Set>
  void look_up(const uint32_t *signs, int plane) {
    for (int64_t word = 0; word < words; word += LOOKUP_WORDS) {
      const int64_t some = least(LOOKUP_WORDS, words - word), pieces = (some + 1) / 2;
      for (int t = 0; t < T; t++)
        Set::lookup_tables(q + t * pitch + word * 32, pieces, reinterpret_cast<uint8_t *>(tables + t * TABLE_FLOATS),
                           sizes + t * (LOOKUP_PIECES + 1));
      const int64_t chunk = word / CHUNK * CHUNK, count = least(CHUNK, words - chunk);
      const uint32_t *w0 = signs + chunk * blocks * 16 + (word - chunk) * 16;
      int64_t block = first;
      for (; block + 12 < last; block += 16) look_up_rows<Set, 4>(w0, count * 16, word, some, block, plane);
      for (; block < last; block += 4) look_up_rows<Set, 1>(w0, count * 16, word, some, block, plane);
    }
  }

  // 4·R blocks of rows, the last of which need not be there.
  template <class Set, int R>
  void look_up_rows(const uint32_t *w0, int64_t stride, int64_t word, int64_t some, int64_t block, int plane) {
    const int64_t there = least(4 * R, last - block), pieces = (some + 1) / 2;
    for (int r = 0; r < R; r++)
      Set::lookup_indices(w0 + (block + 4 * r) * stride, stride, there - 4 * r, some, indices + r * 64, R * 64);
    const int64_t group_pieces = w.groups == 1 ? (words + 1) / 2 : width / 64;
    const int64_t first_group = word / 2 / group_pieces;
    vf scales[LOOKUP_PIECES][4 * R];
    if (w.groups > 1)
      for (int64_t g = first_group; g * group_pieces < word / 2 + pieces; g++)
        for (int64_t b = 0; b < 4 * R; b++)
          scales[g - first_group][b] = b < there ? scale_of(plane, block + b, g) : vf{};
    // What comes next is fetched meanwhile: a token's results, and the words of the next rows.
    const uint32_t *const next = w0 + (block + 4 * R) * stride;
    const int64_t next_blocks = least(4 * R, last - block - 4 * R);
    for (int t = 0; t < T; t++) {
      for (int64_t b = 0; b < there; b++) {
        __builtin_prefetch(y_plane + cell(block + b, t + 1), 1);
        if (b < next_blocks && t < some) __builtin_prefetch(next + b * stride + t * 16);
      }
      const uint8_t *const table = reinterpret_cast<const uint8_t *>(tables + t * TABLE_FLOATS);
      const int32_t *const size = sizes + t * (LOOKUP_PIECES + 1);
      int64_t group = first_group;
      for (int64_t begin = 0; begin < pieces; group++) {
        const int64_t end = least(pieces, (group + 1) * group_pieces - word / 2);
        vf acc[R][4];
        Set::template lookup<R>(table + begin * LOOKUPS * 128, indices + begin * LOOKUPS * R * 64, end - begin,
                                size[end] - size[begin], acc);
        float *to = y_plane + cell(block, t);
        const vf *scale = scales[group - first_group];
        const bool fresh = word + begin == 0; // nothing is there yet
        // With one group the sums are integers below 2²⁴ until add_plane.
#pragma GCC unroll 16
        for (int b = 0; b < 4 * R; b++, to += 16) {
          const vf &sum = acc[b / 4][b % 4];
          vstore(to, (fresh ? vf{} : vload<vf>(to)) + (w.groups == 1 ? sum : sum * scale[b]));
        }
        begin = end;
      }
    }
  }

  // By matrix units, two blocks at a time: a panel of their signs is unpacked once for all tokens.
  template <class Set>
  void multiply_matrix(const uint32_t *signs, int plane) {
    Set::Unit::begin();
    int64_t block = first;
    for (; block + 2 <= last; block += 2) multiply_panels<typename Set::Unit, 2>(signs, block, plane);
    if (block < last) multiply_panels<typename Set::Unit, 1>(signs, block, plane);
    Set::Unit::end();
  }

  template <class Unit, int R>
  void multiply_panels(const uint32_t *signs, int64_t block, int plane) {
    vf scales[PANEL_WORDS / 2][R];
    for (int64_t word = 0; word < words; word += PANEL_WORDS) {
      const int64_t count = least(PANEL_WORDS, words - word), chunk = word / CHUNK * CHUNK;
      const int64_t stride = least(CHUNK, words - chunk) * 16;
      unpack<R>(signs + chunk * blocks * 16 + block * stride + (word - chunk) * 16, stride, count);
      if (w.groups > 1)
        for (int64_t group = word * 32 / width, g = 0; group * width < (word + count) * 32; group++, g++)
          for (int r = 0; r < R; r++) scales[g][r] = scale_of(plane, block + r, group);
      int t = 0;
      for (; t + 16 < some; t += 32) multiply_panel<Unit, 2, R>(word, count, block, t, scales);
      if (t < some) multiply_panel<Unit, 1, R>(word, count, block, t, scales);
    }
  }

  // Signs as bytes of ±1: a tile is two words of a block, eight rows each, of which row p is bit p of every byte, as the
  // codes lie in q. Of a word that is not there the codes are 0: what stands in the panel does not matter.
  template <int R>
  void unpack(const uint32_t *from, int64_t stride, int64_t count) const {
    const vb4 minus = vb4{} - 1, plus = vb4{} + 1;
    for (int64_t word = 0; word < count; word++)
      for (int r = 0; r < R; r++) {
        const vb4 bits = vload<vb4>(from + r * stride + word * 16);
        int8_t *to = panel + (word / 2 * R + r) * 1024 + word % 2 * 512;
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) {
          vb4 bit;
          memset(&bit, 1 << p, sizeof bit);
          vstore(to + p * 64, (bits & bit) != 0 ? plus : minus);
        }
      }
  }

  // A·16 tokens times R blocks. With one group the sums of all panels are integers, which meet in y_integers.
  template <class Unit, int A, int R>
  void multiply_panel(int64_t word, int64_t count, int64_t block, int t, const vf (*scales)[R]) const {
    const int64_t steps = (count + 1) / 2, tile = 16 * 16;
    const int8_t *const codes = q + t * pitch + word * 32;
    int32_t *const to = y_integers + cell(block, t), *const next = y_integers + cell(block + R - 1, t);
    const bool fresh = word == 0; // nothing is there yet
    if (w.groups == 1) {
      if (fresh) Products<Unit, A, R>::zero();
      else Products<Unit, A, R>::load(to, next);
      Products<Unit, A, R>::add(codes, pitch, panel, steps);
      Products<Unit, A, R>::store(to, next);
      return;
    }
    // The processor adds a group's products up while the matrix units, which come first, are at the next group's.
    int64_t group = 0;
    for (int64_t begin = 0, end; begin < steps; begin = end, group++) {
      end = least(steps, ((word * 32 / width + group + 1) * width - word * 32) / 64);
      Products<Unit, A, R>::zero();
      Products<Unit, A, R>::add(codes + begin * 64, pitch, panel + begin * R * 1024, end - begin);
      int32_t *const products = group_products + group % 2 * A * R * tile;
      Products<Unit, A, R>::store(products, products + A * tile);
      if (group > 0) add_products<A, R>(group - 1, scales, fresh && group == 1, to, next);
    }
    add_products<A, R>(group - 1, scales, fresh && group == 1, to, next);
  }

  template <int A, int R>
  void add_products(int64_t group, const vf (*scales)[R], bool fresh, int32_t *to, int32_t *next) const {
    const int32_t *products = group_products + group % 2 * A * R * 256;
    for (int r = 0; r < R; r++) {
      float *sums = reinterpret_cast<float *>(r == 0 ? to : next);
      const vf scale = scales[group][r];
      for (int m = 0; m < A * 16; m++, sums += 16, products += 16)
        vstore(sums, (fresh ? vf{} : vload<vf>(sums)) + __builtin_convertvector(vload<vi>(products), vf) * scale);
    }
  }

  static vf as_floats(const vf &v) { return v; }
  static vf as_floats(const vi &v) { return __builtin_convertvector(v, vf); }

  // What int8 has summed of a plane, times the activations' step.
  void add_plane(int plane) {
    for (int64_t block = first; block < last; block++) {
      const vf scale = w.groups == 1 ? scale_of(plane, block, 0) : splat(1);
      for (int t = 0; t < tokens(); t++) {
        const int64_t at = cell(block, t);
        const bool integers = w.groups == 1 && !LOOKUP;
        const vf sums = integers ? as_floats(vload<vi>(y_integers + at)) : vload<vf>(y_plane + at);
        const vf share = sums * (scale * step[t]);
        vstore(y + at, plane == 0 ? share : vload<vf>(y + at) + share);
      }
    }
  }

  void add_shift() {
    for (int64_t block = first; block < last; block++) {
      vf sums[T] = {};
      for (int64_t g = 0; g < w.groups; g++) {
        const vf shift = load16(w.shift, (block * w.groups + g) * 16, w.float_type);
        for (int t = 0; t < tokens(); t++) sums[t] += shift * group_sums[t * w.groups + g];
      }
      for (int t = 0; t < tokens(); t++) {
        float *at = y + cell(block, t);
        vstore(at, vload<vf>(at) + sums[t]);
      }
    }
  }

  // Salient values replace what stands at their positions. There the sign bits are 0, so the planes have counted
  // −scale·u, the shifts +shift·x and the input shift +in_shift·x: that much is taken back before the value is added.
  void add_salient(uint32_t *columns, uint8_t *codes, float *values) {
    if (INT8 && w.in_scale != nullptr) quantize(x, x_step); // q held the last plane's
    const bool shared = w.in_scale == nullptr;
    gather(x, INT8, values);
    salient_rows(columns, codes, values, INT8, 0, shared ? w.planes : 0, true, false);
    if (!shared)
      for (int plane = 0; plane < w.in_scale_planes; plane++) {
        scale_inputs(plane);
        if (INT8) quantize(u, step);
        gather(u, INT8, values);
        salient_rows(columns, codes, values, INT8, plane, w.in_scale_planes == 1 ? w.planes : plane + 1, false, false);
      }
    if (w.in_shift != nullptr) {
      for (int t = 0; t < T; t++)
        for (int64_t k = 0; k < w.columns; k++)
          u[t * x_pitch + k] = x[t * x_pitch + k] * load(w.in_shift, k, w.float_type);
      gather(u, false, values);
      salient_rows(columns, codes, values, false, 0, 0, false, true);
    }
  }

  // [T][columns] turned to [columns][T]: floats, or the integers in q (as floats: sums of them stay below 2²⁴).
  void gather(const float *from, bool integers, float *values) const {
    for (int t = 0; t < T; t++)
      for (int64_t k = 0; k < w.columns; k++) {
        const int64_t byte = LOOKUP ? k : k / 32 * 32 + k % 8 * 4 + k / 8 % 4;
        values[k * T + t] = integers ? static_cast<float>(q[t * pitch + byte]) : from[t * x_pitch + k];
      }
  }

  int64_t salient_columns(int64_t row, uint32_t *columns) const {
    const int64_t start = w.salient_starts[row];
    int64_t count = 0;
    if (w.salient_counts != nullptr) {
      const int64_t sections = (w.columns + 255) / 256;
      const uint8_t *offset = w.salient_positions + start;
      for (int64_t s = 0; s < sections; s++) {
        const int64_t some = w.salient_counts[row * sections + s];
        for (int64_t e = 0; e < some; e++) columns[count + e] = static_cast<uint32_t>(s * 256 + offset[count + e]);
        count += some;
      }
      return count;
    }
    const int64_t bytes = (w.columns + 7) / 8;
    const uint8_t *bitmap = w.salient_positions + row * bytes;
    for (int64_t byte = 0; byte < bytes; byte += 8) {
      uint64_t mask = 0;
      memcpy(&mask, bitmap + byte, static_cast<size_t>(least(8, bytes - byte)));
      for (; mask != 0; mask &= mask - 1)
        columns[count++] = static_cast<uint32_t>(byte * 8 + __builtin_ctzll(mask));
    }
    return count;
  }

  const uint8_t *salient_codes(int64_t row, int64_t count, uint8_t *codes) const {
    const int64_t start = w.salient_starts[row];
    if (w.salient_bits == 8) return w.salient_codes + start;
    const unsigned mask = (1u << w.salient_bits) - 1;
    int64_t bit = start * w.salient_bits;
    for (int64_t e = 0; e < count; e++, bit += w.salient_bits) {
      const uint8_t *byte = w.salient_codes + bit / 8;
      const int64_t in_byte = bit % 8;
      unsigned code = byte[0] >> in_byte;
      if (in_byte + w.salient_bits > 8) code |= static_cast<unsigned>(byte[1]) << (8 - in_byte);
      codes[e] = static_cast<uint8_t>(code & mask);
    }
    return codes;
  }

  void salient_rows(uint32_t *columns, uint8_t *scratch_codes, const float *values, bool integers, int first_plane,
                    int last_plane, bool whole, bool input_shift) {
    const int64_t end_row = least(last * 16, w.rows);
    for (int64_t row = first * 16; row < end_row; row++) {
      const int64_t count = salient_columns(row, columns);
      const uint8_t *codes = whole ? salient_codes(row, count, scratch_codes) : nullptr;
      const int32_t zero = w.salient_zeros[row];
      float result[T], factor[T];
      double weighted[T] = {};
      for (int t = 0; t < T; t++) {
        result[t] = y[cell(row / 16, t) + row % 16];
        factor[t] = !integers ? 1 : whole ? x_step[t] : step[t];
      }
      int64_t e = 0;
      for (int64_t group = 0; group < w.groups && e < count; group++) {
        const int64_t begin = e;
        if (w.groups == 1) e = count;
        else
          while (e < count && columns[e] < (group + 1) * width) e++;
        if (e == begin) continue;
        double plain[T] = {};
        for (int64_t piece = begin; piece < e; piece += 64) {
          float some[T] = {}, sums[T] = {};
          if (whole) sum_entries<true>(columns, codes, zero, values, piece, least(piece + 64, e), some, sums);
          else sum_entries<false>(columns, codes, zero, values, piece, least(piece + 64, e), some, sums);
          for (int t = 0; t < T; t++) {
            plain[t] += some[t];
            weighted[t] += sums[t];
          }
        }
        float coefficient = 0;
        const int64_t block = row / 16, lane = row % 16;
        for (int p = first_plane; p < last_plane; p++)
          coefficient += w.scale_rows ? load(w.scale, ((p * blocks + block) * w.groups + group) * 16 + lane, w.float_type)
                                      : load(w.scale, p * w.groups + group, w.float_type);
        if (whole && w.shift != nullptr)
          coefficient -= load(w.shift, (block * w.groups + group) * 16 + lane, w.float_type);
        if (input_shift) coefficient -= 1;
        for (int t = 0; t < T; t++) result[t] += static_cast<float>(plain[t]) * (coefficient * factor[t]);
      }
      const float scale = load(w.salient_scale, row, w.float_type);
      for (int t = 0; t < T; t++)
        y[cell(row / 16, t) + row % 16] =
            whole ? result[t] + static_cast<float>(weighted[t]) * (scale * factor[t]) : result[t];
    }
  }

  // Σ v and Σ (code − zero)·v over at most 64 entries [begin, end) of a row: few, so that floats lose little and the
  // integers of int8 nothing (64·255·127 < 2²⁴).
  template <bool CODES>
  static void sum_entries(const uint32_t *columns, const uint8_t *codes, int32_t zero, const float *values,
                          int64_t begin, int64_t end, float *plain, float *weighted) {
    if (T == 1) {
      float p[4] = {}, s[4] = {};
      int64_t e = begin;
      for (; e + 4 <= end; e += 4)
        for (int i = 0; i < 4; i++) {
          const float v = values[columns[e + i]];
          p[i] += v;
          if (CODES) s[i] += v * static_cast<float>(codes[e + i] - zero);
        }
      for (; e < end; e++) {
        const float v = values[columns[e]];
        p[0] += v;
        if (CODES) s[0] += v * static_cast<float>(codes[e] - zero);
      }
      plain[0] += (p[0] + p[1]) + (p[2] + p[3]);
      if (CODES) weighted[0] += (s[0] + s[1]) + (s[2] + s[3]);
      return;
    }
    for (int64_t e = begin; e < end; e++) {
      const float *v = values + static_cast<int64_t>(columns[e]) * T;
      const float code = CODES ? static_cast<float>(codes[e] - zero) : 0;
      for (int t = 0; t < T; t++) {
        plain[t] += v[t];
        if (CODES) weighted[t] += v[t] * code;
      }
    }
  }
};

template <int T, bool INT8, Way WAY = Way::PLANES>
int tiles(const signbit_matrix &w, const signbit_call &call, const Input &input, const Part &part, int64_t token) {
  Tile<T, INT8, WAY> tile(w, call, input, part);
  for (; token + T <= part.last_token; token += T)
    if (!tile.run(token)) return SIGNBIT_NO_MEMORY;
  constexpr int NEXT = T > 8 && T < 16 ? 8 : T / 2;
  constexpr Way NEXT_WAY = NEXT >= LEAST_LOOKUP_TOKENS ? WAY : Way::PLANES;
  if constexpr (NEXT > 0) return tiles<NEXT, INT8, NEXT_WAY>(w, call, input, part, token);
  return SIGNBIT_OK;
}

inline bool pairs_share_scales(const signbit_matrix &w) { // pairs of words
  return w.groups == 1 || w.columns / w.groups % 64 == 0;
}

template <class Set>
int linear(const signbit_matrix &w, const signbit_call &call, const Input &input, const Part &part) {
  if (call.activations != SIGNBIT_INT8) return tiles<Set::EXACT_TOKENS, false>(w, call, input, part, part.first_token);
  if constexpr (Set::LOOKUP_TOKENS > 0)
    if (pairs_share_scales(w)) return tiles<Set::LOOKUP_TOKENS, true, Way::LOOKUP>(w, call, input, part, part.first_token);
  return tiles<Set::INT8_TOKENS, true>(w, call, input, part, part.first_token);
}

// Int8 for many tokens by matrix units. The tokens that are left, and all else, by the kernels of another set: salient
// values, too, for they are gathered one by one, for fewer tokens at a time.
template <class Set>
int linear_by_matrix(const signbit_matrix &w, const signbit_call &call, const Input &input, Part part,
                     const Kernels &others) {
  if (call.activations == SIGNBIT_INT8 && pairs_share_scales(w) && w.salient_codes == nullptr) {
    Tile<MATRIX_TOKENS, true, Way::MATRIX> tile(w, call, input, part);
    for (; part.last_token - part.first_token >= LEAST_MATRIX_TOKENS; part.first_token += tile.some) {
      tile.some = static_cast<int>(least(MATRIX_TOKENS, part.last_token - part.first_token));
      if (!tile.run(part.first_token)) return SIGNBIT_NO_MEMORY;
    }
  }
  return part.first_token < part.last_token ? others.linear(w, call, input, part) : SIGNBIT_OK;
}

// Rows of an int8 matrix that stay in the second-level cache while all tokens pass; so many tokens, whose floats and codes are
// kept beside them.
constexpr int64_t PANEL_BYTES = 256 * 1024, PASSING_TOKENS = 256;

template <int R, int T>
void float_dots(const int8_t *codes, int64_t columns, const float *x, int64_t padded, float (&sums)[R][T]) {
  vf acc[R][T] = {};
  int64_t k = 0;
  for (; k + 16 <= columns; k += 16) {
    vf c[R];
    for (int r = 0; r < R; r++) c[r] = __builtin_convertvector(vload<vb>(codes + r * columns + k), vf);
    for (int t = 0; t < T; t++) {
      const vf v = vload<vf>(x + t * padded + k);
      for (int r = 0; r < R; r++) acc[r][t] += c[r] * v;
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      sums[r][t] = total(acc[r][t]);
      for (int64_t i = k; i < columns; i++) sums[r][t] += static_cast<float>(codes[r * columns + i]) * x[t * padded + i];
    }
}

template <int R, int T>
void integer_dots(const int8_t *codes, int64_t columns, const int8_t *q, int64_t padded, float (&sums)[R][T]) {
  int32_t whole[R][T] = {};
  const int64_t most = columns / 64 * 64;
  Isa::template dot<R, T>(codes, columns, q, padded, most, whole);
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      for (int64_t k = most; k < columns; k++) whole[r][t] += codes[r * columns + k] * q[t * padded + k];
      sums[r][t] = static_cast<float>(whole[r][t]);
    }
}

template <int R, int T>
void int8_tile(const signbit_int8_matrix &w, bool integers, const float *x, const int8_t *q, const float *step,
               int64_t padded, int64_t row, int64_t token, int64_t first, int64_t count, float *y) {
  float sums[R][T];
  const int8_t *codes = w.codes + row * w.columns;
  if (integers) integer_dots<R, T>(codes, w.columns, q + token * padded, padded, sums);
  else float_dots<R, T>(codes, w.columns, x + token * padded, padded, sums);
  for (int r = 0; r < R; r++) {
    const float scale = load(w.scale, row + r, w.float_type);
    for (int t = 0; t < T; t++) y[(token + t) * count + row + r - first] = sums[r][t] * (scale * step[token + t]);
  }
}

template <int R>
void int8_rows(const signbit_int8_matrix &w, bool integers, const float *x, const int8_t *q, const float *step,
               int64_t padded, int64_t row, int64_t tokens, int64_t first, int64_t count, float *y) {
  int64_t token = 0;
  for (; token + Isa::HEAD_TOKENS <= tokens; token += Isa::HEAD_TOKENS)
    int8_tile<R, Isa::HEAD_TOKENS>(w, integers, x, q, step, padded, row, token, first, count, y);
  for (; token < tokens; token++) int8_tile<R, 1>(w, integers, x, q, step, padded, row, token, first, count, y);
}

template <class Set>
int int8_pass(const signbit_int8_matrix &w, const signbit_call &call, const Input &input, const Part &part) {
  const bool integers = call.activations == SIGNBIT_INT8;
  const int64_t tokens = part.last_token - part.first_token;
  const int64_t padded = (w.columns + 31) / 32 * 32, panel = PANEL_BYTES / padded / 4 * 4 + 4;
  const int64_t wide = least(panel, part.last_row - part.first_row);
  void *piece = scratch(static_cast<size_t>(
      Memory::bytes<float>(tokens * padded) + Memory::bytes<int8_t>(tokens * padded) + Memory::bytes<float>(tokens) +
      Memory::bytes<float>(tokens * wide)));
  if (piece == nullptr) return SIGNBIT_NO_MEMORY;
  Memory memory{static_cast<char *>(piece)};
  float *x = memory.take<float>(tokens * padded);
  int8_t *q = memory.take<int8_t>(tokens * padded);
  float *step = memory.take<float>(tokens), *y = memory.take<float>(tokens * wide);
  for (int64_t t = 0; t < tokens; t++) {
    read_token(call, input.x, (part.first_token + t) * input.stride, w.columns, padded, x + t * padded);
    step[t] = integers ? quantize_token<false>(x + t * padded, padded, q + t * padded, nullptr) : 1;
  }
  for (int64_t first = part.first_row; first < part.last_row; first += wide) {
    const int64_t last = least(first + wide, part.last_row), count = last - first;
    int64_t row = first;
    for (; row + Set::HEAD_ROWS <= last; row += Set::HEAD_ROWS)
      int8_rows<Set::HEAD_ROWS>(w, integers, x, q, step, padded, row, tokens, first, count, y);
    for (; row < last; row++) int8_rows<1>(w, integers, x, q, step, padded, row, tokens, first, count, y);
    for (int64_t t = 0; t < tokens; t++)
      write_token(call, input, part.first_token + t, w.rows, first, last, y + t * count);
  }
  return SIGNBIT_OK;
}

template <class Set>
int int8_linear(const signbit_int8_matrix &w, const signbit_call &call, const Input &input, const Part &all) {
  Part part = all;
  for (; part.first_token < all.last_token; part.first_token = part.last_token) {
    part.last_token = least(part.first_token + PASSING_TOKENS, all.last_token);
    if (const int error = int8_pass<Set>(w, call, input, part)) return error;
  }
  return SIGNBIT_OK;
}
