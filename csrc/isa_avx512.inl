// Sixteen lanes are one register. Included by isa_avx512.cpp, by isa_amx.cpp, which also has matrix units, and by
// isa_emulated.cpp, where the intrinsics are plain C++.

struct Avx512 {
  static constexpr int EXACT_TOKENS = 8, INT8_TOKENS = 12, LOOKUP_TOKENS = 32, HEAD_ROWS = 4, HEAD_TOKENS = 4;
  static constexpr int GROUP_WORDS = 8, GROUP_UNIT = 4;

  static vf half(const uint16_t *from) {
    return vf(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from))));
  }

  static vb narrow(const vi &v) { return vb(_mm512_cvtepi32_epi8(__m512i(v))); }

  // vpermps takes the low four bits of each lane as an index into 16 floats: one lookup adds four weights of 16 rows.
  template <int R, int T>
  static void exact(const uint32_t *w, int64_t stride, int64_t words, const float *tables, int64_t table_stride,
                    vf (&result)[R][T]) {
    constexpr int CHAINS = R * T == 1 ? 4 : R * T <= 4 ? 2 : 1; // additions that need not wait for each other
    __m512 acc[R][T][CHAINS];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++)
        for (int c = 0; c < CHAINS; c++) acc[r][t][c] = _mm512_setzero_ps();
    for (int64_t word = 0; word < words; word++) {
      __m512i index[R];
      for (int r = 0; r < R; r++) index[r] = _mm512_loadu_si512(w + r * stride + word * 16);
      if (T == 1) prefetch(w + word * 16);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) {
        for (int t = 0; t < T; t++) {
          const __m512 table = _mm512_loadu_ps(tables + t * table_stride + (word * 8 + i) * 16);
          for (int r = 0; r < R; r++)
            acc[r][t][i % CHAINS] = _mm512_add_ps(acc[r][t][i % CHAINS], _mm512_permutexvar_ps(index[r], table));
        }
        for (int r = 0; r < R; r++) index[r] = _mm512_srli_epi32(index[r], 4);
      }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        for (int c = 1; c < CHAINS; c++) acc[r][t][0] = _mm512_add_ps(acc[r][t][0], acc[r][t][c]);
        result[r][t] = vf(acc[r][t][0]);
      }
  }

  template <int R, int T>
  static void int8(const uint32_t *w, int64_t stride, int64_t words, const int8_t *q, int64_t q_stride,
                   const int32_t (&all)[T], vi (&result)[R][T]) {
    // As many sums as registers allow; but a short group would spend its time on adding them up.
    constexpr int SUMS = R * T == 1 ? 8 : R * T <= 4 ? 4 : R * T <= 8 ? 2 : 1;
    if (SUMS == 8 && words <= 8) planes<R, T, 4>(w, stride, words, q, q_stride, all, result);
    else planes<R, T, SUMS>(w, stride, words, q, q_stride, all, result);
  }

  // Bit p of each byte is left where it is, worth 2ᵖ, and has a sum of its own that is shifted at the end: two
  // instructions for 64 weights. With fewer sums than planes the bits move by so many places, and one place up from
  // where they lie, so that a set bit counts 2: a sum that begins at −Σq ends as Σ ±q.
  template <int R, int T, int SUMS>
  static void planes(const uint32_t *w, int64_t stride, int64_t words, const int8_t *q, int64_t q_stride,
                     const int32_t (&all)[T], vi (&result)[R][T]) {
    constexpr int UP = SUMS < 8 ? 1 : 0;
    __m512i acc[R][T][SUMS], mask[SUMS];
    for (int s = 0; s < SUMS; s++) mask[s] = _mm512_set1_epi8(static_cast<char>(1 << (s + UP)));
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        acc[r][t][0] = UP ? _mm512_set1_epi32(-all[t]) : _mm512_setzero_si512();
        for (int s = 1; s < SUMS; s++) acc[r][t][s] = _mm512_setzero_si512();
      }
    for (int64_t word = 0; word < words; word++) {
      __m512i bits[R];
      for (int r = 0; r < R; r++) bits[r] = _mm512_loadu_si512(w + r * stride + word * 16);
      if (T == 1) prefetch(w + word * 16);
#pragma GCC unroll 8
      for (int p = 0; p < 8; p++) {
        const int s = p % SUMS, down = p - s - UP;
        __m512i plane[R];
        for (int r = 0; r < R; r++) {
          const __m512i moved = down < 0 ? _mm512_slli_epi32(bits[r], 1) : _mm512_srli_epi32(bits[r], down);
          plane[r] = _mm512_and_si512(moved, mask[s]);
        }
        for (int t = 0; t < T; t++) {
          const __m512i four = _mm512_set1_epi32(load32(q + t * q_stride + word * 32 + p * 4));
          for (int r = 0; r < R; r++) acc[r][t][s] = _mm512_dpbusd_epi32(acc[r][t][s], plane[r], four);
        }
      }
    }
    // Every acc[…][s] is a multiple of 2ˢ, so the shifts lose nothing.
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        for (int s = 1; s < SUMS; s++) acc[r][t][0] = _mm512_add_epi32(acc[r][t][0], _mm512_srai_epi32(acc[r][t][s], s));
        result[r][t] = UP ? vi(acc[r][t][0]) : 2 * vi(acc[r][t][0]) - all[t];
      }
  }

  // 4·Σ ±q over WORDS words of one token, where begin = −4·Σq. As in `planes`, but for sums that soon meet: bits p and,
  // after one shift, p + 4 of all bytes share one, worth 2ᵖ. Three of these four fit 16 bits (2²·127·8·WORDS < 2¹⁵), so
  // that one vpdpwssd multiplies each and adds it to the fourth.
  template <int WORDS>
  static vi group(const uint32_t *w, const int8_t *q, int32_t begin) {
    static_assert(WORDS <= GROUP_WORDS);
    __m512i acc[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_set1_epi32(begin)};
#pragma GCC unroll 8
    for (int word = 0; word < WORDS; word++) {
      const __m512i low = _mm512_loadu_si512(w + word * 16), high = _mm512_srli_epi32(low, 4);
      prefetch(w + word * 16);
#pragma GCC unroll 8
      for (int p = 0; p < 8; p++) {
        const __m512i plane = _mm512_and_si512(p < 4 ? low : high, _mm512_set1_epi8(static_cast<char>(1 << p % 4)));
        acc[p % 4] = _mm512_dpbusd_epi32(acc[p % 4], plane, _mm512_set1_epi32(load32(q + word * 32 + p * 4)));
      }
    }
    for (int s = 0; s < 3; s++) acc[3] = _mm512_dpwssd_epi32(acc[3], acc[s], _mm512_set1_epi32(8 >> s));
    return vi(acc[3]);
  }

  // Int8 for several tokens: vpermb looks 64 rows up in a table of 64 sums of six codes, 384 products at once, where
  // vpdpbusd multiplies 64. A piece is 64 columns: ten sixes and a four. With n₊ the codes whose sign the bit shares,
  // Σ ±q = 2·Σ_{n₊}|q| − Σ|q|, and Σ_{n₊}|q| ≤ 6·127 goes into two tables of bytes, its low five bits and the rest.
  // What lookup_tables permutes by. A triple is three columns; a table of six is the sums of its two triples' eights.
  struct TableOrder {
    // 16-bit lane 8i + e of vector v, column j: where in [max(q, 0), max(−q, 0)] lies what bit j of e counts in triple
    // 4v + i. The last triple has one column: its other bits count nothing.
    uint8_t from[6][3][64];
    uint64_t some[6][3]; // which bytes: not the upper ones of the lanes
    uint16_t even[32], odd[32]; // the upper triple's eight, each for eight lanes: packs of bytes take turns between both
  };

  static constexpr TableOrder table_order() {
    TableOrder order{};
    for (int lane = 0; lane < 32; lane++) {
      for (int v = 0; v < 6; v++)
        for (int j = 0; j < 3; j++) {
          const int column = (4 * v + lane / 8) * 3 + j;
          if (column > 63) continue;
          order.from[v][j][2 * lane] = static_cast<uint8_t>(column + (lane >> j & 1 ? 0 : 64));
          order.some[v][j] |= uint64_t(1) << 2 * lane;
        }
      order.even[lane] = static_cast<uint16_t>(lane / 8 * 2);
      order.odd[lane] = static_cast<uint16_t>(lane / 8 * 2 + 1);
    }
    return order;
  }

  // q [64·pieces] to tables [pieces][11][low, high][64]; `sizes` [pieces + 1] counts Σ|q| up.
  static void lookup_tables(const int8_t *q, int64_t pieces, uint8_t *tables, int32_t *sizes) {
    alignas(64) static constexpr TableOrder ORDER = table_order();
    const __m512i zero = _mm512_setzero_si512(), five = _mm512_set1_epi16(31);
    const __m512i even = _mm512_loadu_si512(ORDER.even), odd = _mm512_loadu_si512(ORDER.odd);
    sizes[0] = 0;
    for (int64_t piece = 0; piece < pieces; piece++, q += 64) {
      const __m512i codes = _mm512_loadu_si512(q);
      const __m512i plus = _mm512_max_epi8(codes, zero), minus = _mm512_max_epi8(_mm512_sub_epi8(zero, codes), zero);
      const __m512i fours = _mm512_dpbusd_epi32(zero, _mm512_add_epi8(plus, minus), _mm512_set1_epi8(1));
      sizes[piece + 1] = sizes[piece] + _mm512_reduce_add_epi32(fours);
      alignas(64) uint16_t eights[24][8];
      for (int v = 0; v < 6; v++) {
        __m512i sum = zero;
        for (int j = 0; j < 3; j++)
          sum = _mm512_add_epi16(sum, _mm512_maskz_permutex2var_epi8(
                                          ORDER.some[v][j], plus, _mm512_loadu_si512(ORDER.from[v][j]), minus));
        _mm512_store_si512(eights[4 * v], sum);
      }
      asm("" : "+m"(eights)); // loads broadcast for nothing; the compiler would take them out of registers
      for (int i = 0; i < LOOKUPS; i++, tables += 128) {
        const __m512i first = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(eights[2 * i])));
        const __m512i second =
            _mm512_castsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i *>(eights[2 * i + 1])));
        const __m512i a = _mm512_add_epi16(first, _mm512_permutexvar_epi16(even, second));
        const __m512i b = _mm512_add_epi16(first, _mm512_permutexvar_epi16(odd, second));
        _mm512_storeu_si512(tables, _mm512_packus_epi16(_mm512_and_si512(a, five), _mm512_and_si512(b, five)));
        _mm512_storeu_si512(tables + 64, _mm512_packus_epi16(_mm512_srli_epi16(a, 5), _mm512_srli_epi16(b, 5)));
      }
    }
  }

  // Four blocks of rows at w, w + stride …, of which `blocks` are there, as indices [pieces][11][step]: byte 4r + b is
  // row r of block b. vpermb takes six bits of a byte, so that what else stands in it does not matter.
  static void lookup_indices(const uint32_t *w, int64_t stride, int64_t blocks, int64_t words, uint8_t *to,
                             int64_t step) {
    for (int64_t word = 0; word < words; word += 2) {
      __m512i first[4], second[4];
      for (int b = 0; b < 4; b++) {
        first[b] = b < blocks ? _mm512_loadu_si512(w + b * stride + word * 16) : _mm512_setzero_si512();
        second[b] = b < blocks && word + 1 < words ? _mm512_loadu_si512(w + b * stride + (word + 1) * 16)
                                                   : _mm512_setzero_si512();
      }
#pragma GCC unroll 11
      for (int i = 0; i < LOOKUPS; i++, to += step) {
        __m512i at[4];
        for (int b = 0; b < 4; b++) {
          const int bit = i * 6 - b * 8; // to be moved to bit 0; by a vector, for not every build unrolls
          at[b] = bit < 0    ? _mm512_sllv_epi32(first[b], _mm512_set1_epi32(-bit))
                  : bit < 32 ? _mm512_shrdv_epi32(first[b], second[b], _mm512_set1_epi32(bit))
                             : _mm512_srlv_epi32(second[b], _mm512_set1_epi32(bit - 32));
        }
        const __m512i pair = _mm512_mask_blend_epi8(0x2222222222222222u, at[0], at[1]);
        const __m512i other = _mm512_mask_blend_epi8(0x8888888888888888u, at[2], at[3]);
        _mm512_storeu_si512(to, _mm512_mask_blend_epi8(0xccccccccccccccccu, pair, other));
      }
    }
  }

  // acc[r][b] = Σ ±q of block b of the r-th four blocks, exact, over at most 256 columns, where all = Σ|q|.
  template <int R>
  static void lookup(const uint8_t *tables, const uint8_t *indices, int64_t pieces, int32_t all, vf (&acc)[R][4]) {
    // A sum of pairs of bytes as 16 bits, and one of the odd bytes alone: the even bytes' is what is left of the first.
    __m512i low_pairs[R], low_odd[R], high_pairs[R], high_odd[R];
    for (int r = 0; r < R; r++) low_pairs[r] = low_odd[r] = high_pairs[r] = high_odd[r] = _mm512_setzero_si512();
    for (int64_t piece = 0; piece < pieces; piece++) {
      __m512i low[R], high[R];
#pragma GCC unroll 11
      for (int i = 0; i < LOOKUPS; i++, tables += 128, indices += R * 64) {
        const __m512i a = _mm512_loadu_si512(tables), b = _mm512_loadu_si512(tables + 64);
        for (int r = 0; r < R; r++) {
          const __m512i index = _mm512_loadu_si512(indices + r * 64);
          const __m512i x = _mm512_permutexvar_epi8(index, a), y = _mm512_permutexvar_epi8(index, b);
          low[r] = i == 0 || i == 8 ? x : _mm512_add_epi8(low[r], x); // 8·31 < 256
          high[r] = i == 0 ? y : _mm512_add_epi8(high[r], y);          // 10·23 + 15 < 256
          in_register(low[r]), in_register(high[r]); // else the compiler adds up as a tree, and registers do not suffice
          if (i == 7 || i == 10) {
            low_pairs[r] = _mm512_add_epi16(low_pairs[r], low[r]);
            low_odd[r] = _mm512_add_epi16(low_odd[r], _mm512_srli_epi16(low[r], 8));
          }
          if (i == 10) {
            high_pairs[r] = _mm512_add_epi16(high_pairs[r], high[r]);
            high_odd[r] = _mm512_add_epi16(high_odd[r], _mm512_srli_epi16(high[r], 8));
          }
        }
      }
    }
    // Doubled, 2·256·127 < 2¹⁶. A float of 2²³ + n has the bits of n beside those of its exponent.
    const __m512i half = _mm512_set1_epi32(0xffff), exponent = _mm512_set1_epi32(0x4b000000);
    const vf base = splat(8388608.0f + static_cast<float>(all));
    for (int r = 0; r < R; r++) {
      const __m512i odd = _mm512_add_epi16(_mm512_slli_epi16(low_odd[r], 1), _mm512_slli_epi16(high_odd[r], 6));
      const __m512i pairs = _mm512_add_epi16(_mm512_slli_epi16(low_pairs[r], 1), _mm512_slli_epi16(high_pairs[r], 6));
      const __m512i even = _mm512_sub_epi16(pairs, _mm512_slli_epi16(odd, 8));
      acc[r][0] = vf(_mm512_ternarylogic_epi32(even, half, exponent, 0xea)) - base; // (even & half) | exponent
      acc[r][1] = vf(_mm512_ternarylogic_epi32(odd, half, exponent, 0xea)) - base;
      acc[r][2] = vf(_mm512_or_si512(_mm512_srli_epi32(even, 16), exponent)) - base;
      acc[r][3] = vf(_mm512_or_si512(_mm512_srli_epi32(odd, 16), exponent)) - base;
    }
  }

  // dpbusd wants an unsigned side: codes + 128, and 128·Σq taken back.
  template <int R, int T>
  static void dot(const int8_t *codes, int64_t stride, const int8_t *q, int64_t q_stride, int64_t columns,
                  int32_t (&sums)[R][T]) {
    __m512i acc[R][T], plain[T];
    for (int t = 0; t < T; t++) {
      plain[t] = _mm512_setzero_si512();
      for (int r = 0; r < R; r++) acc[r][t] = _mm512_setzero_si512();
    }
    const __m512i high = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t k = 0; k < columns; k += 64) {
      __m512i c[R];
      for (int r = 0; r < R; r++) c[r] = _mm512_xor_si512(_mm512_loadu_si512(codes + r * stride + k), high);
      for (int t = 0; t < T; t++) {
        const __m512i some = _mm512_loadu_si512(q + t * q_stride + k);
        plain[t] = _mm512_dpbusd_epi32(plain[t], high, some);
        for (int r = 0; r < R; r++) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], c[r], some);
      }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) sums[r][t] += _mm512_reduce_add_epi32(_mm512_sub_epi32(acc[r][t], plain[t]));
  }

  // One token goes through the weights faster than the processor fetches ahead by itself: 4 KiB further on.
  static void prefetch(const uint32_t *w) { _mm_prefetch(reinterpret_cast<const char *>(w) + 4096, _MM_HINT_T0); }

  // Where the compiler should not look behind a value; the emulated one is in no register.
  static void in_register([[maybe_unused]] __m512i &value) {
#if defined(__AVX512F__)
    asm("" : "+v"(value));
#endif
  }

  static int32_t load32(const int8_t *from) {
    int32_t value;
    memcpy(&value, from, 4);
    return value;
  }
};
