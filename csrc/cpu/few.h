// A few rows of x times rows of W. Lanes are rows of W, which are transposed in registers.
//
// With so few rows most lanes of matmul.h would be idle. Sums are made in the same order as there, so that a row's
// result has the same bits however many rows there are.

#pragma once

#include "words.h"

namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of two bf16 must be the lower half of a word");

constexpr int COLUMNS_AT_ONCE = 16;  // rows of W: enough sums to hide the latency of a multiplication
constexpr int GROUPS = COLUMNS_AT_ONCE / W;
constexpr int LINE = 64;  // bytes of a cache line

// The most rows of x. With half of the lanes of matmul.h in use, its idle lanes cost no more than transposing. If
// weights have to be widened, matmul.h reads them twice, which costs more. There are no registers for more than 6 rows.
template <class T>
constexpr int FEW = WIDEN<T> || W > 8 ? 6 : W / 2;

// ``rows`` if they are few, else 0.
template <class T>
inline int64_t if_few(int64_t rows) {
  return rows <= FEW<T> ? rows : 0;
}

// Words for matmul.h in one word of memory: two if bf16 is widened.
template <class T>
constexpr int STEPS = WIDEN<T> ? 2 : 1;

// [words, rows] from ``rows`` rows of n elements; row(l) is the l-th.
template <class T, class Row>
inline void pack_few(float* to, int64_t rows, int64_t n, Row row) {
  for (int64_t l = 0; l < rows; ++l) {
    const T* from = (const T*)row(l);
    for (int64_t i = 0; i < n; i += PER_WORD<T>) {
      float* x = to + i / PER_WORD<T> * rows + l;
      T word[PER_WORD<T>] = {};
      memcpy(word, from + i, smaller(PER_WORD<T>, n - i) * sizeof(T));
      if constexpr (WIDEN<T>)
        *x = widen(word[0]);
      else
        memcpy(x, word, sizeof word);
    }
  }
}

// c[r] += n elements of each lane's row of W, times row r of x [words, R]. With WHOLE, all lanes have a row and n is
// the number of elements in a vector; else only the first ``columns`` lanes have one.
template <class T, int R, bool WHOLE>
inline __attribute__((always_inline)) void add_tile(Vec (&c)[R], const T* weight, int64_t w_stride, const float* x,
                                                    int64_t columns, int64_t n) {
  Word w[W];
#pragma GCC unroll 16
  for (int l = 0; l < W; ++l) {
    if (WHOLE) {
      w[l] = load<Word>(weight + l * w_stride);
    } else {
      w[l] = Word{};
      if (l < columns) memcpy(&w[l], weight + l * w_stride, n * sizeof(T));
    }
  }
  transpose(w);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
#pragma GCC unroll 2
    for (int k = 0; k < STEPS<T>; ++k) {
      const int word = i * STEPS<T> + k;
      if (!WHOLE && word * PER_WORD<T> >= n) return;
      const Word lanes = STEPS<T> == 1 ? w[i] : k ? w[i] & 0xFFFF0000u : w[i] << 16;
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) c[r] = multiply_add<T>(c[r], (const char*)(x + word * R + r), (Vec)lanes);
    }
}

// out [columns, lanes] = bias + rows of W times x [words, R], for at most COLUMNS_AT_ONCE columns; the following rows
// of W are prefetched. Row r of x is lane r of out; rows from ``half`` on are in the second half of the lanes. Each
// stretch is summed by itself, and the sums are added in order. Not inlined: see `block`.
template <class T, int R>
__attribute__((noinline)) void few_columns(float* out, int64_t columns, const T* weight, int64_t w_stride,
                                           const T* bias, const float* x, int64_t half, int64_t lanes, int64_t inputs,
                                           int64_t stretch) {
  constexpr int64_t TILE = W * 4 / sizeof(T), STEP = LINE / sizeof(T);
  constexpr int TILES = STEP / TILE;
  const int64_t ahead = smaller(AHEAD / sizeof(T), inputs);
  Vec total[GROUPS][R];
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; ++g) {
    Vec first = {};
    for (int64_t l = 0; bias && l < smaller(W, columns - g * W); ++l) first[l] = widen(bias[g * W + l]);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) total[g][r] = first;
  }
  for (int64_t low = 0; low < inputs; low += stretch) {
    const int64_t high = smaller(low + stretch, inputs);
    const int64_t whole = columns < COLUMNS_AT_ONCE ? low : low + (high - low) / TILE * TILE;
    Vec c[GROUPS][R] = {};
    for (int64_t line = low; line < whole; line += STEP) {
      const T* next = weight + line + ahead + (line + ahead < inputs ? 0 : COLUMNS_AT_ONCE * w_stride - inputs);
      // Each tile asks for its share of the lines to come. Asked for all at once, they would hold up the tiles' own loads.
      auto tile = [&](int g, int t) __attribute__((always_inline)) {
        const int64_t i = line + t * TILE;
        const int first = g * W + t * (W / TILES);
#pragma GCC unroll 16
        for (int l = first; l < first + W / TILES; ++l) fetch(next + l * w_stride);
        if (i < whole)
          add_tile<T, R, true>(c[g], weight + g * W * w_stride + i, w_stride, x + i / PER_WORD<T> * R, W, TILE);
      };
      // Sums of different columns in turns do not wait for one another. But rows a multiple of 4096 bytes apart share one
      // set of the first cache, which would lose a line before its second tile.
      if (w_stride * sizeof(T) % 4096 == 0) {
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g)
#pragma GCC unroll 4
          for (int t = 0; t < TILES; ++t) tile(g, t);
      } else {
#pragma GCC unroll 4
        for (int t = 0; t < TILES; ++t)
#pragma GCC unroll 4
          for (int g = 0; g < GROUPS; ++g) tile(g, t);
      }
    }
    for (int64_t i = whole; i < high; i += TILE)
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; ++g)
        add_tile<T, R, false>(c[g], weight + g * W * w_stride + i, w_stride, x + i / PER_WORD<T> * R, columns - g * W,
                              smaller(TILE, high - i));
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g)
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) total[g][r] = c[g][r] + total[g][r];
  }
  for (int64_t i = 0; i < columns; ++i)
    for (int r = 0; r < R; ++r) out[i * lanes + (r < half ? r : lanes / 2 + r - half)] = total[i / W][r][i % W];
}

// The same for any number of columns and for ``rows`` rows of x; lanes without a row are 0.
template <class T>
void few_times_weights(float* out, int64_t columns, const T* weight, int64_t w_stride, const T* bias, const float* x,
                       int64_t rows, int64_t half, int64_t lanes, int64_t inputs, int64_t stretch) {
  memset(out, 0, sizeof(float) * columns * lanes);
  with_count<FEW<T>>(rows, [&](auto count) {
    for (int64_t i = 0; i < columns; i += COLUMNS_AT_ONCE)
      few_columns<T, decltype(count)::value>(out + i * lanes, smaller(COLUMNS_AT_ONCE, columns - i),
                                             weight + i * w_stride, w_stride, bias ? bias + i : nullptr, x, half, lanes,
                                             inputs, stretch);
  });
}

}  // namespace
