// Memory that was freed, kept for what is needed next. New memory costs a page fault for each of
// its pages: for results of some size as much as a product of few nonzeros.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace sparsetrain {

// What a process may keep: SPARSETRAIN_CACHE_MIB, 1024 MiB where it is not set. Negative where it
// is no number of MiB.
int64_t kept_memory_limit();

// All memory of one kind. What is kept never makes the sum more than what was once in use at the
// same time, nor does it exceed the kind's limit; what nothing used for a while goes.
//
// Memory: by default none; true where it holds some; freed with it. Memory::limit() is the most to
// keep, Memory::most_for(bytes) the size of the largest block to use for so many.
template <class Memory>
class KeptMemory {
 public:
  struct Block {
    Memory memory{};
    int64_t bytes = 0;
    int64_t freed = 0;  // how many blocks had been asked for then
  };
  typedef std::vector<Block> Blocks;  // in the order in which they were freed
  struct State {
    int64_t kept, live;  // bytes
  };

  static KeptMemory& instance() {
    // Never destroyed: tensors may outlive everything else at exit.
    static KeptMemory* const only = [] {
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                     [] { instance().mutex_.unlock(); });
      return new KeptMemory;
    }();
    return *only;
  }

  // A block of `bytes` or more; one without memory is the caller's to allocate. What is to be freed
  // before that, and not under the lock, is added to `gone`, here and below.
  Block take(int64_t bytes, Blocks& gone) {
    const std::lock_guard<std::mutex> lock(mutex_);
    asked_++;
    while (!kept_.empty() && asked_ - kept_.front().freed > kStale) drop_oldest(gone);
    Block block;
    const auto fit = best_fit(bytes);
    if (fit != kept_.end()) {
      block = std::move(*fit);
      kept_.erase(fit);
      kept_bytes_ -= block.bytes;
      live_ += block.bytes;
      return block;
    }
    block.bytes = bytes;
    live_ += bytes;
    most_live_ = std::max(most_live_, live_);
    trim(gone);
    return block;
  }
  // Without memory, it is one that could not be allocated.
  void give(Block&& block, Blocks& gone) {
    const std::lock_guard<std::mutex> lock(mutex_);
    live_ -= block.bytes;
    if (!block.memory) return;
    kept_bytes_ += block.bytes;
    block.freed = asked_;
    kept_.push_back(std::move(block));
    trim(gone);
  }
  // The bytes of all that is kept.
  int64_t drop_all(Blocks& gone) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = kept_bytes_;
    while (!kept_.empty()) drop_oldest(gone);
    most_live_ = live_;
    return bytes;
  }
  State state() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {kept_bytes_, live_};
  }

 private:
  // A block that none of so many took is from another model or another batch size.
  static constexpr int64_t kStale = 1024;

  // The smallest that will do; of equals the one freed last, whose lines and pages are warmest.
  typename Blocks::iterator best_fit(int64_t bytes) {
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      if (it->bytes < bytes || it->bytes > Memory::most_for(bytes)) continue;
      if (best == kept_.end() || it->bytes <= best->bytes) best = it;
    }
    return best;
  }
  void drop_oldest(Blocks& gone) {
    kept_bytes_ -= kept_.front().bytes;
    gone.push_back(std::move(kept_.front()));
    kept_.erase(kept_.begin());
  }
  void trim(Blocks& gone) {
    const int64_t most = std::min(Memory::limit(), most_live_ - live_);
    while (kept_bytes_ > most) drop_oldest(gone);
  }

  std::mutex mutex_;
  Blocks kept_;
  int64_t kept_bytes_ = 0, live_ = 0, most_live_ = 0, asked_ = 0;
};

}  // namespace sparsetrain
