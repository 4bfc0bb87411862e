// Flash attention over a K/V buffer (reference.attention): a tile of slots at a time, the softmax kept as a running
// maximum and sum (arXiv:2205.14135, in bases of 2).
//
// Keys and values in e4m3 are widened a tile at a time.
//
// Lanes are query rows, so a tile of scores is [slots, rows]. Slots that no row sees are never read, and only a window
// and blocks need a mask, in the tiles at their edges. The H/G query heads that share a K/V head are rows of one tile, in the order
// (t, head).
//
// The queries of states (reference_states.attention) are rows of one tile too: they read the batch row's slots outside
// the hole once, and then each state its own.

#pragma once

#include "api.h"
#include "words.h"

namespace {

constexpr int SLOTS = 128;  // in a tile: scores and K fit in the L1 cache

// Words in a partial sum of a score, and of a result. In fp32 a single sum over a whole head has up to 1.5 times the
// error of PyTorch's, and a few outputs are off by more than twice PyTorch's worst. In bf16 the rounding of the result
// hides it.
template <class T>
constexpr int SCORE_PART = sizeof(T) == 4 ? 16 : 0;
template <class T>
constexpr int VALUE_PART = sizeof(T) == 4 ? 32 : 0;

// Queries of dtype T; keys and values of dtype C: T, or e4m3.
template <class T, class C>
struct AttentionTask {
  static constexpr bool NARROW = sizeof(C) == 1;
  const Attention& a;
  int64_t b, g, first, rows;  // batch row, K/V head; its first query row of this head's T H/G, and how many
  int64_t base;               // the batch row's first query, among all
  int64_t group, words;       // H/G; words of a head
  int64_t lanes;              // rows, rounded up to whole vectors
  int64_t start, end;         // the batch row's valid slots
  int64_t origin;             // where its blocks are counted from
  int64_t lo, hi;             // slots that some row sees
  int64_t from, to;           // slots of the first and of the last row; with states, of the hole
  float* q;                   // [words, lanes]
  float* score;               // [SLOTS, lanes]; then weights, as words [SLOTS / PER_WORD, lanes]
  float* wide_k;              // [SLOTS, words, up to whole vectors]: keys that cannot be multiplied in place
  float* wide_v;              // [SLOTS / PER_WORD, D, up to whole vectors]: such values
  float* out;                 // [D, up to whole vectors, lanes]
  float *peak, *total, *shrink;  // [lanes]

  AttentionTask(const Attention& arguments, int64_t task) : a(arguments) {
    group = a.heads / a.kv_heads;
    const int64_t tiles = parts(a.queries * group, a.tile);
    first = task % tiles * a.tile;
    g = task / tiles % a.kv_heads;
    b = task / tiles / a.kv_heads;
    base = a.first ? a.first[b] : b * a.queries;
    const int64_t queries = a.first ? a.first[b + 1] - base : a.queries;
    rows = smaller(a.tile, queries * group - first);
    if (rows <= 0) return;
    lanes = parts(rows, W) * W;
    words = parts(a.head_dim, PER_WORD<T>);
    from = a.hole ? a.hole[b] : slot_of(0);
    to = a.hole ? from + a.length - 1 : slot_of(rows - 1);
    start = a.start ? a.start[b] : 0;
    origin = a.origin ? a.origin[b] : start;
    end = a.end ? a.end[b] : a.slots;
    lo = larger(0, start);
    hi = smaller(a.slots, end);
    if (a.window >= 0) {
      lo = larger(lo, from - a.window);
      hi = smaller(hi, to + a.window + 1);
    }
    if (a.block) hi = smaller(hi, block_end(to));
    const int64_t wide = parts(a.head_dim, W) * W;
    float* memory = (float*)scratch(sizeof(float) * (lanes * (words + SLOTS + wide + 3) + 2 * SLOTS * wide + 16));
    auto take = [&](int64_t n) { return memory += n, memory - n; };
    wide_k = take(SLOTS * wide);
    wide_v = take(SLOTS * wide);
    q = take(words * lanes);
    score = take(SLOTS * lanes);
    out = take(wide * lanes);
    peak = take(lanes);
    total = take(lanes);
    shrink = take(lanes);
  }

  // The slot of one of the task's rows: of its state's own, if there are any.
  int64_t given_slot(int64_t row) const {
    const int64_t t = (first + row) / group;
    return a.first ? a.slot[base + t] : (a.slot ? a.slot[b] : 0) + t;
  }

  // The batch row's slot that it stands for.
  int64_t slot_of(int64_t row) const { return a.hole ? a.hole[b] + given_slot(row) % a.length : given_slot(row); }

  // One past the block of a slot. The slots before the origin are one block.
  int64_t block_end(int64_t slot) const { return origin + larger(0, slot - origin + a.block) / a.block * a.block; }

  // A head's keys and values: slot j is at k + j * k_step.
  struct Slots {
    const C *k, *v;
    int64_t k_step, v_step;
    Slots(const void* keys, const void* values, const int64_t* k_stride, const int64_t* v_stride, int64_t b, int64_t g)
        : k((const C*)keys + b * k_stride[0] + g * k_stride[2]),
          v((const C*)values + b * v_stride[0] + g * v_stride[2]),
          k_step(k_stride[1]),
          v_step(v_stride[1]) {}
  };

  void run() {
    if (rows <= 0) return;  // another batch row has more packed queries
    const Slots shared(a.keys, a.values, a.k_stride, a.v_stride, b, g);
    for (int64_t j = lo; j < smaller(hi, lo + SLOTS); ++j) fetch_head(shared.k + j * shared.k_step);
    load_queries();
    for (int64_t l = 0; l < lanes; ++l) {
      peak[l] = -INFINITY;
      total[l] = 0;
    }
    memset(out, 0, sizeof(float) * parts(a.head_dim, W) * W * lanes);
    if (a.hole) {
      absorb(shared, lo, smaller(hi, from), 0, lanes);
      absorb(shared, larger(lo, to + 1), hi, 0, lanes);
      absorb_states();
    } else {
      absorb(shared, lo, hi, 0, lanes);
    }
    store_out();
  }

  // Add to the rows of each state the slots of its own.
  void absorb_states() {
    for (int64_t row = 0, next; row < rows; row = next) {
      const int64_t slot = given_slot(row), own = slot / a.length * a.length;  // where the state's slots begin
      int64_t least = slot_of(row), most = least;
      for (next = row + 1; next < rows && given_slot(next) / a.length * a.length == own; ++next) {
        least = smaller(least, slot_of(next));
        most = larger(most, slot_of(next));
      }
      int64_t first_seen = larger(start, from), last_seen = smaller(end, from + smaller(a.length, a.own_slots - own));
      if (slot < 0) continue;
      if (a.window >= 0) {
        // Skip whole tiles only: where they begin must not depend on which rows are in a task.
        first_seen += larger(0, least - a.window - first_seen) / SLOTS * SLOTS;
        last_seen = smaller(last_seen, most + a.window + 1);
      }
      Slots mine(a.own_keys, a.own_values, a.own_k_stride, a.own_v_stride, b, g);
      mine.k += (own - from) * mine.k_step;
      mine.v += (own - from) * mine.v_step;
      absorb(mine, first_seen, last_seen, row, next == rows ? lanes : next);
    }
  }

  void load_queries() {
    pack<T>(q, rows, a.head_dim, [&](int64_t l) {
      const int64_t r = first + l;
      const int64_t query = (a.first ? base : 0) + r / group;
      return (const T*)a.q + b * a.q_stride[0] + query * a.q_stride[1] + (g * group + r % group) * a.q_stride[2];
    });
  }

  // Add slots j to ``stop`` to the running softmax of the rows ``begin`` to ``past``.
  void absorb(const Slots& slots, int64_t j, int64_t stop, int64_t begin, int64_t past) {
    for (; j < stop; j += SLOTS) absorb_tile(slots, j, smaller(SLOTS, stop - j), begin, past);
  }

  void absorb_tile(const Slots& slots, int64_t j, int64_t n, int64_t begin, int64_t past) {
    const C *k = slots.k + j * slots.k_step, *v = slots.v + j * slots.v_step;
    const char *k_words = (const char*)k, *v_words = (const char*)v;
    int64_t k_row = slots.k_step * sizeof(C), v_row = slots.v_step * sizeof(C);
    const int64_t D = a.head_dim, wide = parts(D, W) * W;
    // 1. Keys and values as words.
    if (NARROW || WIDEN<T> || D % PER_WORD<T>) {
      for (int64_t i = 0; i < n; ++i) copy_row(wide_k + i * wide, k + i * slots.k_step);
      k_words = (const char*)wide_k;
      k_row = wide * sizeof(float);
    }
    if (sizeof(C) < 4) {
      v_words = (const char*)wide_v;
      v_row = wide * sizeof(float);
    }
    const bool edge = (a.window >= 0 && (j < to - a.window || j + n - 1 > from + a.window)) ||
                      (a.block && j + n > block_end(from));
    // 2. A few vectors of rows at a time: scores, softmax, and weights times values.
    const int64_t before = begin / W;
    in_groups(parts(past, W) - before, [&](auto count, int64_t first_vector) {
      constexpr int NR = decltype(count)::value;
      const int64_t lane = (before + first_vector) * W;
      const bool mixed = lane < begin || lane + NR * W > past;  // with rows of other states
      Vec top[NR];
      for (int c = 0; c < NR; ++c) top[c] = all(-INFINITY);
      Int ours[NR];
      for (int c = 0; c < NR; ++c) ours[c] = in_range(lane + c * W, begin, past);
      matmul<T, NR, false, SCORE_PART<T>>(
          n, k_words, k_row, 4, q + lane, lanes, words, nullptr,
          [&](int64_t i, int c) {
            if (first_vector + c == 0) {
              fetch_head(k + (i + n) * slots.k_step);
              fetch_head(v + i * slots.v_step);
            }
            return Vec{};
          },
          [&](int64_t i, int c, Vec x) {
            store(score + i * lanes + lane + c * W, x);
            top[c] = larger(x, top[c]);
          });
      for (int c = 0; c < NR; ++c) {
        if (edge || mixed) top[c] = mask(j, n, lane + c * W, ours[c]);
        softmax(n, lane + c * W, top[c]);
      }
      if (sizeof(C) < 4 && first_vector == 0)
        for (int64_t i = 0; i < n; i += PER_WORD<T>) widen_values(i, n, v + i * slots.v_step, slots.v_step, wide);
      auto add_values = [&](auto kept) {
        matmul<T, NR, false, VALUE_PART<T>>(
            D, v_words, 4, v_row, score + lane, lanes, parts(n, PER_WORD<T>), nullptr,
            [](int64_t, int) { return Vec{}; },
            [&](int64_t d, int c, Vec x) {
              // Each tile is summed by itself and then added: one sum over all slots would be less exact.
              float* to = out + d * lanes + lane + c * W;
              store(to, load<Vec>(to) * load<Vec>(shrink + lane + c * W) + kept(c, x));
            });
      };
      if (mixed)  // a weight of 0 times another state's NaN is NaN
        add_values([&](int c, Vec x) { return choose(ours[c], x, Vec{}); });
      else
        add_values([](int, Vec x) { return x; });
    });
  }

  // Prefetch a head of K or V, perhaps from main memory, well before it is used.
  void fetch_head(const C* x) const {
    for (int64_t d = 0; d < a.head_dim; d += 64 / sizeof(C)) fetch(x + d);
  }

  // A head of K or V as words.
  void copy_row(float* to, const C* from) const {
    if constexpr (NARROW)
      widen_words<T>(to, from, a.head_dim);
    else
      copy_words(to, from, a.head_dim);
  }

  // Values of slot i; or of slots i and i + 1 as words. A last odd slot is paired with itself, and the weight there is
  // 0.
  void widen_values(int64_t i, int64_t n, const C* v, int64_t v_step, int64_t wide) {
    if constexpr (PER_WORD<T> == 2)
      interleave((uint32_t*)wide_v + i / 2 * wide, v, i + 1 < n ? v + v_step : v, a.head_dim);
    else
      copy_row(wide_v + i * wide, v);
  }

  // Which of W rows are in [begin, past).
  static Int in_range(int64_t lane, int64_t begin, int64_t past) {
    Int row;
    for (int l = 0; l < W; ++l) row[l] = int32_t(lane + l);
    return (row >= int32_t(begin)) & (row < int32_t(past));
  }

  // Set the scores of slots j to j + n that W rows do not see to -inf, and all those of rows that are not ``ours``;
  // returns the largest score of each row.
  Vec mask(int64_t j, int64_t n, int64_t lane, Int ours) {
    Vec top = all(-INFINITY);
    Int distance;  // from j to each row's slot: between -S and S, or no row would see a slot of the tile
    Int left;      // from j to the end of each row's block
    for (int l = 0; l < W; ++l) {
      const int64_t slot = slot_of(smaller(lane + l, rows - 1));
      distance[l] = int32_t(slot - j);
      left[l] = a.block ? int32_t(block_end(slot) - j) : INT32_MAX;
    }
    const int32_t window = int32_t(a.window < 0 ? 1 << 30 : smaller(a.window, 1 << 30));
    for (int64_t i = 0; i < n; ++i) {
      const Int away = distance - int32_t(i);
      const Int visible = (away <= window) & (away >= -window) & (left > int32_t(i)) & ours;
      const Vec x = choose(visible, load<Vec>(score + i * lanes + lane), all(-INFINITY));
      store(score + i * lanes + lane, x);
      top = larger(x, top);
    }
    return top;
  }

  // Turn the scores of W rows into weights relative to the maximum so far.
  void softmax(int64_t n, int64_t lane, Vec top) {
    const Vec scale = all(a.scale * LOG2E), old = load<Vec>(peak + lane);
    const Vec new_peak = larger(top, old);
    const Vec base = choose(new_peak > -INFINITY, new_peak, Vec{});  // -inf - -inf is NaN
    const Vec shrunk = exp2_small((old - base) * scale);
    Vec sum[2] = {};
    const float* x = score + lane;
    float* to = score + lane;
    int64_t i = 0;
    for (; i + 2 <= n; i += 2, x += 2 * lanes) {
      const Vec p0 = exp2_small((load<Vec>(x) - base) * scale), p1 = exp2_small((load<Vec>(x + lanes) - base) * scale);
      sum[0] += p0;
      sum[1] += p1;
      to = store_weights(to, p0, p1);
    }
    if (i < n) {
      const Vec p = exp2_small((load<Vec>(x) - base) * scale);
      sum[0] += p;
      store_last_weight(to, p);
    }
    store(peak + lane, new_peak);
    store(shrink + lane, shrunk);
    store(total + lane, load<Vec>(total + lane) * shrunk + sum[0] + sum[1]);
  }

  float* store_weights(float* to, Vec p0, Vec p1) {
#if defined(__AVX512BF16__)
    if constexpr (PER_WORD<T> == 2) {
      store(to, interleave(p0, p1));
      return to + lanes;
    }
#endif
    store(to, p0);
    store(to + lanes, p1);
    return to + 2 * lanes;
  }

  void store_last_weight(float* to, Vec p) {
#if defined(__AVX512BF16__)
    if constexpr (PER_WORD<T> == 2) {
      store(to, interleave(p, Vec{}));
      return;
    }
#endif
    store(to, p);
  }

  void store_out() {
    for (int64_t m = 0; m < lanes; m += W) {
      const Vec sum = load<Vec>(total + m);
      store(total + m, 1.0f / choose(sum == 0.0f, all(1.0f), sum));
    }
    unpack<T>(
        out, lanes, rows, a.head_dim,
        [&](int64_t l) {
          const int64_t r = first + l;
          return (T*)a.out + ((base + r / group) * a.heads + g * group + r % group) * a.head_dim;
        },
        [&](int64_t m, Vec x) { return x * load<Vec>(total + m); });
  }
};

template <class T>
void attention(const void* arguments, int64_t task) {
  const Attention& a = *(const Attention*)arguments;
  if (a.e4m3)
    AttentionTask<T, e4m3>(a, task).run();
  else
    AttentionTask<T, T>(a, task).run();
}

}  // namespace
