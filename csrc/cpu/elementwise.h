// Kernels that read their input once, row by row, and are bound by memory: norm, gate and rotation (reference.rms_norm,
// reference.swiglu, reference.rope).

#pragma once

#include "api.h"
#include "words.h"

namespace {

// f(i, count) for each vector of n elements; ``count`` is W, or less in the last.
template <class F>
inline void vectors(int64_t n, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, n - i);
}

template <class T, bool RESIDUAL>
inline void normalise(const T* x, const T* residual, const T* weight, T* y, T* sum, int64_t width, double eps) {
  constexpr int SUMS = 4;  // with one, each addition would wait for the last; it would also be less exact
  Vec total[SUMS] = {};
  auto square = [&](int64_t i, int64_t n) {
    Lanes<T> h = read(x + i, n);
    if (RESIDUAL) write(sum + i, h = rounded<T>(wide(h) + wide(read(residual + i, n))), n);
    return wide(h) * wide(h);
  };
  int64_t i = 0;
  for (; i + SUMS * W <= width; i += SUMS * W)
#pragma GCC unroll 4
    for (int s = 0; s < SUMS; ++s) total[s] += square(i + s * W, W);
  vectors(width - i, [&](int64_t j, int64_t n) { total[0] += square(i + j, n); });
  // In fp64: an error here would be an error of every element of the row.
  double lane[W];
  for (int l = 0; l < W; ++l) lane[l] = (total[0][l] + total[1][l]) + (total[2][l] + total[3][l]);
  for (int step = W / 2; step; step /= 2)
    for (int l = 0; l < step; ++l) lane[l] += lane[l + step];
  const Vec scale = all(float(1.0 / sqrt(lane[0] / double(width) + eps)));
  const T* h = RESIDUAL ? sum : x;
  vectors(width, [&](int64_t i, int64_t n) {
    Vec normed = wide(read(h + i, n)) * scale;
    if (sizeof(T) == 2) normed = rounded_to_bf16(normed);  // before it multiplies the weight, as LLaDA does
    write(y + i, rounded<T>(normed * wide(read(weight + i, n))), n);
  });
}

template <class T>
void rms_norm(const void* arguments, int64_t task) {
  const RmsNorm& a = *(const RmsNorm*)arguments;
  for (int64_t r = task * a.chunk; r < smaller(a.rows, (task + 1) * a.chunk); ++r) {
    const T *x = (const T*)a.x + r * a.x_stride, *weight = (const T*)a.weight;
    T *y = (T*)a.y + r * a.width, *sum = (T*)a.sum + r * a.width;
    if (a.residual)
      normalise<T, true>(x, (const T*)a.residual + r * a.residual_stride, weight, y, sum, a.width, a.eps);
    else
      normalise<T, false>(x, nullptr, weight, y, nullptr, a.width, a.eps);
  }
}

// x / (1 + e^-x), from e^-|x|, which cannot overflow; for |x| above 87 it is taken as 0.
inline Vec silu(Vec x) {
  const Vec negative = (Vec)((Word)x | 0x80000000u);
  const Vec shifted = negative * LOG2E + MAGIC, n = shifted - MAGIC;
  // n ln 2 is subtracted in two parts, the first of them exact: a single one would lose digits of a large x.
  const Vec e = exp2_parts(shifted, ((negative - n * 0.693359375f) + n * 2.12194440e-4f) * LOG2E);
  const Vec small = choose(negative > -87.0f, e, Vec{});
  return x * (choose(x < 0.0f, small, all(1.0f)) / (small + 1.0f));
}

template <class T>
void swiglu(const void* arguments, int64_t task) {
  const SwiGlu& a = *(const SwiGlu*)arguments;
  for (int64_t r = task * a.chunk; r < smaller(a.rows, (task + 1) * a.chunk); ++r) {
    const T *gate = (const T*)a.gate + r * a.gate_stride, *up = (const T*)a.up + r * a.up_stride;
    T* out = (T*)a.out + r * a.width;
    vectors(a.width, [&](int64_t i, int64_t n) {
      write(out + i, rounded<T>(silu(wide(read(gate + i, n))) * wide(read(up + i, n))), n);
    });
  }
}

// Rotate ``heads`` heads of 2 * half elements by the angles of one position: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1
// sin).
template <class T, class C>
inline void rotate(C* to, int64_t to_stride, const T* from, int64_t stride, int64_t heads, int64_t half,
                   const float* cos, const float* sin) {
  for (; heads > 0; --heads, to += to_stride, from += stride)
    vectors(half, [&](int64_t i, int64_t n) {
      const Vec c = read(cos + i, n), s = read(sin + i, n);
      const Vec x1 = wide(read(from + i, n)), x2 = wide(read(from + half + i, n));
      write(to + i, rounded<C>(x1 * c - x2 * s), n);
      write(to + half + i, rounded<C>(x2 * c + x1 * s), n);
    });
}

// With keys and values of dtype C: T, or e4m3.
template <class T, class C>
void rope_into(const Rope& a, int64_t task) {
  const int64_t D = a.head_dim;
  for (int64_t r = task * a.chunk; r < smaller(a.batch * a.queries, (task + 1) * a.chunk); ++r) {
    const int64_t b = r / a.queries, t = r % a.queries;
    // Negative positions are padding.
    const int64_t position = smaller(larger((a.position ? a.position[b] : 0) + t, 0), a.positions - 1);
    const float *cos = a.cos + position * a.cos_stride, *sin = a.sin + position * a.sin_stride;
    auto row = [&](const void* x, const int64_t (&stride)[3]) { return (T*)x + b * stride[0] + t * stride[1]; };
    rotate((T*)a.out + r * a.heads * D, D, row(a.q, a.q_stride), a.q_stride[2], a.heads, D / 2, cos, sin);
    const int64_t slot = (a.slot ? a.slot[b] : 0) + t;
    if (slot < 0 || slot >= a.slots) continue;
    const int64_t to = a.row ? a.row[b] : b;
    auto place = [&](void* x, const int64_t (&stride)[3]) { return (C*)x + to * stride[0] + slot * stride[1]; };
    C* key = place(a.keys, a.keys_stride);
    rotate(key, a.keys_stride[2], row(a.k, a.k_stride), a.k_stride[2], a.kv_heads, D / 2, cos, sin);
    for (int64_t g = 0; a.v && g < a.kv_heads; ++g) {
      const T* from = row(a.v, a.v_stride) + g * a.v_stride[2];
      C* value = place(a.values, a.values_stride) + g * a.values_stride[2];
      vectors(D, [&](int64_t i, int64_t n) {
        if constexpr (sizeof(C) == sizeof(T))
          write(value + i, read(from + i, n), n);
        else
          write(value + i, rounded<C>(wide(read(from + i, n))), n);
      });
    }
  }
}

template <class T>
void rope(const void* arguments, int64_t task) {
  const Rope& a = *(const Rope*)arguments;
  if (a.e4m3)
    rope_into<T, e4m3>(a, task);
  else
    rope_into<T, T>(a, task);
}

}  // namespace
