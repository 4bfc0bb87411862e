// What dllm_fast/compiled.py calls, and what an instruction set provides.

#pragma once

#include <stddef.h>
#include <stdint.h>

// Strides are in elements, rows' numbers are int64.
struct Attention {
  const void *q, *keys, *values;      // [B, T, H, D], [B, S, G, D], [B, S, G, D]: bf16 or fp32
  void* out;                          // [B, T, H, D], contiguous
  const int64_t *start, *end, *slot;  // [B], or null: 0, S, 0
  int64_t batch, queries, heads, kv_heads, head_dim, slots;
  int64_t q_stride[3], k_stride[3], v_stride[3];
  int64_t window;  // -1: none
  int64_t tile;    // query rows of a task: a multiple of 16
  float scale;
};

struct Linear {
  const void *x, *weight, *bias;  // [N, inputs], [outputs, inputs], [outputs] or null: one dtype
  void* out;                      // [N, outputs], contiguous
  float* packed;                  // filled in on the way
  int64_t rows, inputs, outputs, x_stride, w_stride;
};

enum Confidence { PROBABILITY, MARGIN, ENTROPY, RANDOM };

struct Predict {
  const void *hidden, *uncond, *weight, *bias;  // [N, d], [N, d] or null, [V, d], [V] or null: one dtype
  const bool* candidate;                        // [N], or null: all
  const int64_t *row, *position;                // [N], where there is noise
  const int64_t *banned, *deferred;             // ranges [low, high) of ids, upwards
  int64_t* token;                               // [N]
  float *score, *lse;                           // [N]
  float *packed, *part;                         // filled in on the way
  int64_t* chosen;                              // likewise: the candidates' rows
  int64_t rows, width, vocabulary, hidden_stride, uncond_stride, weight_stride;
  int64_t banned_ranges, deferred_ranges, mask_id, confidence, chosen_rows;
  uint64_t seed;
  uint32_t step;
  float temperature, guidance;  // guidance: cfg_scale + 1
};

struct RmsNorm {
  const void *x, *residual, *weight;  // [N, d], [N, d] or null, [d]: one dtype
  void *y, *sum;                      // [N, d], contiguous; the sum where there is a residual
  int64_t rows, width, x_stride, residual_stride;
  int64_t chunk;  // rows of a task, filled in on the way
  double eps;
};

struct SwiGlu {
  const void *gate, *up;  // [N, f]: one dtype
  void* out;              // [N, f], contiguous
  int64_t rows, width, gate_stride, up_stride;
  int64_t chunk;  // rows of a task, filled in on the way
};

struct Rope {
  const void *q, *k, *v;           // [B, T, H, D], [B, T, G, D], [B, T, G, D] or null: one dtype
  const float *cos, *sin;          // [P, D/2]
  const int64_t *position, *slot;  // [B], or null: 0
  void* out;                       // [B, T, H, D], contiguous
  void *keys, *values;             // [B, S, G, D]: written where the slots are; values where there is v
  int64_t batch, queries, heads, kv_heads, head_dim, slots, positions, cos_stride, sin_stride;
  int64_t q_stride[3], k_stride[3], v_stride[3], keys_stride[3], values_stride[3];
  int64_t chunk;  // query rows of a task, filled in on the way
};

using Task = void (*)(const void* arguments, int64_t task);

// The kernels of one instruction set, for fp32 and bf16. A task computes the same whichever thread does it.
struct Kernels {
  Task attention[2], pack_linear[2], linear[2], pack_predict[2], predict[2], finish_predict;
  Task rms_norm[2], swiglu[2], rope[2];
  int64_t panel, columns;     // rows of x and of W of a `linear` task
  int64_t group, vocabulary;  // rows of hidden states and of W of a `predict` task
  int64_t part;               // floats that it leaves
};

// Memory of the calling thread, aligned to a cache line: valid until it asks again for what its tasks need, or for what
// a whole call does.
enum Use { OF_TASK, OF_CALL };
void* scratch(size_t bytes, Use use = OF_TASK);
