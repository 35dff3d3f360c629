// The ceilings of this CPU, in flops per second: fused multiply-adds from registers, and with one
// vector load each from a buffer in L1, L2, L3 or memory. A sparse product needs one load per
// multiply-add, so the L1 figure is its roofline. Built and called by _ceilings.py:
//   g++ -O3 -march=native -ffp-contract=fast -shared -fPIC -pthread ceilings.cc
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;
// Independent chains: enough to hide the latency of 4-5 cycles at two multiply-adds a cycle.
constexpr int kChains = 12;
constexpr int64_t kStep = kChains * kLanes;

double now(int clock) {
  timespec time;
  clock_gettime(clock ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Named variables: gcc 12 leaves an array of sums in memory as soon as an asm statement sees it.
#define EACH_CHAIN(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#if defined(__x86_64__)
#define REGISTER "+v"
#else
#define REGISTER "+w"
#endif
#define DECLARE(c) Vec sum##c = Vec{} + 0.001f * c;
// The sums must stay alive, and the compiler must not see that nobody reads them.
#define KEEP(c) asm volatile("" : REGISTER(sum##c));
#define MULTIPLY(c) sum##c = sum##c * weight + weight;
#define MULTIPLY_LOADED(c) sum##c += weight * *reinterpret_cast<const Vec*>(at + c * kLanes);

int64_t registers(int64_t rounds) {
  const Vec weight = Vec{} + 0.999f;
  EACH_CHAIN(DECLARE)
  for (int64_t i = 0; i < rounds; ++i) {
    EACH_CHAIN(MULTIPLY)
    EACH_CHAIN(KEEP)
  }
  return rounds * kStep;
}

int64_t loads(const float* buffer, int64_t floats, int64_t sweeps) {
  const Vec weight = Vec{} + 0.999f;
  EACH_CHAIN(DECLARE)
  for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
    for (const float* at = buffer; at + kStep <= buffer + floats; at += kStep) {
      EACH_CHAIN(MULTIPLY_LOADED)
    }
    EACH_CHAIN(KEEP)
  }
  return sweeps * (floats / kStep) * kStep;
}

struct Buffer {
  float* data = nullptr;
  int64_t floats = 0;
};
constexpr int kMaxThreads = 256;
constexpr int kMaxLevels = 8;
Buffer buffers[kMaxLevels][kMaxThreads];

const Buffer& buffer_for(int level, int thread, int64_t bytes) {
  Buffer& b = buffers[level][thread];
  if (b.floats * 4 != bytes) {
    std::free(b.data);
    b.data = static_cast<float*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
    b.floats = bytes / 4;
    for (int64_t i = 0; i < b.floats; ++i) b.data[i] = 1e-6f * static_cast<float>(i % 1000);
  }
  return b;
}

int64_t work(int level, int thread, int64_t bytes, int64_t rounds) {
  if (bytes == 0) return registers(rounds);
  const Buffer& b = buffer_for(level, thread, bytes);
  return loads(b.data, b.floats, rounds);
}

}  // namespace

extern "C" int ceiling_vector_bytes() { return kBytes; }

// Flops per second of `threads` threads together. `level` (0..7) names the buffer; `bytes` is its
// size per thread, 0 for registers only; `rounds` is the number of sweeps (or of register rounds).
// Each thread first sweeps once untimed and then takes its own time: on the wall clock (clock 0) or
// its CPU time (clock 1). The rates are added up.
extern "C" double ceiling(int level, int64_t bytes, int64_t rounds, int threads, int clock) {
  if (level < 0 || level >= kMaxLevels || threads < 1 || threads > kMaxThreads) return -1;
  std::vector<double> begin(threads), end(threads);
  std::vector<int64_t> elements(threads);
  auto body = [&](int t) {
    work(level, t, bytes, bytes == 0 ? rounds / 16 + 1 : 1);
    begin[t] = now(clock);
    elements[t] = work(level, t, bytes, rounds);
    end[t] = now(clock);
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(body, t);
  body(0);
  for (std::thread& thread : pool) thread.join();
  double rate = 0;  // a late start of one thread is not the CPU's fault
  for (int t = 0; t < threads; ++t) rate += 2.0 * elements[t] / (end[t] - begin[t]);
  return rate;
}
