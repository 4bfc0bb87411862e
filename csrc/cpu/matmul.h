// The matmul that everything here is made of: rows of words, each broadcast, times vectors of lanes.
//
//     c[i][l] = sum_s a[i][s] b[s][l]        a: 32-bit words, in place in memory;  b: packed, lanes contiguous
//
// A word is an fp32; or, if the CPU multiplies pairs of bf16 (vdpbf16ps), two bf16 that are neighbours in the sum.
// Lanes are query rows in attention and rows of x in a linear, so keys, values and weights are read in place, and sums
// and maxima over slots or the vocabulary never cross lanes.

#pragma once

#include "vec.h"

namespace {

typedef uint16_t bf16;

#if defined(__AVX512BF16__)
template <class T>
constexpr int PER_WORD = 4 / sizeof(T);
#else
template <class T>
constexpr int PER_WORD = 1;  // bf16 is widened to fp32 first
#endif

// Whether elements must be widened before they can be multiplied.
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

// Vectors of b that are multiplied at once, and rows of a that share them: enough accumulators to hide the latency of a
// multiplication, and few enough to leave registers for the rest.
constexpr int MOST_VECTORS = MANY_REGISTERS ? 3 : 2;
template <int NR>
constexpr int ROWS = MANY_REGISTERS ? (NR == 1 ? 16 : 8) : (NR == 1 ? 8 : 6);

// Not inlined: inside a larger function GCC 12 keeps the accumulators in memory.
template <class T, int MR, int NR, bool FETCH, int PART, class Init, class Done>
__attribute__((noinline)) void block(int64_t first, const char* a, int64_t row, int64_t step, const float* b,
                                     int64_t b_step, int64_t steps, const char* next, Init init, Done done) {
  Vec c[MR][NR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
    for (int n = 0; n < NR; ++n) c[i][n] = init(first + i, n);
  const char* base[(MR + 3) / 4];  // a pointer for every four rows: one for each would take too many registers
#pragma GCC unroll 4
  for (int i = 0; i < MR; i += 4) base[i / 4] = a + (first + i) * row;
  Vec total[MR][NR] = {};
  const int64_t stretch = FETCH ? 16 : PART ? PART : steps;  // 16 words: a cache line
  for (; steps > 0; steps -= stretch) {
    if (FETCH) {
      for (int i = 0; i < MR; ++i) fetch(next + i * row);
      next += stretch * step;
    }
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
    if (PART) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
        for (int n = 0; n < NR; ++n) {
          total[i][n] += c[i][n];
          c[i][n] = Vec{};
        }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 3
    for (int n = 0; n < NR; ++n) done(first + i, n, PART ? total[i][n] : c[i][n]);
}

// For i in [0, rows), c[i][n] starts as init(i, n) and is passed to done(i, n, c). With PART, every PART words are
// summed by themselves and the sums are added, which is more exact. With FETCH, the rows that follow are prefetched
// from main memory while rows are multiplied; during the last rows, those at ``next``.
template <class T, int NR, bool FETCH = false, int PART = 0, class Init, class Done>
inline void matmul(int64_t rows, const char* a, int64_t row, int64_t step, const float* b, int64_t b_step,
                    int64_t steps, const char* next, Init init, Done done) {
  constexpr int MR = ROWS<NR>;
  int64_t i = 0;
  // Rows that are a multiple of 4096 bytes apart share one set of the L1 cache, which has no room for 16.
  if (MR == 16 && row % 4096 == 0)
    for (; i + 8 <= rows; i += 8)
      block<T, 8, NR, FETCH, PART>(i, a, row, step, b, b_step, steps, i + 8 < rows ? a + (i + 8) * row : next, init, done);
  for (; i + MR <= rows; i += MR)
    block<T, MR, NR, FETCH, PART>(i, a, row, step, b, b_step, steps, i + MR < rows ? a + (i + MR) * row : next, init, done);
  if (MR > 4)
    for (; i + 4 <= rows; i += 4) block<T, 4, NR, false, PART>(i, a, row, step, b, b_step, steps, next, init, done);
  for (; i < rows; ++i) block<T, 1, NR, false, PART>(i, a, row, step, b, b_step, steps, next, init, done);
}

}  // namespace
