// Two halves of eight lanes each. Included by isa_avx2.cpp and isa_avxvnni.cpp, which differ in how bytes are multiplied.

struct Isa {
  static constexpr int EXACT_TOKENS = 4, INT8_TOKENS = 4, LOOKUP_TOKENS = 0, GROUP_WORDS = 0;
  static constexpr int HEAD_ROWS = 2, HEAD_TOKENS = 2;

  static vf half(const uint16_t *from) {
    vf v;
    for (int h = 0; h < 2; h++)
      _mm256_storeu_ps(reinterpret_cast<float *>(&v) + 8 * h,
                       _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 8 * h))));
    return v;
  }

  // The packs work on halves of 128 bits: the 32-bit lanes come out as 0 and 8, 4 and 12, in both halves.
  static vb narrow(const vi &v) {
    const __m256i *from = reinterpret_cast<const __m256i *>(&v);
    const __m256i words = _mm256_packs_epi32(_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1));
    const __m256i bytes = _mm256_packs_epi16(words, words);
    return vb(_mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5))));
  }

  // vpermps looks up eight floats by three bits; the fourth bit chooses between the two halves of the table.
  template <int R, int T>
  static void exact(const uint32_t *w, int64_t stride, int64_t words, const float *tables, int64_t table_stride,
                    vf (&result)[R][T]) {
    constexpr int CHAINS = T == 1 ? 4 : T == 2 ? 2 : 1; // short sums: nothing waits, and less is rounded
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 2; h++) {
        __m256 acc[T][CHAINS];
        for (int t = 0; t < T; t++)
          for (int c = 0; c < CHAINS; c++) acc[t][c] = _mm256_setzero_ps();
        for (int64_t word = 0; word < words; word++) {
          __m256i index = load256(w + r * stride + word * 16 + h * 8);
#pragma GCC unroll 8
          for (int i = 0; i < 8; i++) {
            const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
            for (int t = 0; t < T; t++) {
              const float *table = tables + t * table_stride + (word * 8 + i) * 16;
              const __m256 sums = _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index),
                                                   _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index), high);
              acc[t][i % CHAINS] = _mm256_add_ps(acc[t][i % CHAINS], sums);
            }
            index = _mm256_srli_epi32(index, 4);
          }
        }
        for (int t = 0; t < T; t++) {
          float *to = reinterpret_cast<float *>(&result[r][t]) + 8 * h;
          for (int c = 1; c < CHAINS; c++) acc[t][0] = _mm256_add_ps(acc[t][0], acc[t][c]);
          _mm256_storeu_ps(to, acc[t][0]);
        }
      }
  }

  template <int R, int T>
  static void int8(const uint32_t *w, int64_t stride, int64_t words, const int8_t *q, int64_t q_stride,
                   const int32_t (&all)[T], vi (&result)[R][T]) {
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 2; h++) {
        Bytes acc[T];
        for (int64_t word = 0; word < words; word++) {
          const __m256i bits = load256(w + r * stride + word * 16 + h * 8);
#pragma GCC unroll 8
          for (int p = 0; p < 8; p++) {
            const __m256i plane = Bytes::plane(bits, p);
            for (int t = 0; t < T; t++) {
              int32_t four;
              memcpy(&four, q + t * q_stride + word * 32 + p * 4, 4);
              acc[t].add(plane, p, _mm256_set1_epi32(four));
            }
          }
        }
        for (int t = 0; t < T; t++) {
          int32_t *to = reinterpret_cast<int32_t *>(&result[r][t]) + 8 * h;
          const __m256i twice = _mm256_slli_epi32(acc[t].sums(), 1);
          _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm256_sub_epi32(twice, _mm256_set1_epi32(all[t])));
        }
      }
  }

  // |code| times q with the sign of the code: |code| ≤ 128 is unsigned, and no pair of products passes 16 bits.
  template <int R, int T>
  static void dot(const int8_t *codes, int64_t stride, const int8_t *q, int64_t q_stride, int64_t columns,
                  int32_t (&sums)[R][T]) {
    __m256i acc[R][T];
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) acc[r][t] = _mm256_setzero_si256();
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t k = 0; k < columns; k += 32)
      for (int r = 0; r < R; r++) {
        const __m256i c = load256(codes + r * stride + k), size = _mm256_abs_epi8(c);
        for (int t = 0; t < T; t++) {
          const __m256i some = _mm256_sign_epi8(load256(q + t * q_stride + k), c);
          acc[r][t] = _mm256_add_epi32(acc[r][t], _mm256_madd_epi16(_mm256_maddubs_epi16(size, some), ones));
        }
      }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        int32_t lanes[8];
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(lanes), acc[r][t]);
        for (int i = 0; i < 8; i++) sums[r][t] += lanes[i];
      }
  }

 private:
  static __m256i load256(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }
};
