// bf16, fp32 or e4m3 tensors as the words that matmul.h multiplies.

#pragma once

#include "matmul.h"

namespace {

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

typedef uint8_t e4m3;

// W elements of T as they are in memory.
template <class T>
struct LanesOf {
  typedef Vec type;
};
template <>
struct LanesOf<bf16> {
  typedef Half type;
};
template <>
struct LanesOf<e4m3> {
  typedef Byte type;
};
template <class T>
using Lanes = typename LanesOf<T>::type;

inline Vec wide(Vec x) { return x; }
inline Vec wide(Half x) { return from_bf16(x); }
inline Vec wide(Byte x) { return from_e4m3(x); }

template <class T>
inline Lanes<T> rounded(Vec x) {
  if constexpr (sizeof(T) == 1)
    return to_e4m3(x);
  else if constexpr (sizeof(T) == 2)
    return to_bf16(x);
  else
    return x;
}

// W elements; if n is less than W, n elements and then zeros.
template <class T>
inline Lanes<T> read(const T* from, int64_t n) {
  Lanes<T> x = {};
  if (n >= W)
    x = load<Lanes<T>>(from);
  else
    memcpy(&x, from, n * sizeof(T));
  return x;
}

template <class T>
inline void write(T* to, Lanes<T> x, int64_t n) {
  if (n >= W)
    store(to, x);
  else
    memcpy(to, &x, n * sizeof(T));
}

constexpr int AHEAD = 4096;  // bytes: how far ahead of the widening main memory is prefetched

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  return load<float>(&bits);
}

// W words from the elements at ``from``; zeros after the n-th element.
template <class T>
inline Word load_words(const T* from, int64_t n) {
  alignas(64) T some[W * PER_WORD<T>] = {};
  if (n < W * PER_WORD<T>) {
    memcpy(some, from, n * sizeof(T));
    from = some;
  }
  if constexpr (WIDEN<T>)
    return (Word)from_bf16(load<Half>(from));
  else
    return load<Word>(from);
}

// n elements as words, in whole vectors: up to W - 1 words more than n needs.
template <class T>
inline void copy_words(void* to, const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += W * PER_WORD<T>) {
    fetch(from + i + AHEAD / sizeof(T));
    store((uint32_t*)to + i / PER_WORD<T>, load_words(from + i, n - i));
  }
}

#if defined(__AVX512BF16__)
// The e4m3 from 0 to 127, as bf16.
struct Widened {
  uint16_t bits[128];
  constexpr Widened() : bits{0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60} {
    for (int i = 8; i < 127; ++i) bits[i] = uint16_t((i << 4) + 0x3C00);
    bits[127] = 0x7FC0;
  }
};
alignas(64) constexpr Widened WIDENED;

// 32 bf16 from n e4m3, or from the first 32; then zeros.
inline __m512i widened(const e4m3* from, int64_t n) {
  e4m3 some[32] = {};
  if (n < 32) from = (const e4m3*)memcpy(some, from, n);
  const __m512i x = _mm512_cvtepu8_epi16(load<__m256i>(from));
  auto in_table = [&](const uint16_t* table) {  // of 64, by the low bits
    return _mm512_permutex2var_epi16(load<__m512i>(table), x, load<__m512i>(table + 32));
  };
  const __mmask32 upper = _mm512_test_epi16_mask(x, _mm512_set1_epi16(0x40));
  const __m512i size = _mm512_mask_blend_epi16(upper, in_table(WIDENED.bits), in_table(WIDENED.bits + 64));
  return _mm512_or_si512(size, _mm512_and_si512(_mm512_slli_epi16(x, 8), _mm512_set1_epi16(int16_t(0x8000))));
}
#endif

// n e4m3 as words of T: in whole vectors, as `copy_words` has them.
template <class T>
inline void widen_words(void* to, const e4m3* from, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (PER_WORD<T> == 2) {
    for (int64_t i = 0; i < n; i += 32) store((bf16*)to + i, widened(from + i, n - i));
    return;
  }
#endif
  for (int64_t i = 0; i < n; i += W) store((float*)to + i, wide(read(from + i, n - i)));
}

// Store the first n lanes of a vector, rounded to T.
template <class T>
inline void store_rounded(T* to, Vec x, int64_t n) {
  alignas(64) T some[W];
  if constexpr (sizeof(T) == 2)
    store(some, to_bf16(x));
  else
    store(some, x);
  if (n >= W)
    memcpy(to, some, sizeof some);
  else
    memcpy(to, some, n * sizeof(T));
}

#if defined(__AVX512BF16__)
// Indices that interleave 32 + 32 halves (a0, b0, a1, b1, ...): for the first 32 results, and for the others.
struct Order {
  uint16_t index[2][32];
  constexpr Order() : index() {
    for (int i = 0; i < 64; ++i) index[i / 32][i % 32] = uint16_t(i / 2 + i % 2 * 32);
  }
};
alignas(64) constexpr Order ORDER;

// Words (low[i], high[i]) from n bf16 of each of two rows.
inline void interleave(uint32_t* to, const bf16* low, const bf16* high, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int k = 0; k < 2; ++k)
      store(to + i + 16 * k,
            _mm512_permutex2var_epi16(load<__m512i>(low + i), load<__m512i>(ORDER.index[k]), load<__m512i>(high + i)));
  for (; i < n; ++i) to[i] = low[i] | (uint32_t)high[i] << 16;
}

// Words of two vectors of fp32, rounded.
inline Word interleave(Vec low, Vec high) {
  __m512i a = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(low));
  __m512i b = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(high));
  return (Word)_mm512_permutex2var_epi16(a, load<__m512i>(ORDER.index[0]), b);
}

// Words (low[i], high[i]) from n e4m3 of each of two rows, in whole vectors.
inline void interleave(uint32_t* to, const e4m3* low, const e4m3* high, int64_t n) {
  for (int64_t i = 0; i < n; i += 32) {
    const __m512i a = widened(low + i, n - i), b = widened(high + i, n - i);
    store(to + i, _mm512_permutex2var_epi16(a, load<__m512i>(ORDER.index[0]), b));
    if (n - i > 16) store(to + i + 16, _mm512_permutex2var_epi16(a, load<__m512i>(ORDER.index[1]), b));
  }
}
#endif

// [words in a row, lanes] from ``rows`` rows of n elements. Lane l is row(l); lanes past the last row are 0.
template <class T, class Row>
inline void pack(float* to, int64_t rows, int64_t n, Row row) {
  const int64_t words = parts(n, PER_WORD<T>), lanes = parts(rows, W) * W;
  for (int64_t m = 0; m < lanes; m += W)
    for (int64_t w = 0; w < words; w += W) {
      Word x[W] = {};
      for (int64_t l = 0; l < smaller(W, rows - m); ++l)
        x[l] = load_words((const T*)row(m + l) + w * PER_WORD<T>, n - w * PER_WORD<T>);
      transpose(x);
      for (int64_t i = 0; i < smaller(W, words - w); ++i) store(to + (w + i) * lanes + m, x[i]);
    }
}

// ``rows`` rows of n elements, at row(l), from f(lane, x) of each x in [n, lanes].
template <class T, class Row, class F>
inline void unpack(const float* from, int64_t lanes, int64_t rows, int64_t n, Row row, F f) {
  for (int64_t m = 0; m < lanes; m += W)
    for (int64_t d = 0; d < n; d += W) {
      Word x[W] = {};
      for (int64_t i = 0; i < smaller(W, n - d); ++i) x[i] = (Word)f(m, load<Vec>(from + (d + i) * lanes + m));
      transpose(x);
      for (int64_t l = 0; l < smaller(W, rows - m); ++l) store_rounded((T*)row(m + l) + d, (Vec)x[l], n - d);
    }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// f(Count<n>) for n in [1, MOST].
template <int MOST, class F>
inline void with_count(int64_t n, F f) {
  if constexpr (MOST > 1)
    if (n < MOST) return with_count<MOST - 1>(n, f);
  f(Count<MOST>());
}

// f(Count<NR>, first) for groups of at most MOST_VECTORS of ``vectors``.
template <class F>
inline void in_groups(int64_t vectors, F f) {
  int64_t v = 0;
  for (; v + MOST_VECTORS <= vectors; v += MOST_VECTORS) f(Count<MOST_VECTORS>(), v);
  if (MOST_VECTORS == 3 && vectors - v == 2) f(Count<2>(), v);
  if (vectors - v == 1) f(Count<1>(), v);
}

}  // namespace
