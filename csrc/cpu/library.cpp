// The library that dllm_fast/cpu loads: it picks the instruction set and divides tasks between threads.

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "api.h"

#ifndef SOURCES
#define SOURCES ""
#endif

#if defined(__x86_64__)
extern const Kernels plain, avx2, avx512, avx512bf16;
#else
extern const Kernels plain;
#endif

namespace {

const Kernels* table(int level) {
#if defined(__x86_64__)
  if (level == 1) return &avx2;
  if (level == 2) return &avx512;
  if (level == 3) return &avx512bf16;
#endif
  return &plain;
}

int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Rows in a task that reads them once: a smaller task would be done before another thread has woken.
int64_t chunk(int64_t elements) { return elements < 32768 ? 32768 / elements : 1; }

struct Job {
  Task run;
  const void* arguments;
  int64_t tasks;
  std::atomic<int64_t> next;
};

void work(void* pointer) {
  Job& job = *static_cast<Job*>(pointer);
  for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;)
    job.run(job.arguments, task);
}

// The entry point of the OpenMP library that PyTorch uses: a second library would keep its own threads spinning.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel openmp = nullptr;

void share(Task run, const void* arguments, int64_t tasks, int64_t threads) {
  Job job{run, arguments, tasks, {0}};
  if (threads > tasks) threads = tasks;
  if (threads <= 1) return work(&job);
  if (openmp) return openmp(work, &job, unsigned(threads), 0);
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(work, &job);
  work(&job);
  for (std::thread& other : others) other.join();
}

}  // namespace

void* scratch(size_t bytes, Use use) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory[2];
  thread_local size_t size[2] = {0, 0};
  if (bytes > size[use]) {
    size[use] = (bytes + 4095) / 4096 * 4096;
    memory[use].reset(std::aligned_alloc(64, size[use]));
  }
  return memory[use].get();
}

#pragma GCC visibility push(default)
extern "C" {

// Of the files of this folder when this was compiled; see setup.py.
const char* dllm_sources() { return SOURCES; }

// The best that this CPU has: 0 plain, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16.
int dllm_level() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return 1;
  return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
#else
  return 0;
#endif
}

void dllm_openmp(void* parallel) { openmp = reinterpret_cast<Parallel>(parallel); }

void dllm_attention(const Attention* a, int level, int is_bf16, int64_t threads) {
  const int64_t tiles = parts(a->queries * (a->heads / a->kv_heads), a->tile);
  share(table(level)->attention[is_bf16], a, a->batch * a->kv_heads * tiles, threads);
}

void dllm_linear(Linear* a, int level, int is_bf16, int64_t threads) {
  const Kernels& kernels = *table(level);
  const int64_t panels = parts(a->rows, kernels.panel);
  a->packed = static_cast<float*>(scratch(sizeof(float) * panels * kernels.panel * a->inputs, OF_CALL));
  share(kernels.pack_linear[is_bf16], a, panels, threads);
  share(kernels.linear[is_bf16], a, panels * parts(a->outputs, kernels.columns), threads);
}

void dllm_predict(Predict* a, int level, int is_bf16, int64_t threads) {
  const Kernels& kernels = *table(level);
  const int64_t tasks = parts(a->vocabulary, kernels.vocabulary), most = parts(a->rows, kernels.group);
  const int64_t packed = most * kernels.group * (a->uncond ? 2 : 1) * a->width, part = most * tasks * kernels.part;
  char* memory = static_cast<char*>(scratch(sizeof(float) * (packed + part) + sizeof(int64_t) * a->rows, OF_CALL));
  a->packed = reinterpret_cast<float*>(memory);
  a->part = a->packed + packed;
  a->chosen = reinterpret_cast<int64_t*>(a->part + part);
  a->chosen_rows = 0;
  for (int64_t n = 0; n < a->rows; ++n) {
    a->token[n] = a->mask_id;
    a->score[n] = -INFINITY;
    a->lse[n] = 0;
    if (!a->candidate || a->candidate[n]) a->chosen[a->chosen_rows++] = n;
  }
  const int64_t groups = parts(a->chosen_rows, kernels.group);
  share(kernels.pack_predict[is_bf16], a, groups, threads);
  share(kernels.predict[is_bf16], a, groups * tasks, threads);
  share(kernels.finish_predict, a, groups, threads);
}

void dllm_rms_norm(RmsNorm* a, int level, int is_bf16, int64_t threads) {
  a->chunk = chunk(a->width);
  share(table(level)->rms_norm[is_bf16], a, parts(a->rows, a->chunk), threads);
}

void dllm_swiglu(SwiGlu* a, int level, int is_bf16, int64_t threads) {
  a->chunk = chunk(a->width);
  share(table(level)->swiglu[is_bf16], a, parts(a->rows, a->chunk), threads);
}

void dllm_rope(Rope* a, int level, int is_bf16, int64_t threads) {
  a->chunk = chunk((a->heads + 2 * a->kv_heads) * a->head_dim);
  share(table(level)->rope[is_bf16], a, parts(a->batch * a->queries, a->chunk), threads);
}

}
