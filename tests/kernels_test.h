// What the kernel tests share: inputs and outputs that notice stray accesses, patterns, ways to run
// in parallel, and comparisons with the oracle.
#pragma once

#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "reference.h"

namespace sparsetrain {
namespace test {

void test_convolutions(bool quick);  // kernels_conv_test.cc

// ---- counting -----------------------------------------------------------------------------------

inline int64_t passed = 0, failed = 0;
inline double worst[3] = {0, 0, 0};  // per dtype: largest |error| / bound of a passed comparison

inline bool check(bool ok, const std::string& what) {
  if (ok) {
    passed++;
  } else if (++failed <= 50) {
    std::printf("FAILED  %s\n", what.c_str());
  }
  return ok;
}

inline const char* name_of(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::f64 ? "f64" : "bf16";
}
inline size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::f64 ? 8 : 2; }

// ---- random numbers and memory ------------------------------------------------------------------

struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }  // [0, 1)
};

inline uint16_t round_to_bf16(double exact) {
  const float x = static_cast<float>(exact);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t low = bits & 0xffffu;
  bits >>= 16;
  if (low > 0x8000u || (low == 0x8000u && (bits & 1))) bits++;
  return static_cast<uint16_t>(bits);
}

inline void write(DType dtype, void* data, int64_t i, double value) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[i] = static_cast<float>(value);
  } else if (dtype == DType::f64) {
    static_cast<double*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = round_to_bf16(value);
  }
}

// An array that starts one element off every vector boundary, ends where its heap block ends (so
// that an address sanitizer sees the first byte read behind it), and is null where it is empty,
// as an empty tensor is.
class Input {
 public:
  Input(DType dtype, int64_t count) : bytes_((count + 1) * size_of(dtype)) {
    memory_.reset(new (std::align_val_t(64)) unsigned char[bytes_]);
    data_ = count ? memory_.get() + size_of(dtype) : nullptr;
  }
  void* data() const { return data_; }

 private:
  struct Free {
    void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  size_t bytes_;
  std::unique_ptr<unsigned char[], Free> memory_;
  void* data_;
};

// An array between guards, one element off every vector boundary, holding garbage (NaN).
class Output {
 public:
  Output(DType dtype, int64_t count)
      : front_(kGuard + size_of(dtype)),
        bytes_(count * size_of(dtype)),
        memory_(front_ + bytes_ + kGuard, 0xff) {}
  void* data() { return memory_.data() + front_; }  // never null: null means "not wanted"
  const void* data() const { return memory_.data() + front_; }
  size_t bytes() const { return bytes_; }
  bool guards_intact() const {
    for (size_t i = 0; i < memory_.size(); i++)
      if ((i < front_ || i >= front_ + bytes_) && memory_[i] != 0xff) return false;
    return true;
  }
  bool same_bytes(const Output& other) const {
    return bytes_ == other.bytes_ && (!bytes_ || !std::memcmp(data(), other.data(), bytes_));
  }

 private:
  static constexpr size_t kGuard = 256;
  size_t front_, bytes_;
  std::vector<unsigned char> memory_;
};

enum class Fill { signed_uniform, small_integers };

inline void fill(Random* random, Fill kind, DType dtype, void* data, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const double u = random->uniform();
    const double v = kind == Fill::small_integers ? static_cast<int>(u * 9) - 4 : 2 * u - 1;
    write(dtype, data, i, v);
  }
}

inline std::shared_ptr<Input> random_array(Random* random, Fill kind, DType dtype, int64_t count) {
  auto array = std::make_shared<Input>(dtype, count);
  fill(random, kind, dtype, array->data(), 0, count);
  return array;
}

// rows x cols with `gap` elements between rows, which hold NaN: no result may depend on them.
struct RandomMatrix {
  RandomMatrix(Random* random, Fill kind, DType dtype, int64_t rows, int64_t cols, int64_t gap)
      : input(dtype, rows ? (rows - 1) * (cols + gap) + cols : 0),
        view{input.data(), rows, cols, cols + gap} {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = r * (cols + gap);
      fill(random, kind, dtype, input.data(), at, at + cols);
      for (int64_t g = 0; g < gap && r + 1 < rows; g++)
        write(dtype, input.data(), at + cols + g, std::numeric_limits<double>::quiet_NaN());
    }
    if (rows == 1) view.row_stride = gap ? 0 : 987654321;  // one row: any stride is fine
  }
  Input input;
  Matrix view;
};

// ---- patterns -----------------------------------------------------------------------------------

struct TestPattern {
  // Every second row is empty if `gaps`. Density 1 gives a full row.
  TestPattern(Random* random, int64_t rows, int64_t cols, double density, bool gaps) {
    crow.push_back(0);
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t c = 0; c < cols && !(gaps && r % 2 == 0); c++)
        if (random->uniform() < density) col.push_back(static_cast<int32_t>(c));
      crow.push_back(static_cast<int32_t>(col.size()));
    }
    finish(cols);
  }
  TestPattern(std::vector<int32_t> crow, std::vector<int32_t> col, int64_t cols)
      : crow(std::move(crow)), col(std::move(col)) {
    finish(cols);
  }
  void finish(int64_t cols) {
    crow.shrink_to_fit();
    col.shrink_to_fit();
    view = {static_cast<int64_t>(crow.size()) - 1, cols, static_cast<int64_t>(col.size()),
            crow.data(), col.empty() ? nullptr : col.data()};
  }
  std::vector<int32_t> crow, col;
  Pattern view;
};

struct PlanDeleter {
  void operator()(Plan* plan) const { plan_destroy(plan); }
};
using PlanPtr = std::unique_ptr<Plan, PlanDeleter>;
inline PlanPtr make_plan(const TestPattern& pattern) { return PlanPtr(plan_create(pattern.view)); }

// ---- ways to run in parallel --------------------------------------------------------------------

inline int64_t runs = 0;  // how often any of these was called

inline void run_in_order(int64_t n, void (*body)(void*, int64_t), void* ctx) {
  runs++;
  for (int64_t i = 0; i < n; i++) body(ctx, i);
}
inline void run_in_reverse(int64_t n, void (*body)(void*, int64_t), void* ctx) {
  runs++;
  for (int64_t i = n - 1; i >= 0; i--) body(ctx, i);
}
inline void run_on_threads(int64_t n, void (*body)(void*, int64_t), void* ctx) {
  runs++;
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < n; i++) threads.emplace_back(body, ctx, i);
  if (n) body(ctx, 0);
  for (std::thread& thread : threads) thread.join();
}
constexpr Parallel kSerial{run_in_order, 1};

// ---- comparisons --------------------------------------------------------------------------------

// Sums in float (f32, bf16) or double, rounded once more to the storage type. The constant covers
// sums of up to some hundred terms in any order; the closing lines print how much of it is used.
inline double bound(DType dtype, const reference::Sum& expected) {
  constexpr double kConstant = 8;
  const double eps = dtype == DType::f64 ? std::numeric_limits<double>::epsilon()
                                         : double{std::numeric_limits<float>::epsilon()};
  const double rounding = dtype == DType::bf16 ? 0x1p-8 * std::fabs(expected.value) : 0;
  return kConstant * eps * expected.magnitude + rounding;
}

// The first element that is wrong, or -1.
inline int64_t first_wrong(DType dtype, Fill kind, const std::vector<reference::Sum>& expected,
                           const void* got) {
  for (size_t i = 0; i < expected.size(); i++) {
    const double value = reference::read(dtype, got, i);
    if (kind == Fill::small_integers) {
      double exact;  // every sum is exact in float: only the store may round
      write(dtype, &exact, 0, expected[i].value);
      if (!(value == reference::read(dtype, &exact, 0))) return i;
      continue;
    }
    const double error = std::fabs(value - expected[i].value), limit = bound(dtype, expected[i]);
    if (!(error <= limit)) return i;
    double& seen = worst[static_cast<int>(dtype)];
    if (limit > 0 && error / limit > seen) seen = error / limit;
  }
  return -1;
}

struct Case {
  const KernelTable* table;
  DType dtype;
  Fill kind;
  std::string shape;
  std::string text(const char* op) const {
    return std::string(op) + " " + table->isa + " " + name_of(dtype) + " " + shape +
           (kind == Fill::small_integers ? " integers" : "");
  }
};

using Launch = std::function<void(void*, const Parallel&)>;

// Runs `launch(output, parallel)` serially, compares it, then demands the same bytes from each of
// `parallels`.
inline void check_kernel(const Case& c, const char* op, const std::vector<reference::Sum>& expected,
                         const std::vector<Parallel>& parallels, const Launch& launch) {
  const int64_t count = static_cast<int64_t>(expected.size());
  Output serial(c.dtype, count);
  launch(serial.data(), kSerial);
  check(serial.guards_intact(), c.text(op) + ": wrote outside of its output");
  const int64_t wrong = first_wrong(c.dtype, c.kind, expected, serial.data());
  if (!check(wrong < 0, c.text(op))) {
    std::printf("        element %lld of %lld: got %.9g, expected %.9g +- %.3g\n",
                static_cast<long long>(wrong), static_cast<long long>(count),
                reference::read(c.dtype, serial.data(), wrong), expected[wrong].value,
                bound(c.dtype, expected[wrong]));
  }
  for (const Parallel& parallel : parallels) {
    Output other(c.dtype, count);
    launch(other.data(), parallel);
    check(other.guards_intact() && other.same_bytes(serial),
          c.text(op) + ": " + std::to_string(parallel.threads) +
              " threads give another result than 1");
  }
}

}  // namespace test
}  // namespace sparsetrain
