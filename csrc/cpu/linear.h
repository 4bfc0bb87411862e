// x W^T + b: rows of x are lanes, rows of W are read once, where they lie, on their way from main memory.

#pragma once

#include "api.h"
#include "words.h"

namespace {

constexpr int ROWS_OF_X = 48;  // of a panel of x, packed
constexpr int STRETCH = 256;   // words of a sum that is made before it is added: one sum of all would be less exact
constexpr int COLUMNS = 64;    // of a task: its rows of W, and a panel, are in the second cache

template <class T>
const float* panel_of(const Linear& a, int64_t panel) {
  return a.packed + panel * ROWS_OF_X * parts(a.inputs, PER_WORD<T>);
}

template <class T>
void pack_linear(const void* arguments, int64_t panel) {
  const Linear& a = *(const Linear*)arguments;
  const int64_t first = panel * ROWS_OF_X;
  pack<T>((float*)panel_of<T>(a, panel), smaller(ROWS_OF_X, a.rows - first), a.inputs,
          [&](int64_t l) { return (const T*)a.x + (first + l) * a.x_stride; });
}

// Rows of W as words, in ``wide`` where they cannot be multiplied as they are; returns where they are, and sets the
// bytes between them.
template <class T>
const char* rows_as_words(const T* weight, int64_t stride, int64_t rows, int64_t inputs, float* wide, int64_t& step) {
  if (!WIDEN<T> && inputs % PER_WORD<T> == 0) {
    step = stride * sizeof(T);
    return (const char*)weight;
  }
  const int64_t width = parts(parts(inputs, PER_WORD<T>), W) * W;
  for (int64_t i = 0; i < rows; ++i) copy_words(wide + i * width, weight + i * stride, inputs);
  step = width * sizeof(float);
  return (const char*)wide;
}

// out [rows, lanes] = first(i) + rows of W times packed x [words, lanes]. After the last of the rows, those that follow
// them are fetched.
template <class T, class First>
void times_weights(float* out, int64_t rows, const char* weight, int64_t row, const float* x, int64_t lanes,
                   int64_t words, First first) {
  // Of the words alone: a row's sum is the same whatever the other rows are.
  const int64_t stretch = larger(16, parts(parts(words, larger(1, parts(words, STRETCH))), 16) * 16);
  int64_t s = 0;
  do {
    const bool last = s + stretch >= words;
    const char* next = last ? weight + rows * row : weight + (s + stretch) * 4;
    in_groups(lanes / W, [&](auto count, int64_t vector) {
      constexpr int NR = decltype(count)::value;
      product<T, NR, true>(
          rows, weight + s * 4, row, 4, x + s * lanes + vector * W, lanes, last ? words - s : stretch, next,
          [](int64_t, int) { return Vec{}; },
          [&](int64_t i, int c, Vec y) {
            float* to = out + i * lanes + (vector + c) * W;
            store(to, y + (s ? load<Vec>(to) : first(i)));
          });
    });
    s += stretch;
  } while (s < words);
}

template <class T>
void linear(const void* arguments, int64_t task) {
  const Linear& a = *(const Linear*)arguments;
  const int64_t panels = parts(a.rows, ROWS_OF_X), panel = task % panels, column = task / panels * COLUMNS;
  const int64_t first = panel * ROWS_OF_X, rows = smaller(ROWS_OF_X, a.rows - first), lanes = parts(rows, W) * W;
  const int64_t columns = smaller(COLUMNS, a.outputs - column), words = parts(a.inputs, PER_WORD<T>);
  float* out = (float*)scratch(sizeof(float) * COLUMNS * (lanes + words + W));
  int64_t step;
  const char* weight = rows_as_words((const T*)a.weight + column * a.w_stride, a.w_stride, columns, a.inputs,
                                     out + COLUMNS * lanes, step);
  times_weights<T>(out, columns, weight, step, panel_of<T>(a, panel), lanes, words,
                   [&](int64_t i) { return a.bias ? all(widen(((const T*)a.bias)[column + i])) : Vec{}; });
  unpack<T>(
      out, lanes, rows, columns, [&](int64_t l) { return (T*)a.out + (first + l) * a.outputs + column; },
      [](int64_t, Vec y) { return y; });
}

}  // namespace
