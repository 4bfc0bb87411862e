// The arguments that dllm_fast/cpu passes, and the kernels that each instruction set provides.

#pragma once

#include <stddef.h>
#include <stdint.h>

// Strides are in elements. Numbers of rows, positions and slots are int64.
struct Attention {
  const void *q, *keys, *values;      // [B, T, H, D] or [N, H, D], [B, S, G, D], [B, S, G, D]: bf16 or fp32
  void* out;                          // as q, contiguous
  const int64_t *start, *end, *slot;  // [B], or null: 0, S, 0
  const int64_t* origin;              // [B], or null: start. Where blocks are counted from
  const int64_t* first;               // [B + 1], or null: packed queries, of which each has a slot, [N]
  // With states, which are packed: their slots are those of their own keys and values, [B, K, G, D]; hole is [B].
  const void *own_keys, *own_values;
  const int64_t* hole;
  int64_t length, own_slots, own_k_stride[3], own_v_stride[3];
  int64_t batch, queries, heads, kv_heads, head_dim, slots;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // q's with packed queries: 0, a query's, a head's
  int64_t window;  // -1: none
  int64_t block;   // slots of a block, behind which its queries see none; 0: no blocks. Not with states
  int64_t tile;    // query rows in a task: a multiple of 16
  int64_t e4m3;    // whether keys and values are e4m3
  float scale;
};

struct Linear {
  const void *x, *weight, *bias;  // [N, inputs], [outputs, inputs], [outputs] or null: one dtype
  void* out;                      // [N, outputs], contiguous
  float* packed;                  // set by dllm_linear
  int64_t rows, inputs, outputs, x_stride, w_stride;
};

enum Confidence { PROBABILITY, MARGIN, ENTROPY, RANDOM };

struct Predict {
  const void *hidden, *uncond, *weight, *bias;  // [N, d], [N, d] or null, [V, d], [V] or null: one dtype
  const bool* candidate;                        // [N], or null: all
  const uint64_t* seed;                         // [N], if there is noise
  const int64_t *step, *row, *position;         // [N], likewise
  const int64_t *banned, *deferred;             // ascending ranges [low, high) of ids
  int64_t* token;                               // [N]
  float *score, *lse;                           // [N]
  float *packed, *part;                         // set by dllm_predict
  int64_t* chosen;                              // set by dllm_predict: the rows of the candidates
  int64_t rows, width, vocabulary, hidden_stride, uncond_stride, weight_stride;
  int64_t banned_ranges, deferred_ranges, mask_id, confidence, chosen_rows;
  float temperature, guidance;  // guidance: cfg_scale + 1
  float softcap;                // of the logits; 0: none
};

struct RmsNorm {
  const void *x, *residual, *weight;  // [N, d], [N, d] or null, [d]: one dtype
  void *y, *sum;                      // [N, d], contiguous; the sum only with a residual
  int64_t rows, width, x_stride, residual_stride;
  int64_t chunk;  // rows in a task, set by the call
  double eps;
};

struct SwiGlu {
  const void *gate, *up;  // [N, f]: one dtype
  void* out;              // [N, f], contiguous
  int64_t rows, width, gate_stride, up_stride;
  int64_t chunk;  // rows in a task, set by the call
};

struct Rope {
  const void *q, *k, *v;           // [B, T, H, D], [B, T, G, D], [B, T, G, D] or null: one dtype
  const float *cos, *sin;          // [P, D/2]
  const int64_t *position, *slot;  // [B], or null: 0
  const int64_t* row;              // [B]: the buffers' row, or null: each its own
  void* out;                       // [B, T, H, D], contiguous
  void *keys, *values;             // [R, S, G, D]: their slots are written; values only with v
  int64_t batch, queries, heads, kv_heads, head_dim, slots, positions, cos_stride, sin_stride;
  int64_t q_stride[3], k_stride[3], v_stride[3], keys_stride[3], values_stride[3];
  int64_t e4m3;   // whether the buffers are e4m3
  int64_t chunk;  // query rows in a task, set by the call
};

using Task = void (*)(const void* arguments, int64_t task);

// The kernels of one instruction set, for fp32 and bf16. A task's result does not depend on the thread that runs it.
struct Kernels {
  Task attention[2], pack_linear[2], linear[2], pack_predict[2], predict[2], finish_predict;
  Task rms_norm[2], swiglu[2], rope[2];
  int64_t panel, columns;     // rows of x and of W in a `linear` task
  int64_t group, vocabulary;  // hidden states and rows of W in a `predict` task
  int64_t part;               // floats that a `predict` task stores
};

// Memory of the calling thread, aligned to a cache line. It is valid until the thread asks again for the same use: a
// task's or a whole call's.
enum Use { OF_TASK, OF_CALL };
void* scratch(size_t bytes, Use use = OF_TASK);
