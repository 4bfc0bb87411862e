// Vectors of fp32 lanes, as wide as the instruction set this file is compiled for.
//
// kernels.cpp is compiled once for each instruction set. Everything it includes is in an unnamed namespace, and it uses
// no templates or inline functions of the standard library: the linker would merge their copies and keep one, perhaps
// with instructions that this CPU does not have.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;  // SSE2 or NEON
#endif
constexpr bool MANY_REGISTERS = W == 16;

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Int __attribute__((vector_size(4 * W)));
typedef uint32_t Word __attribute__((vector_size(4 * W)));
typedef uint16_t Half __attribute__((vector_size(2 * W)));
typedef uint8_t Byte __attribute__((vector_size(W)));

template <class To, class From>
inline To load(const From* from) {
  To x;
  memcpy(&x, from, sizeof x);
  return x;
}

template <class To, class X>
inline void store(To* to, X x) {
  memcpy(to, &x, sizeof x);
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline Vec all(float x) { return x - Vec{}; }  // 0 + x would not keep -0

inline Vec choose(Int mask, Vec yes, Vec no) { return mask ? yes : no; }

// The larger of each lane; b if either is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return choose(a > b, a, b);
#endif
}

inline Vec to_float(Word x) { return __builtin_convertvector(x, Vec); }

// Intrinsics, because GCC 12 splits vector conversions in two.
inline Word to_words(Half x) {
#if defined(__AVX512F__)
  return (Word)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (Word)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Word);
#endif
}

inline Word to_words(Byte x) {
#if defined(__AVX512F__)
  return (Word)_mm512_cvtepu8_epi32((__m128i)x);
#elif defined(__AVX2__)
  return (Word)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&x));
#else
  return __builtin_convertvector(x, Word);
#endif
}

inline Half to_halves(Word x) {  // below 2^16
#if defined(__AVX512F__)
  return (Half)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  return __builtin_convertvector(x, Half);
#endif
}

inline Byte to_bytes(Word x) {  // below 2^8
#if defined(__AVX512F__)
  return (Byte)_mm512_cvtepi32_epi8((__m512i)x);
#elif defined(__AVX2__)
  const __m128i halves = (__m128i)to_halves(x);
  const __m128i bytes = _mm_packus_epi16(halves, halves);
  return load<Byte>(&bytes);
#else
  return __builtin_convertvector(x, Byte);
#endif
}

inline Vec from_bf16(Half x) { return (Vec)(to_words(x) << 16); }

// Words whose upper halves are x as bf16, rounded to the nearest, ties to even. A quiet NaN stays a NaN.
inline Word nearest_bf16(Vec x) {
  const Word bits = (Word)x;
  return x == x ? bits + (((bits >> 16) & 1) + 0x7FFF) : bits;
}

// The CPU's own instruction treats numbers below 2^-126 as 0.
inline Half to_bf16(Vec x) {
#if defined(__AVX512BF16__)
  return (Half)_mm512_cvtneps_pbh(x);
#else
  return to_halves(nearest_bf16(x) >> 16);
#endif
}

inline Vec rounded_to_bf16(Vec x) {
#if defined(__AVX512BF16__)
  return from_bf16(to_bf16(x));
#else
  return (Vec)(nearest_bf16(x) & 0xFFFF0000u);
#endif
}

// e4m3, 4 bits of exponent and 3 after the first of a number. Below 2^-6 they count steps of 2^-9; 127 is NaN.
inline Vec from_e4m3(Byte x) {
  const Word bits = to_words(x), size = bits & 0x7F;
  const Vec steps = __builtin_convertvector((Int)size, Vec) * 0x1p-9f;
  const Word normal = (size << 20) + (120u << 23);
  const Word found = size < 8 ? (Word)steps : normal, nan = (Word)(size == 127) & 0x7FC00000u;
  return (Vec)(found | nan | (bits & 0x80) << 24);
}

// To the nearest, ties to even, saturated at 448. NaN stays NaN.
inline Byte to_e4m3(Vec x) {
  const Vec sized = (Vec)((Word)x & 0x7FFFFFFFu), size = choose(sized > 448.0f, all(448.0f), sized);
  const Word bits = (Word)size;
  const Word normal = ((bits + (((bits >> 20) & 1) + 0x7FFFF)) >> 20) - (120 << 3);
  const Word steps = (Word)(size + 0x1p14f) - (141u << 23);  // an fp32 between 2^14 and 2^15 counts steps of 2^-9
  const Word found = size < 0x1p-6f ? steps : normal;
  return to_bytes(found | ((Word)(x != x) & 0x7F) | ((Word)x >> 24 & 0x80));
}

// Prefetch the cache line at x into the L2 cache: in the L1 cache it would evict lines that are being read now.
inline void fetch(const void* x) {
  __builtin_prefetch(x, 0, 2);
  asm volatile("");  // without it GCC finds that the function has no effect and drops its calls
}

constexpr float LOG2E = 1.4426950408889634f;

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: the sum with it has the rounded number in its low bits

// 2^(n + f) for -126 <= n <= 126, |f| <= 1/2 and ``shifted`` MAGIC + n: n into the exponent bits, 2^f by a minimax
// polynomial.
inline Vec exp2_parts(Vec shifted, Vec f) {
  Vec p = all(1.535336203e-4f);
  p = p * f + 1.339887448e-3f;
  p = p * f + 9.618437358e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472029e-1f;
  p = p * f + 1.0f;
  return (Vec)((Int)p + ((Int)shifted << 23));
}

// 2^x for x <= 126, exactly 0 from -127 down, within 1.3 * 2^-24 relative above -126; NaN for NaN.
inline Vec exp2_small(Vec x) {
  x = larger(all(-127.0f), x);
  const Vec shifted = x + MAGIC;
  // The low bits of some NaNs, shifted into the exponent, would give a number; x - x is 0 or NaN.
  return exp2_parts(shifted, x - (shifted - MAGIC)) + (x - x);
}

// tanh x, within 3 * 2^-24 relative; NaN for NaN. Near 0 a minimax polynomial, since the quotient would cancel there.
inline Vec tanh(Vec x) {
  const Vec size = (Vec)((Word)x & 0x7FFFFFFFu), z = x * x;
  Vec p = all(1.643756213e-2f);
  p = p * z - 5.267180206e-2f;
  p = p * z + 1.332072484e-1f;
  p = p * z - 3.333294662e-1f;
  const Vec e = exp2_small(size * (-2 * LOG2E)), far = (1.0f - e) / (1.0f + e);
  const Vec found = choose(size < 0.55f, size + size * z * p, far);
  return (Vec)((Word)found | ((Word)x & 0x80000000u));
}

// Interleave words, or pairs of words, from the lower or upper halves of each 16 bytes of a and b. Intrinsics, because
// GCC 12 compiles a shuffle of wider vectors to three instructions.
#if defined(__AVX512F__)
inline Word low_words(Word a, Word b) { return (Word)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b); }
inline Word high_words(Word a, Word b) { return (Word)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b); }
inline Word low_pairs(Word a, Word b) { return (Word)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b); }
inline Word high_pairs(Word a, Word b) { return (Word)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
inline Word low_words(Word a, Word b) { return (Word)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b); }
inline Word high_words(Word a, Word b) { return (Word)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b); }
inline Word low_pairs(Word a, Word b) { return (Word)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
inline Word high_pairs(Word a, Word b) { return (Word)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }
#else
inline Word low_words(Word a, Word b) { return __builtin_shuffle(a, b, Int{0, 4, 1, 5}); }
inline Word high_words(Word a, Word b) { return __builtin_shuffle(a, b, Int{2, 6, 3, 7}); }
inline Word low_pairs(Word a, Word b) { return __builtin_shuffle(a, b, Int{0, 1, 4, 5}); }
inline Word high_pairs(Word a, Word b) { return __builtin_shuffle(a, b, Int{2, 3, 6, 7}); }
#endif

// Transpose a W x W block of 32-bit words in place.
inline void transpose(Word (&x)[W]) {
  // 1. Each 4 x 4 block of 16 bytes a row.
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {
    const Word a = low_words(x[i], x[i + 1]), b = low_words(x[i + 2], x[i + 3]);
    const Word c = high_words(x[i], x[i + 1]), d = high_words(x[i + 2], x[i + 3]);
    x[i] = low_pairs(a, b);
    x[i + 1] = high_pairs(a, b);
    x[i + 2] = low_pairs(c, d);
    x[i + 3] = high_pairs(c, d);
  }
  // 2. The blocks.
#if defined(__AVX512F__)
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i a = (__m512i)x[i], b = (__m512i)x[i + 4], c = (__m512i)x[i + 8], d = (__m512i)x[i + 12];
    const __m512i ab = _mm512_shuffle_i32x4(a, b, 0x44), cd = _mm512_shuffle_i32x4(c, d, 0x44);
    x[i] = (Word)_mm512_shuffle_i32x4(ab, cd, 0x88);
    x[i + 4] = (Word)_mm512_shuffle_i32x4(ab, cd, 0xDD);
    const __m512i AB = _mm512_shuffle_i32x4(a, b, 0xEE), CD = _mm512_shuffle_i32x4(c, d, 0xEE);
    x[i + 8] = (Word)_mm512_shuffle_i32x4(AB, CD, 0x88);
    x[i + 12] = (Word)_mm512_shuffle_i32x4(AB, CD, 0xDD);
  }
#elif defined(__AVX2__)
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i a = (__m256i)x[i], b = (__m256i)x[i + 4];
    x[i] = (Word)_mm256_permute2x128_si256(a, b, 0x20);
    x[i + 4] = (Word)_mm256_permute2x128_si256(a, b, 0x31);
  }
#endif
}

}  // namespace
