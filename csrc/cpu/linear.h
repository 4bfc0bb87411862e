// x W^T + b. Rows of x are lanes, unless there are few; rows of W are read once, in place, as they come from main
// memory.

#pragma once

#include "api.h"
#include "few.h"

namespace {

constexpr int ROWS_OF_X = 48;  // in a panel of x, packed
constexpr int STRETCH = 256;   // words that are summed before they are added: a single sum would be less exact
constexpr int COLUMNS = 64;    // in a task: its rows of W and a panel fit in the L2 cache

template <class T>
const float* panel_of(const Linear& a, int64_t panel) {
  return a.packed + panel * ROWS_OF_X * parts(a.inputs, PER_WORD<T>);
}

template <class T>
void pack_linear(const void* arguments, int64_t panel) {
  const Linear& a = *(const Linear*)arguments;
  const int64_t first = panel * ROWS_OF_X, rows = smaller(ROWS_OF_X, a.rows - first);
  auto row = [&](int64_t l) { return (const T*)a.x + (first + l) * a.x_stride; };
  float* to = (float*)panel_of<T>(a, panel);
  if (if_few<T>(rows))
    pack_few<T>(to, rows, a.inputs, row);
  else
    pack<T>(to, rows, a.inputs, row);
}

// Rows of W as words, copied to ``wide`` if they cannot be multiplied in place. Returns their address, and sets
// ``step`` to the bytes from row to row.
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

// Words in a stretch. It depends only on the number of words, so that a row's sum does not depend on other rows.
inline int64_t stretch_of(int64_t words) {
  return larger(16, parts(parts(words, larger(1, parts(words, STRETCH))), 16) * 16);
}

// out [rows, lanes] = first(i) + rows of W times packed x [words, lanes]. While the last rows are multiplied, the rows
// that follow are prefetched.
template <class T, class First>
void lanes_times_weights(float* out, int64_t rows, const char* weight, int64_t row, const float* x, int64_t lanes,
                         int64_t words, int64_t stretch, First first) {
  int64_t s = 0;
  do {
    const bool last = s + stretch >= words;
    const char* next = last ? weight + rows * row : weight + (s + stretch) * 4;
    in_groups(lanes / W, [&](auto count, int64_t vector) {
      constexpr int NR = decltype(count)::value;
      matmul<T, NR, true>(
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

// out [columns, lanes] = bias + rows of W times packed x. ``wide`` has room for the rows of W as words. If ``few`` is
// not 0, x is that many rows, packed by `pack_few`; rows from ``half`` on are in the second half of the lanes.
template <class T>
void times_weights(float* out, int64_t columns, const T* weight, int64_t w_stride, const T* bias, const float* x,
                   int64_t few, int64_t half, int64_t lanes, int64_t inputs, float* wide) {
  const int64_t words = parts(inputs, PER_WORD<T>), stretch = stretch_of(words);
  if (few)
    return few_times_weights(out, columns, weight, w_stride, bias, x, few, half, lanes, inputs, stretch * PER_WORD<T>);
  int64_t step;
  const char* as_words = rows_as_words(weight, w_stride, columns, inputs, wide, step);
  lanes_times_weights<T>(out, columns, as_words, step, x, lanes, words, stretch,
                         [&](int64_t i) { return bias ? all(widen(bias[i])) : Vec{}; });
}

template <class T>
void linear(const void* arguments, int64_t task) {
  const Linear& a = *(const Linear*)arguments;
  const int64_t panels = parts(a.rows, ROWS_OF_X), panel = task % panels, column = task / panels * COLUMNS;
  const int64_t first = panel * ROWS_OF_X, rows = smaller(ROWS_OF_X, a.rows - first), lanes = parts(rows, W) * W;
  const int64_t columns = smaller(COLUMNS, a.outputs - column);
  const T* bias = a.bias ? (const T*)a.bias + column : nullptr;
  float* out = (float*)scratch(sizeof(float) * COLUMNS * (lanes + parts(a.inputs, PER_WORD<T>) + W));
  times_weights(out, columns, (const T*)a.weight + column * a.w_stride, a.w_stride, bias, panel_of<T>(a, panel),
                if_few<T>(rows), rows, lanes, a.inputs, out + COLUMNS * lanes);
  unpack<T>(
      out, lanes, rows, columns, [&](int64_t l) { return (T*)a.out + (first + l) * a.outputs + column; },
      [](int64_t, Vec y) { return y; });
}

}  // namespace
