// From the hidden states of a few positions to tokens and confidences (reference.predict), without the logits in
// memory.
//
// A task multiplies rows of W by a group of positions and stores its part of the softmax and of the maxima. The parts
// are combined in the order of the vocabulary, so the result does not depend on which thread ran which task. Lanes are
// positions: maxima and sums over the vocabulary never cross lanes.

#pragma once

#include "linear.h"
#include "noise.h"

namespace {

constexpr int POSITIONS = 48;  // in a group
constexpr int IDS = 512;       // in a task
constexpr int SOME_IDS = 64;   // whose logits are in memory at once

// What a task stores for each lane. Sums are relative to the peak; PLOGP is in base 2.
enum Field { PEAK, TOTAL, PLOGP, BEST, LOGIT, TOKEN, FIRST, SECOND, FIELDS };

template <class T>
struct PredictTask {
  const Predict& a;
  int64_t group, first, positions, lanes;  // the group's first position among the chosen ones, and how many
  int64_t low;                             // its first id
  float* part;                             // [FIELDS, POSITIONS]
  float* logits;                           // [SOME_IDS, lanes], with guidance [SOME_IDS, 2 lanes]
  Word seed[POSITIONS / W][2], row[POSITIONS / W], position[POSITIONS / W], step_of[POSITIONS / W];

  PredictTask(const Predict& arguments, int64_t task) : a(arguments) {
    // All groups go through one part of the vocabulary before the next, so that its rows of W stay in a cache.
    const int64_t groups = parts(a.chosen_rows, POSITIONS);
    group = task % groups;
    first = group * POSITIONS;
    low = task / groups * IDS;
    positions = smaller(POSITIONS, a.chosen_rows - first);
    lanes = parts(positions, W) * W;
    part = a.part + task * FIELDS * POSITIONS;
    for (int64_t lane = 0; lane < lanes; lane += W)
      for (int field = 0; field < FIELDS; ++field)
        set(Field(field), lane, field == TOTAL || field == PLOGP || field == TOKEN ? Vec{} : all(-INFINITY));
    if (a.temperature > 0)
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t n = a.chosen[first + smaller(l, positions - 1)];
        set_key(seed[l / W], l % W, a.seed[n]);
        row[l / W][l % W] = uint32_t(a.row[n]);
        position[l / W][l % W] = uint32_t(a.position[n]);
        step_of[l / W][l % W] = uint32_t(a.step[n]);
      }
  }

  Vec get(Field field, int64_t lane) const { return load<Vec>(part + field * POSITIONS + lane); }
  void set(Field field, int64_t lane, Vec x) { store(part + field * POSITIONS + lane, x); }

  void run() {
    const int64_t high = smaller(low + IDS, a.vocabulary), words = parts(a.width, PER_WORD<T>);
    const int64_t all_lanes = a.uncond ? 2 * lanes : lanes;
    const int64_t kept = a.deferred_ranges ? lanes : 0;  // for the logits that the softmax leaves out
    const int64_t few = if_few<T>(a.uncond ? 2 * positions : positions);
    logits = (float*)scratch(sizeof(float) * SOME_IDS * (all_lanes + words + W + kept));
    const float* x = a.packed + group * POSITIONS * words * (a.uncond ? 2 : 1);
    for (int64_t id = low; id < high; id += SOME_IDS) {
      const int64_t n = smaller(SOME_IDS, high - id);
      // 1. Logits of some ids.
      times_weights(logits, n, (const T*)a.weight + id * a.weight_stride, a.weight_stride, (const T*)nullptr, x, few,
                    positions, all_lanes, a.width, logits + SOME_IDS * all_lanes);
      // 2. Guidance, bias, and the ids that do not count.
      for (int64_t lane = 0; lane < lanes; lane += W) guide(id, n, lane, all_lanes);
      const int64_t mask[2] = {a.mask_id, a.mask_id + 1};
      float* deferred = logits + SOME_IDS * (all_lanes + words + W);
      exclude(a.banned, a.banned_ranges, id, n, all_lanes);
      exclude(a.deferred, a.deferred_ranges, id, n, all_lanes, deferred);
      // 3. The softmax of all that count.
      for (int64_t lane = 0; lane < lanes; lane += W)
        if (a.confidence == ENTROPY)
          softmax<true>(n, lane, all_lanes);
        else
          softmax<false>(n, lane, all_lanes);
      // 4. The best token, never [MASK]: deferred ids may be chosen, so their logits come back.
      exclude(mask, 1, id, n, all_lanes);
      if (a.confidence == MARGIN)
        for (int64_t lane = 0; lane < lanes; lane += W) two_best(n, lane, all_lanes);
      bring_back(deferred, id, n, all_lanes);
      for (int64_t lane = 0; lane < lanes; lane += W) {
        if (a.temperature > 0)
          pick_noisy(id, n, lane, all_lanes);
        else
          pick(id, n, lane, all_lanes);
      }
    }
  }

  // Guidance and bias.
  void guide(int64_t id, int64_t n, int64_t lane, int64_t step) {
    if (a.softcap > 0) return guide_capped(id, n, lane, step);
    if (!a.uncond && !a.bias) return;
    for (int64_t i = 0; i < n; ++i) {
      float* z = logits + i * step + lane;
      Vec x = load<Vec>(z);
      if (a.uncond) {
        const Vec base = load<Vec>(z + lanes);
        x = base + a.guidance * (x - base);
      }
      if (a.bias) x += widen(((const T*)a.bias)[id + i]);
      store(z, x);
    }
  }

  // The same of capped logits: a bias comes before the cap, guidance after it.
  void guide_capped(int64_t id, int64_t n, int64_t lane, int64_t step) {
    for (int64_t i = 0; i < n; ++i) {
      float* z = logits + i * step + lane;
      const Vec bias = a.bias ? Vec{} + widen(((const T*)a.bias)[id + i]) : Vec{};
      Vec x = a.softcap * tanh((load<Vec>(z) + bias) / a.softcap);
      if (a.uncond) {
        const Vec base = a.softcap * tanh((load<Vec>(z + lanes) + bias) / a.softcap);
        x = base + a.guidance * (x - base);
      }
      store(z, x);
    }
  }

  template <bool ENTROPY_TOO>
  void softmax(int64_t n, int64_t lane, int64_t step) {
    const float* z = logits + lane;
    const Vec old = get(PEAK, lane);
    Vec new_peak = old;
    for (int64_t i = 0; i < n; ++i) new_peak = larger(load<Vec>(z + i * step), new_peak);
    const Vec base = choose(new_peak > -INFINITY, new_peak, Vec{});  // -inf - -inf is NaN
    Vec total = Vec{}, plogp = Vec{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec x = larger(all(-127.0f), (load<Vec>(z + i * step) - base) * LOG2E), p = exp2_small(x);
      total += p;
      if (ENTROPY_TOO) plogp += p * x;
    }
    const Vec less = choose(old > -INFINITY, (old - base) * LOG2E, Vec{}), shrink = exp2_small(less);
    const Vec moved = larger(all(-127.0f), less) * get(TOTAL, lane);
    if (ENTROPY_TOO) set(PLOGP, lane, shrink * (get(PLOGP, lane) + moved) + plogp);
    set(TOTAL, lane, shrink * get(TOTAL, lane) + total);
    set(PEAK, lane, new_peak);
  }

  // Set the logits of the ids in the ranges to -inf; with ``kept``, store them there first, one id after the other.
  void exclude(const int64_t* range, int64_t ranges, int64_t id, int64_t n, int64_t step, float* kept = nullptr) {
    for (int64_t r = 0; r < ranges; ++r)
      for (int64_t i = larger(id, range[2 * r]); i < smaller(id + n, range[2 * r + 1]); ++i)
        for (int64_t lane = 0; lane < lanes; lane += W) {
          float* z = logits + (i - id) * step + lane;
          if (kept) {
            store(kept, load<Vec>(z));
            kept += W;
          }
          store(z, all(-INFINITY));
        }
  }

  void bring_back(const float* kept, int64_t id, int64_t n, int64_t step) {
    for (int64_t r = 0; r < a.deferred_ranges; ++r)
      for (int64_t i = larger(id, a.deferred[2 * r]); i < smaller(id + n, a.deferred[2 * r + 1]); ++i)
        for (int64_t lane = 0; lane < lanes; lane += W, kept += W)
          if (i != a.mask_id) store(logits + (i - id) * step + lane, load<Vec>(kept));
  }

  void two_best(int64_t n, int64_t lane, int64_t step) {
    Vec one = get(FIRST, lane), two = get(SECOND, lane);
    for (int64_t i = 0; i < n; ++i) {
      const Vec x = load<Vec>(logits + i * step + lane);
      two = larger(two, choose(x < one, x, one));
      one = larger(one, x);
    }
    set(FIRST, lane, one);
    set(SECOND, lane, two);
  }

  void pick(int64_t id, int64_t n, int64_t lane, int64_t step) {
    Vec best = get(BEST, lane);
    Int token = (Int)get(TOKEN, lane);
    for (int64_t i = 0; i < n; ++i) {
      const Vec x = load<Vec>(logits + i * step + lane);
      const Int better = x > best;
      best = choose(better, x, best);
      token = (better & int32_t(id + i)) | (~better & token);
    }
    set(BEST, lane, best);
    set(LOGIT, lane, best);
    set(TOKEN, lane, (Vec)token);
  }

  void pick_noisy(int64_t id, int64_t n, int64_t lane, int64_t step) {
    Vec best = get(BEST, lane), logit = get(LOGIT, lane);
    Int token = (Int)get(TOKEN, lane);
    for (int64_t i = 0; i < n; i += 2) {  // ``id`` is even: neighbours share a counter
      Word c[4] = {Word{} + uint32_t((id + i) / 2), position[lane / W], row[lane / W], step_of[lane / W]};
      philox(seed[lane / W], c);
      for (int64_t k = 0; k < smaller(2, n - i); ++k) {
        const Vec x = load<Vec>(logits + (i + k) * step + lane);
        const Vec noisy = x + a.temperature * (k ? gumbel(c[2], c[3]) : gumbel(c[0], c[1]));
        const Int better = noisy > best;
        best = choose(better, noisy, best);
        logit = choose(better, x, logit);
        token = (better & int32_t(id + i + k)) | (~better & token);
      }
    }
    set(BEST, lane, best);
    set(LOGIT, lane, logit);
    set(TOKEN, lane, (Vec)token);
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
  const int64_t period = few ? n : lanes;  // from a position's row to its row without the prompt
  auto row = [&](int64_t l) {
    const int64_t from = a.chosen[first + smaller(l % period, n - 1)];
    return l < period ? (const T*)a.hidden + from * a.hidden_stride : (const T*)a.uncond + from * a.uncond_stride;
  };
  if (few)
    pack_few<T>(to, few, a.width, row);
  else
    pack<T>(to, a.uncond ? 2 * lanes : n, a.width, row);
}

// Uniform noise of one position: reference.uniform.
inline float uniform(const Predict& a, int64_t n) {
  Word c[4] = {Word{} + 0xFFFFFFFFu, Word{} + uint32_t(a.position[n]), Word{} + uint32_t(a.row[n]),
               Word{} + uint32_t(a.step[n])};
  Word seed[2] = {};
  set_key(seed, 0, a.seed[n]);
  philox(seed, c);
  return float((double(c[0][0]) + 0.5) / 4294967296.0);
}

// Combine the parts of a group's positions, with sums in fp64.
inline void finish_predict(const void* arguments, int64_t group) {
  const Predict& a = *(const Predict*)arguments;
  const int64_t first = group * POSITIONS, positions = smaller(POSITIONS, a.chosen_rows - first);
  const int64_t groups = parts(a.chosen_rows, POSITIONS), tasks = parts(a.vocabulary, IDS);
  for (int64_t lane = 0; lane < positions; lane += W) {
    auto get = [&](Field field, int64_t task) {
      return load<Vec>(a.part + ((task * groups + group) * FIELDS + field) * POSITIONS + lane);
    };
    Vec peak = get(PEAK, 0), best = get(BEST, 0), logit = get(LOGIT, 0), one = get(FIRST, 0), two = get(SECOND, 0);
    Int token = (Int)get(TOKEN, 0);
    for (int64_t t = 1; t < tasks; ++t) {
      peak = larger(get(PEAK, t), peak);
      const Int better = get(BEST, t) > best;  // ties stay with the lowest id
      best = choose(better, get(BEST, t), best);
      logit = choose(better, get(LOGIT, t), logit);
      token = (better & (Int)get(TOKEN, t)) | (~better & token);
      two = larger(larger(two, get(SECOND, t)), choose(get(FIRST, t) < one, get(FIRST, t), one));
      one = larger(one, get(FIRST, t));
    }
    const Vec base = choose(peak > -INFINITY, peak, Vec{});
    double total[W] = {}, plogp[W] = {};
    for (int64_t t = 0; t < tasks; ++t) {
      const Vec less = larger(all(-127.0f), (get(PEAK, t) - base) * LOG2E), shrink = exp2_small(less);
      const Vec sum = shrink * get(TOTAL, t), part = shrink * (get(PLOGP, t) + less * get(TOTAL, t));
      for (int l = 0; l < W; ++l) {
        total[l] += sum[l];
        plogp[l] += part[l];
      }
    }
    for (int64_t l = 0; l < smaller(W, positions - lane); ++l) {
      const int64_t n = a.chosen[first + lane + l];
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
