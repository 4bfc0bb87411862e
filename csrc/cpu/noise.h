// Counter-based noise (reference.gumbel, reference.uniform): Philox4x32-10 (Salmon et al., SC 2011) and logarithms that
// are exact in both tails; kernels/gumbel.py explains them.

#pragma once

#include "vec.h"

namespace {

// The upper and lower words of the 64-bit products x m.
inline void multiply(Word x, uint32_t m, Word& high, Word& low) {
  low = x * m;
#if defined(__AVX512F__)
  const __m512i by = _mm512_set1_epi32(int32_t(m));
  const __m512i even = _mm512_mul_epu32((__m512i)x, by), odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), by);
  high = (Word)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i by = _mm256_set1_epi32(int32_t(m));
  const __m256i even = _mm256_mul_epu32((__m256i)x, by), odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), by);
  high = (Word)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int l = 0; l < W; ++l) high[l] = uint32_t(uint64_t(x[l]) * m >> 32);
#endif
}

// A seed, as the lower and upper words of a lane's key.
inline void set_key(Word (&key)[2], int64_t lane, uint64_t seed) {
  key[0][lane] = uint32_t(seed);
  key[1][lane] = uint32_t(seed >> 32);
}

// Replace the counter c of each lane by its four words under the lane's key.
inline void philox(const Word (&seed)[2], Word (&c)[4]) {
  Word key[2] = {seed[0], seed[1]};
  for (int round = 0; round < 10; ++round) {
    Word a_high, a_low, b_high, b_low;
    multiply(c[0], 0xD2511F53u, a_high, a_low);
    multiply(c[2], 0xCD9E8D57u, b_high, b_low);
    c[0] = b_high ^ c[1] ^ key[0];
    c[2] = a_high ^ c[3] ^ key[1];
    c[1] = b_low;
    c[3] = a_low;
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

// k ln 2 + log1p(f) for |f| <= 1/3.
inline Vec log_parts(Vec f, Vec k) {
  Vec q = f * -0.1294897049665451f + 0.1400475800037384f;
  q = f * q - 0.12167152762413025f;
  q = f * q + 0.14001160860061646f;
  q = f * q - 0.16682305932044983f;
  q = f * q + 0.20010747015476227f;
  q = f * q - 0.24999716877937317f;
  q = f * q + 0.3333320915699005f;
  q = f * q - 0.5f;
  return k * 0.6931471805599453f + (f * f * q + f);
}

// f and k such that x = 2^k (1 + f) and |f| <= 1/3, for a positive normal x.
inline void split(Vec x, Vec& f, Vec& k) {
  const Int exponent = ((Int)x - 0x3F2AAAAB) >> 23;  // 0x3F2AAAAB is 2/3
  f = (Vec)((Int)x - (exponent << 23)) - 1.0f;
  k = __builtin_convertvector(exponent, Vec);
}

// Gumbel noise from 64 random bits.
inline Vec gumbel(Word high, Word low) {
  const Int upper = (Int)high < 0;
  high ^= (Word)upper;
  low ^= (Word)upper;
  const float tiny = 1.0f / 4294967296.0f;
  const Vec s = (to_float(high) + (to_float(low) + 0.5f) * tiny) * tiny;  // min(U, 1 - U)
  Vec f, k;
  split(s, f, k);
  const Int near = s <= 0.3333333f;
  f = choose(upper, choose(near, -s, 1.0f - 2.0f * s), f);
  k = choose(upper, choose(near, Vec{}, all(-1.0f)), k);
  split(-log_parts(f, k), f, k);
  return -log_parts(f, k);
}

}  // namespace
