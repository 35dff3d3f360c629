// What will be packed next is asked for while products are computed, which leave the memory idle: a
// few lines with each row of the pattern. Packing alone waits for memory at half its speed.
#pragma once

#include "simd-inl.h"

namespace sparsetrain {
namespace {

// `rows` rows of `bytes` bytes, `stride` apart; and as many again, `step` further on, `times`
// times.
struct Stretch {
  const char* begin = nullptr;
  int64_t bytes = 0, rows = 0, stride = 0, times = 0, step = 0;

  int64_t lines() const { return (bytes / 64 + 1) * rows * times; }
};
struct Stretches {  // one, then the other
  Stretch first, second;
};

class ReadAhead {
 public:
  ReadAhead() = default;  // asks for nothing
  // All of it within `visits` calls of some_more.
  ReadAhead(const Stretches& all, int64_t visits) : now_(all.first), then_(all.second) {
    const int64_t lines = now_.lines() + then_.lines();
    if (!now_.lines() || visits <= 0) return;
    rate_ = lines < kMostAtOnce * visits ? static_cast<int>((lines + visits - 1) / visits)
                                         : kMostAtOnce;
    at(now_.begin);
  }
  ST_INLINE void some_more() {
    if (!rate_) return;
    for (int i = 0; i < rate_; i++) __builtin_prefetch(line_ + 64 * i, 0, 2);
    line_ += 64 * rate_;
    if (line_ >= end_) next();
  }

 private:
  static constexpr int kMostAtOnce = 8;
  void at(const char* begin) {
    line_ = begin;
    end_ = begin + now_.bytes;
  }
  void next() {
    if (++row_ == now_.rows) {
      row_ = 0;
      time_++;
    }
    if (time_ == now_.times) {
      now_ = then_;
      then_ = {};
      time_ = 0;
      if (!now_.lines()) {
        rate_ = 0;
        return;
      }
    }
    at(now_.begin + time_ * now_.step + row_ * now_.stride);
  }

  Stretch now_, then_;
  const char* line_ = nullptr;
  const char* end_ = nullptr;
  int64_t row_ = 0, time_ = 0;
  int rate_ = 0;
};

}  // namespace
}  // namespace sparsetrain
