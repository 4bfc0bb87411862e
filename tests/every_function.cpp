// Calls every function of csrc/cpu on made-up values, at the plain level, and prints what comes out.
//
// A line a result: its name, then its numbers. tests/test_arm.py builds this for two processors and compares.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cpu/api.h"

extern "C" {
void dllm_attention(const Attention*, int, int, int64_t);
void dllm_linear(Linear*, int, int, int64_t);
void dllm_predict(Predict*, int, int, int64_t);
void dllm_rms_norm(RmsNorm*, int, int, int64_t);
void dllm_swiglu(SwiGlu*, int, int, int64_t);
void dllm_rope(Rope*, int, int, int64_t);
}

#if defined(__x86_64__)
extern const Kernels avx2, avx512, avx512bf16;  // of the levels that are not asked for
const Kernels avx2 = {}, avx512 = {}, avx512bf16 = {};
#endif

namespace {

uint32_t state = 1;

float number() {  // uniform in [-1, 1), the same everywhere
  state = state * 1664525u + 1013904223u;
  return float(int32_t(state) >> 8) / 8388608.0f;
}

// fp32 or bf16, as the kernels take them.
struct Tensor {
  bool bf16;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  Tensor(bool bf16, int64_t n, bool empty = false) : bf16(bf16), wide(n), narrow(n) {
    for (int64_t i = 0; i < n; ++i) {
      wide[i] = empty ? NAN : number();
      uint32_t bits;
      std::memcpy(&bits, &wide[i], 4);
      narrow[i] = uint16_t(bits >> 16);
    }
  }
  void* data() { return bf16 ? (void*)narrow.data() : (void*)wide.data(); }
  float at(int64_t i) const {
    if (!bf16) return wide[i];
    const uint32_t bits = uint32_t(narrow[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  void print(const std::string& name) const {
    std::printf("%s", name.c_str());
    for (size_t i = 0; i < wide.size(); ++i) std::printf(" %.9g", at(i));
    std::printf("\n");
  }
};

// e4m3, none of them NaN.
std::vector<uint8_t> bytes(int64_t n) {
  std::vector<uint8_t> made(n);
  for (uint8_t& x : made) x = uint8_t(int(number() * 127) & 0xFE);
  return made;
}

void print(const std::string& name, const std::vector<uint8_t>& numbers) {
  std::printf("%s", name.c_str());
  for (uint8_t x : numbers) std::printf(" %d", x);
  std::printf("\n");
}

void set(int64_t (&stride)[3], int64_t row, int64_t position, int64_t head) {
  stride[0] = row, stride[1] = position, stride[2] = head;
}

void attention(bool bf16, bool e4m3, int64_t threads, int64_t window, const std::string& name) {
  const int64_t B = 2, T = 13, H = 4, G = 2, D = 40, S = 70;
  const int64_t start[] = {3, 0}, end[] = {66, 70}, slot[] = {20, 50};
  Tensor q(bf16, B * T * H * D), k(bf16, B * S * G * D), v(bf16, B * S * G * D), out(bf16, B * T * H * D, true);
  const std::vector<uint8_t> k8 = bytes(e4m3 * B * S * G * D), v8 = bytes(e4m3 * B * S * G * D);
  Attention a = {};
  a.q = q.data(), a.out = out.data();
  a.keys = e4m3 ? (const void*)k8.data() : k.data(), a.values = e4m3 ? (const void*)v8.data() : v.data();
  a.start = start, a.end = end, a.slot = slot, a.e4m3 = e4m3;
  a.batch = B, a.queries = T, a.heads = H, a.kv_heads = G, a.head_dim = D, a.slots = S;
  set(a.q_stride, T * H * D, H * D, D), set(a.k_stride, S * G * D, G * D, D), set(a.v_stride, S * G * D, G * D, D);
  a.window = window, a.tile = 32, a.scale = e4m3 ? 0.0003f : 0.3f;
  dllm_attention(&a, 0, bf16, threads);
  out.print("attention-window" + std::to_string(window) + (e4m3 ? "-e4m3" : "") + name);
}

void states(bool bf16, bool e4m3, int64_t threads, int64_t window, const std::string& name) {
  const int64_t B = 2, L = 9, K = 3 * L, H = 4, G = 2, D = 40, S = 70, N = B * K;
  const int64_t start[] = {3, 0}, end[] = {66, 70}, first[] = {0, K, N}, hole[] = {60, 12};
  std::vector<int64_t> slot(N);
  for (int64_t i = 0; i < N; ++i) slot[i] = i % K;
  Tensor q(bf16, N * H * D), k(bf16, B * S * G * D), v(bf16, B * S * G * D), out(bf16, N * H * D, true);
  Tensor own_k(bf16, N * G * D), own_v(bf16, N * G * D);
  const std::vector<uint8_t> k8 = bytes(e4m3 * B * S * G * D), v8 = bytes(e4m3 * B * S * G * D);
  const std::vector<uint8_t> own_k8 = bytes(e4m3 * N * G * D), own_v8 = bytes(e4m3 * N * G * D);
  Attention a = {};
  a.q = q.data(), a.out = out.data();
  a.keys = e4m3 ? (const void*)k8.data() : k.data(), a.values = e4m3 ? (const void*)v8.data() : v.data();
  a.own_keys = e4m3 ? (const void*)own_k8.data() : own_k.data();
  a.own_values = e4m3 ? (const void*)own_v8.data() : own_v.data();
  a.start = start, a.end = end, a.slot = slot.data(), a.first = first, a.hole = hole, a.e4m3 = e4m3;
  a.batch = B, a.queries = K, a.heads = H, a.kv_heads = G, a.head_dim = D, a.slots = S, a.length = L, a.own_slots = K;
  set(a.q_stride, 0, H * D, D), set(a.k_stride, S * G * D, G * D, D), set(a.v_stride, S * G * D, G * D, D);
  set(a.own_k_stride, K * G * D, G * D, D), set(a.own_v_stride, K * G * D, G * D, D);
  a.window = window, a.tile = 32, a.scale = e4m3 ? 0.0003f : 0.3f;
  dllm_attention(&a, 0, bf16, threads);
  out.print("states-window" + std::to_string(window) + (e4m3 ? "-e4m3" : "") + name);
}

void linear(bool bf16, int64_t threads, int64_t rows, const std::string& name) {
  const int64_t inputs = 301, outputs = 130;
  Tensor x(bf16, rows * inputs), w(bf16, outputs * inputs), b(bf16, outputs), out(bf16, rows * outputs, true);
  Linear a = {x.data(), w.data(), b.data(), out.data(), nullptr, rows, inputs, outputs, inputs, inputs};
  dllm_linear(&a, 0, bf16, threads);
  out.print("linear-" + std::to_string(rows) + "rows" + name);
}

void predict(bool bf16, int64_t threads, int64_t rows, int confidence, float temperature, const std::string& name) {
  const int64_t d = 64, V = 1500, banned[] = {3, 9}, deferred[] = {100, 101};
  Tensor hidden(bf16, rows * d), uncond(bf16, rows * d), w(bf16, V * d), b(bf16, V);
  std::vector<int64_t> step(rows, 3), row(rows, 1), position(rows), token(rows, -1), chosen(rows);
  for (int64_t i = 0; i < rows; ++i) position[i] = 5 + i;
  Tensor score(false, rows, true), lse(false, rows, true);
  Predict a = {};
  a.hidden = hidden.data(), a.uncond = uncond.data(), a.weight = w.data(), a.bias = b.data();
  a.step = step.data(), a.row = row.data(), a.position = position.data(), a.banned = banned, a.deferred = deferred;
  a.token = token.data(), a.score = score.wide.data(), a.lse = lse.wide.data();
  a.rows = rows, a.width = d, a.vocabulary = V, a.hidden_stride = a.uncond_stride = a.weight_stride = d;
  a.banned_ranges = a.deferred_ranges = 1, a.mask_id = 7, a.confidence = confidence;
  a.seed = 12345678901234567ull, a.temperature = temperature, a.guidance = 1.5f;
  dllm_predict(&a, 0, bf16, threads);
  const std::string which = "-" + std::to_string(rows) + "rows-confidence" + std::to_string(confidence) + name;
  std::printf("token%s", which.c_str());
  for (int64_t id : token) std::printf(" %lld", (long long)id);
  std::printf("\n");
  score.print("score" + which), lse.print("lse" + which);
}

void rms_norm(bool bf16, int64_t threads, const std::string& name) {
  const int64_t rows = 9, d = 101;
  Tensor x(bf16, rows * d), residual(bf16, rows * d), w(bf16, d), y(bf16, rows * d, true), sum(bf16, rows * d, true);
  RmsNorm a = {x.data(), residual.data(), w.data(), y.data(), sum.data(), rows, d, d, d, 0, 1e-5};
  dllm_rms_norm(&a, 0, bf16, threads);
  y.print("rms_norm" + name), sum.print("rms_norm-sum" + name);
}

void swiglu(bool bf16, int64_t threads, const std::string& name) {
  const int64_t rows = 9, f = 101;
  Tensor gate(bf16, rows * f), up(bf16, rows * f), out(bf16, rows * f, true);
  SwiGlu a = {gate.data(), up.data(), out.data(), rows, f, f, f, 0};
  dllm_swiglu(&a, 0, bf16, threads);
  out.print("swiglu" + name);
}

void rope(bool bf16, bool e4m3, int64_t threads, const std::string& name) {
  const int64_t B = 2, T = 5, H = 4, G = 2, D = 24, S = 12, P = 40, position[] = {3, 20}, slot[] = {0, 7};
  Tensor q(bf16, B * T * H * D), k(bf16, B * T * G * D), v(bf16, B * T * G * D), out(bf16, B * T * H * D, true);
  Tensor cos(false, P * D / 2), sin(false, P * D / 2), keys(bf16, B * S * G * D), values(bf16, B * S * G * D);
  std::vector<uint8_t> keys8 = bytes(e4m3 * B * S * G * D), values8 = bytes(e4m3 * B * S * G * D);
  Rope a = {};
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.cos = cos.wide.data(), a.sin = sin.wide.data();
  a.position = position, a.slot = slot, a.out = out.data(), a.e4m3 = e4m3;
  a.keys = e4m3 ? (void*)keys8.data() : keys.data(), a.values = e4m3 ? (void*)values8.data() : values.data();
  a.batch = B, a.queries = T, a.heads = H, a.kv_heads = G, a.head_dim = D, a.slots = S, a.positions = P;
  a.cos_stride = a.sin_stride = D / 2;
  set(a.q_stride, T * H * D, H * D, D), set(a.k_stride, T * G * D, G * D, D), set(a.v_stride, T * G * D, G * D, D);
  set(a.keys_stride, S * G * D, G * D, D), set(a.values_stride, S * G * D, G * D, D);
  dllm_rope(&a, 0, bf16, threads);
  if (e4m3) return print("rope-keys-e4m3" + name, keys8), print("rope-values-e4m3" + name, values8);
  out.print("rope" + name), keys.print("rope-keys" + name), values.print("rope-values" + name);
}

}  // namespace

int main() {
  for (bool bf16 : {false, true})
    for (int64_t threads : {1, 3}) {
      state = 1;
      const std::string name = std::string(bf16 ? "-bf16" : "-fp32") + "-threads" + std::to_string(threads);
      for (int64_t window : {-1, 5}) attention(bf16, false, threads, window, name);
      for (int64_t rows : {1, 2, 3, 7, 19, 70, 200}) linear(bf16, threads, rows, name);
      for (int confidence : {PROBABILITY, MARGIN, ENTROPY, RANDOM})
        for (int64_t rows : {1, 3, 19}) predict(bf16, threads, rows, confidence, 0.7f, name);
      rms_norm(bf16, threads, name);
      swiglu(bf16, threads, name);
      rope(bf16, false, threads, name);
      for (int64_t window : {-1, 5}) attention(bf16, true, threads, window, name);
      rope(bf16, true, threads, name);
      for (bool e4m3 : {false, true})
        for (int64_t window : {-1, 5}) states(bf16, e4m3, threads, window, name);
    }
}
