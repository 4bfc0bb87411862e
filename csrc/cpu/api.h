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

// The kernels of one instruction set. A task computes the same whichever thread does it.
struct Kernels {
  void (*attention[2])(const void* arguments, int64_t task);  // fp32, bf16
};

// Memory of the calling thread, valid until it asks again; aligned to a cache line.
void* scratch(size_t bytes);
