// The one product that everything here is made of: rows of words, each broadcast, times vectors of lanes.
//
//     c[i][l] = sum_s a[i][s] b[s][l]        a: 32-bit words in memory as they are;  b: packed, lanes contiguous
//
// A word is an fp32, or two neighbouring bf16 of the sum where the CPU multiplies those (vdpbf16ps). The lanes are
// query rows in attention and rows of x in a product, so that keys, values and weights are read where they lie, and
// sums and maxima over slots or over the vocabulary need nothing across lanes.

#pragma once

#include "vec.h"

namespace {

typedef uint16_t bf16;

#if defined(__AVX512BF16__)
template <class T>
constexpr int PER_WORD = 4 / sizeof(T);
#else
template <class T>
constexpr int PER_WORD = 1;  // bf16 is widened to fp32 on the way
#endif

// What has to be widened before its words can be multiplied.
template <class T>
constexpr bool WIDEN = sizeof(T) * PER_WORD<T> < 4;

template <class T>
inline Vec multiply_add(Vec c, const char* word, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (PER_WORD<T> == 2) {
    int32_t pair;
    memcpy(&pair, word, 4);
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
#endif
  float x;
  memcpy(&x, word, 4);
  return c + all(x) * b;
}

// Rows of a that share a load of NR vectors of b: as many accumulators as there are registers for, and enough to hide
// the latency of the multiplications.
template <int NR>
constexpr int ROWS = MANY_REGISTERS ? (NR == 1 ? 16 : 8) : (NR == 1 ? 8 : 4);
constexpr int MOST_VECTORS = 3;  // NR is 1, 2 or 3

// Where a's rows are. From main memory, the rows to come are fetched while these are multiplied.
enum From { CACHE, MEMORY };

template <class T, int MR, int NR, From FROM, class Init, class Done>
inline __attribute__((always_inline)) void block(int64_t first, const char* a, int64_t row, int64_t step,
                                                 const float* b, int64_t b_step, int64_t steps, Init init, Done done) {
  Vec c[MR][NR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
    for (int n = 0; n < NR; ++n) c[i][n] = init(first + i, n);
  const char* base[(MR + 3) / 4];  // a pointer for every four rows: with one each there are too few registers
#pragma GCC unroll 4
  for (int i = 0; i < MR; i += 4) base[i / 4] = a + (first + i) * row;
  const int64_t stretch = FROM == MEMORY ? 16 : steps;  // words of a cache line
  for (; steps > 0; steps -= stretch) {
    if (FROM == MEMORY)
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) __builtin_prefetch(base[i / 4] + (MR + i % 4) * row);
    for (int64_t s = 0; s < smaller(stretch, steps); ++s) {
      Vec x[NR];
#pragma GCC unroll 3
      for (int n = 0; n < NR; ++n) x[n] = load<Vec>(b + n * W);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const char* word = base[i / 4] + (i % 4) * row;
#pragma GCC unroll 3
        for (int n = 0; n < NR; ++n) c[i][n] = multiply_add<T>(c[i][n], word, x[n]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < MR; i += 4) base[i / 4] += step;
      b += b_step;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
    for (int n = 0; n < NR; ++n) done(first + i, n, c[i][n]);
}

// c[i][n] starts as init(i, n) and is handed to done(i, n, c), for i in [0, rows).
template <class T, int NR, From FROM = CACHE, class Init, class Done>
inline void product(int64_t rows, const char* a, int64_t row, int64_t step, const float* b, int64_t b_step,
                    int64_t steps, Init init, Done done) {
  constexpr int MR = ROWS<NR>;
  int64_t i = 0;
  for (; i + MR <= rows; i += MR) block<T, MR, NR, FROM>(i, a, row, step, b, b_step, steps, init, done);
  if (MR > 4)
    for (; i + 4 <= rows; i += 4) block<T, 4, NR, FROM>(i, a, row, step, b, b_step, steps, init, done);
  for (; i < rows; ++i) block<T, 1, NR, FROM>(i, a, row, step, b, b_step, steps, init, done);
}

}  // namespace
