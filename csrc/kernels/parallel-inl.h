// Sharing out work. No result may depend on which worker takes which item.
#pragma once

#include <sched.h>

#include <cstdint>

#include "kernels.h"
#include "scratch.h"
#include "simd-inl.h"

namespace sparsetrain {
namespace {

// Scratch memory, aligned for any vector; not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(count * static_cast<int64_t>(sizeof(T))),
        data_(static_cast<T*>(take_scratch(bytes_))) {}
  ~Scratch() { give_scratch(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  const int64_t bytes_;
  T* const data_;
};

// Calls body(worker, item) once for every item; workers take the next item when they are free, so
// that a core that is slowed down does not hold up the others. worker < workers.
template <class Body>
void share(const Parallel& parallel, int workers, int64_t items, const Body& body) {
  if (workers <= 1 || items <= 1) {
    for (int64_t i = 0; i < items; i++) body(0, i);
    return;
  }
  struct Context {
    const Body& body;
    int64_t items;
    int64_t next;
  } context{body, items, 0};
  parallel.run(
      workers,
      [](void* opaque, int64_t worker) {
        Context& c = *static_cast<Context*>(opaque);
        for (;;) {
          const int64_t i = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
          if (i >= c.items) break;
          c.body(static_cast<int>(worker), i);
        }
        stream_fence();  // before another thread may be told that this one is done
      },
      &context);
}

// Whether no worker waits long for the others, if each item is one's own.
ST_INLINE bool shared_evenly(int64_t items, int workers) {
  return workers == 1 || items >= 4 * workers || items % workers == 0;
}

// Lets the items of each of `parts` lines pass in order: wait(p, i) returns once done(p, i - 1) was
// called. Items must be started in order, as `share` does; so the one waited for is under way.
class OneByOne {
 public:
  explicit OneByOne(int64_t parts) : next_(parts) {
    for (int64_t p = 0; p < parts; p++) next_.get()[p] = 0;
  }
  void wait(int64_t p, int64_t i) const {
    for (int spins = 0; __atomic_load_n(next_.get() + p, __ATOMIC_ACQUIRE) != i; spins++)
      if (spins > 1000) sched_yield();
  }
  void done(int64_t p, int64_t i) { __atomic_store_n(next_.get() + p, i + 1, __ATOMIC_RELEASE); }

 private:
  Scratch<int64_t> next_;
};

// total (count) = the sums of all pieces. body(worker, piece, sums) adds one piece's to `sums`,
// which are zero. Pieces are added in order, whoever makes them: the result is the same.
template <class T, class Body>
void sum_pieces(const Parallel& parallel, int workers, int64_t pieces, int64_t count, T* total,
                const Body& body) {
  Scratch<T> apart(pieces > 1 ? count * workers : 0);
  OneByOne order(1);
  share(parallel, workers, pieces, [&](int worker, int64_t i) {
    T* sums = i ? apart.get() + worker * count : total;
    __builtin_memset(sums, 0, sizeof(T) * count);
    body(worker, i, sums);
    order.wait(0, i);
    for (int64_t k = 0; i && k < count; k++) total[k] += sums[k];
    order.done(0, i);
  });
}

// Threads worth waking: a region costs about 2 us, the time of some 50,000 products.
ST_INLINE int worth_waking(const Parallel& parallel, int64_t products) {
  const int64_t most = products / 50000 + 1;
  return static_cast<int>(parallel.threads < most ? parallel.threads : most);
}

ST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ST_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
ST_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace sparsetrain
