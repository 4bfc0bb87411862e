// Hidden states of a few positions to tokens and confidences (reference.predict), without their logits in memory.
//
// A task multiplies rows of W by a group of positions and leaves what it saw of the softmax and of the maxima; the
// parts are put together in the order of the vocabulary, so that it does not matter who did which. Lanes are
// positions: maxima and sums over the vocabulary need nothing across lanes.

#pragma once

#include "linear.h"
#include "noise.h"

namespace {

constexpr int POSITIONS = 48;  // of a group
constexpr int IDS = 512;       // of a task
constexpr int SOME_IDS = 64;   // whose logits are held at once

// What a task leaves of each lane. The sums are relative to the peak, PLOGP in bases of 2.
enum Field { PEAK, TOTAL, PLOGP, BEST, LOGIT, TOKEN, FIRST, SECOND, FIELDS };

template <class T>
struct PredictTask {
  const Predict& a;
  int64_t group, first, positions, lanes;  // positions ``first`` on of the chosen ones
  int64_t low;                             // its first id
  float* part;                             // [FIELDS, POSITIONS]
  float* logits;                           // [SOME_IDS, lanes], with guidance [SOME_IDS, 2 lanes]
  Word row[POSITIONS / W], position[POSITIONS / W];

  PredictTask(const Predict& arguments, int64_t task) : a(arguments) {
    // Groups of one part of the vocabulary follow each other: its rows of W are then in a cache.
    const int64_t groups = parts(a.chosen_rows, POSITIONS);
    group = task % groups, first = group * POSITIONS, low = task / groups * IDS;
    positions = smaller(POSITIONS, a.chosen_rows - first);
    lanes = parts(positions, W) * W;
    part = a.part + task * FIELDS * POSITIONS;
    for (int64_t at = 0; at < lanes; at += W)
      for (int field = 0; field < FIELDS; ++field)
        set(Field(field), at, field == TOTAL || field == PLOGP || field == TOKEN ? Vec{} : all(-INFINITY));
    if (a.temperature > 0)
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t n = a.chosen[first + smaller(l, positions - 1)];
        row[l / W][l % W] = uint32_t(a.row[n]), position[l / W][l % W] = uint32_t(a.position[n]);
      }
  }

  Vec get(Field field, int64_t at) const { return load<Vec>(part + field * POSITIONS + at); }
  void set(Field field, int64_t at, Vec x) { store(part + field * POSITIONS + at, x); }

  void run() {
    const int64_t high = smaller(low + IDS, a.vocabulary), words = parts(a.width, PER_WORD<T>);
    const int64_t all_lanes = a.uncond ? 2 * lanes : lanes;
    const int64_t kept = a.deferred_ranges ? lanes : 0;  // lanes of the logits that the softmax does not see
    const int64_t few = if_few<T>(a.uncond ? 2 * positions : positions);
    logits = (float*)scratch(sizeof(float) * SOME_IDS * (all_lanes + words + W + kept));
    const float* x = a.packed + group * POSITIONS * words * (a.uncond ? 2 : 1);
    for (int64_t id = low; id < high; id += SOME_IDS) {
      const int64_t n = smaller(SOME_IDS, high - id);
      times_weights(logits, n, (const T*)a.weight + id * a.weight_stride, a.weight_stride, (const T*)nullptr, x, few,
                    positions, all_lanes, a.width, logits + SOME_IDS * all_lanes);
      for (int64_t at = 0; at < lanes; at += W) guide(id, n, at, all_lanes);
      const int64_t mask[2] = {a.mask_id, a.mask_id + 1};
      float* deferred = logits + SOME_IDS * (all_lanes + words + W);
      exclude(a.banned, a.banned_ranges, id, n, all_lanes);
      exclude(a.deferred, a.deferred_ranges, id, n, all_lanes, deferred);
      for (int64_t at = 0; at < lanes; at += W)
        if (a.confidence == ENTROPY)
          softmax<true>(n, at, all_lanes);
        else
          softmax<false>(n, at, all_lanes);
      exclude(mask, 1, id, n, all_lanes);
      if (a.confidence == MARGIN)
        for (int64_t at = 0; at < lanes; at += W) two_best(n, at, all_lanes);
      bring_back(deferred, id, n, all_lanes);
      for (int64_t at = 0; at < lanes; at += W) {
        if (a.temperature > 0)
          pick_noisy(id, n, at, all_lanes);
        else
          pick(id, n, at, all_lanes);
      }
    }
  }

  // Guidance and bias.
  void guide(int64_t id, int64_t n, int64_t at, int64_t step) {
    if (!a.uncond && !a.bias) return;
    for (int64_t i = 0; i < n; ++i) {
      float* z = logits + i * step + at;
      Vec x = load<Vec>(z);
      if (a.uncond) {
        const Vec base = load<Vec>(z + lanes);
        x = base + a.guidance * (x - base);
      }
      if (a.bias) x += widen(((const T*)a.bias)[id + i]);
      store(z, x);
    }
  }

  template <bool ENTROPY_TOO>
  void softmax(int64_t n, int64_t at, int64_t step) {
    const float* z = logits + at;
    const Vec old = get(PEAK, at);
    Vec now = old;
    for (int64_t i = 0; i < n; ++i) now = larger(load<Vec>(z + i * step), now);
    const Vec base = choose(now > -INFINITY, now, Vec{});  // -inf - -inf is NaN
    Vec total = Vec{}, plogp = Vec{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec x = larger(all(-127.0f), (load<Vec>(z + i * step) - base) * LOG2E), p = exp2_small(x);
      total += p;
      if (ENTROPY_TOO) plogp += p * x;
    }
    const Vec less = choose(old > -INFINITY, (old - base) * LOG2E, Vec{}), shrink = exp2_small(less);
    const Vec moved = larger(all(-127.0f), less) * get(TOTAL, at);
    if (ENTROPY_TOO) set(PLOGP, at, shrink * (get(PLOGP, at) + moved) + plogp);
    set(TOTAL, at, shrink * get(TOTAL, at) + total);
    set(PEAK, at, now);
  }

  // The logits of the ranges' ids are -inf; they are put into ``kept``, where it is given, one id after the other.
  void exclude(const int64_t* range, int64_t ranges, int64_t id, int64_t n, int64_t step, float* kept = nullptr) {
    for (int64_t r = 0; r < ranges; ++r)
      for (int64_t i = larger(id, range[2 * r]); i < smaller(id + n, range[2 * r + 1]); ++i)
        for (int64_t at = 0; at < lanes; at += W) {
          float* z = logits + (i - id) * step + at;
          if (kept) store(kept, load<Vec>(z)), kept += W;
          store(z, all(-INFINITY));
        }
  }

  void bring_back(const float* kept, int64_t id, int64_t n, int64_t step) {
    for (int64_t r = 0; r < a.deferred_ranges; ++r)
      for (int64_t i = larger(id, a.deferred[2 * r]); i < smaller(id + n, a.deferred[2 * r + 1]); ++i)
        for (int64_t at = 0; at < lanes; at += W, kept += W)
          if (i != a.mask_id) store(logits + (i - id) * step + at, load<Vec>(kept));
  }

  void two_best(int64_t n, int64_t at, int64_t step) {
    Vec one = get(FIRST, at), two = get(SECOND, at);
    for (int64_t i = 0; i < n; ++i) {
      const Vec x = load<Vec>(logits + i * step + at);
      two = larger(two, choose(x < one, x, one));
      one = larger(one, x);
    }
    set(FIRST, at, one), set(SECOND, at, two);
  }

  void pick(int64_t id, int64_t n, int64_t at, int64_t step) {
    Vec best = get(BEST, at);
    Int token = (Int)get(TOKEN, at);
    for (int64_t i = 0; i < n; ++i) {
      const Vec x = load<Vec>(logits + i * step + at);
      const Int better = x > best;
      best = choose(better, x, best);
      token = (better & int32_t(id + i)) | (~better & token);
    }
    set(BEST, at, best), set(LOGIT, at, best), set(TOKEN, at, (Vec)token);
  }

  void pick_noisy(int64_t id, int64_t n, int64_t at, int64_t step) {
    Vec best = get(BEST, at), logit = get(LOGIT, at);
    Int token = (Int)get(TOKEN, at);
    for (int64_t i = 0; i < n; i += 2) {  // ``id`` is even: neighbours share a counter
      Word c[4] = {Word{} + uint32_t((id + i) / 2), position[at / W], row[at / W], Word{} + a.step};
      philox(a.seed, c);
      for (int64_t k = 0; k < smaller(2, n - i); ++k) {
        const Vec x = load<Vec>(logits + (i + k) * step + at);
        const Vec noisy = x + a.temperature * (k ? gumbel(c[2], c[3]) : gumbel(c[0], c[1]));
        const Int better = noisy > best;
        best = choose(better, noisy, best), logit = choose(better, x, logit);
        token = (better & int32_t(id + i + k)) | (~better & token);
      }
    }
    set(BEST, at, best), set(LOGIT, at, logit), set(TOKEN, at, (Vec)token);
  }
};

template <class T>
void predict(const void* arguments, int64_t task) {
  PredictTask<T>(*(const Predict*)arguments, task).run();
}

template <class T>
void pack_predict(const void* arguments, int64_t group) {
  const Predict& a = *(const Predict*)arguments;
  const int64_t first = group * POSITIONS, n = smaller(POSITIONS, a.chosen_rows - first), lanes = parts(n, W) * W;
  float* to = a.packed + group * POSITIONS * parts(a.width, PER_WORD<T>) * (a.uncond ? 2 : 1);
  const int64_t few = if_few<T>(a.uncond ? 2 * n : n);
  const int64_t period = few ? n : lanes;  // from a position's row to its unconditional one
  auto row = [&](int64_t l) {
    const int64_t at = a.chosen[first + smaller(l % period, n - 1)];
    return l < period ? (const T*)a.hidden + at * a.hidden_stride : (const T*)a.uncond + at * a.uncond_stride;
  };
  if (few)
    pack_few<T>(to, few, a.width, row);
  else
    pack<T>(to, a.uncond ? 2 * lanes : n, a.width, row);
}

// Uniform noise of one position: reference.uniform.
inline float uniform(const Predict& a, int64_t n) {
  Word c[4] = {Word{} + 0xFFFFFFFFu, Word{} + uint32_t(a.position[n]), Word{} + uint32_t(a.row[n]), Word{} + a.step};
  philox(a.seed, c);
  return float((double(c[0][0]) + 0.5) / 4294967296.0);
}

// The parts of a group's positions put together, sums in fp64.
inline void finish_predict(const void* arguments, int64_t group) {
  const Predict& a = *(const Predict*)arguments;
  const int64_t first = group * POSITIONS, positions = smaller(POSITIONS, a.chosen_rows - first);
  const int64_t groups = parts(a.chosen_rows, POSITIONS), tasks = parts(a.vocabulary, IDS);
  for (int64_t at = 0; at < positions; at += W) {
    auto get = [&](Field field, int64_t task) {
      return load<Vec>(a.part + ((task * groups + group) * FIELDS + field) * POSITIONS + at);
    };
    Vec peak = get(PEAK, 0), best = get(BEST, 0), logit = get(LOGIT, 0), one = get(FIRST, 0), two = get(SECOND, 0);
    Int token = (Int)get(TOKEN, 0);
    for (int64_t t = 1; t < tasks; ++t) {
      peak = larger(get(PEAK, t), peak);
      const Int better = get(BEST, t) > best;  // ties stay with the lowest id
      best = choose(better, get(BEST, t), best), logit = choose(better, get(LOGIT, t), logit);
      token = (better & (Int)get(TOKEN, t)) | (~better & token);
      two = larger(larger(two, get(SECOND, t)), choose(get(FIRST, t) < one, get(FIRST, t), one));
      one = larger(one, get(FIRST, t));
    }
    const Vec base = choose(peak > -INFINITY, peak, Vec{});
    double total[W] = {}, plogp[W] = {};
    for (int64_t t = 0; t < tasks; ++t) {
      const Vec less = larger(all(-127.0f), (get(PEAK, t) - base) * LOG2E), shrink = exp2_small(less);
      const Vec sum = shrink * get(TOTAL, t), part = shrink * (get(PLOGP, t) + less * get(TOTAL, t));
      for (int l = 0; l < W; ++l) total[l] += sum[l], plogp[l] += part[l];
    }
    for (int64_t l = 0; l < smaller(W, positions - at); ++l) {
      const int64_t n = a.chosen[first + at + l];
      const double lse = base[l] + log(total[l]);
      a.token[n] = token[l];
      a.lse[n] = float(lse);
      if (a.confidence == PROBABILITY) a.score[n] = float(exp(logit[l] - lse));
      if (a.confidence == MARGIN) a.score[n] = float(exp(one[l] - lse) - exp(two[l] - lse));
      if (a.confidence == ENTROPY) a.score[n] = float(plogp[l] * M_LN2 / total[l] - log(total[l]));
      if (a.confidence == RANDOM) a.score[n] = uniform(a, n);
      for (int64_t r = 0; r < a.deferred_ranges; ++r)
        if (a.deferred[2 * r] <= token[l] && token[l] < a.deferred[2 * r + 1]) a.score[n] = -INFINITY;
    }
  }
}

}  // namespace
