#include "result_memory.h"

#include <pthread.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

// From torch 2.11 on; null before.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* ctx), void* deleter_ctx);

namespace sparsetrain {
namespace {

constexpr int64_t kDefaultMiB = 1024;
// A block that none of so many results took is from another model or another batch size.
constexpr int64_t kStale = 1024;

int64_t limit_from_environment() {
  const char* text = std::getenv("SPARSETRAIN_RESULT_CACHE_MIB");
  if (!text || !*text) return kDefaultMiB << 20;
  char* end = nullptr;
  errno = 0;
  const long long mib = std::strtoll(text, &end, 10);
  const bool number = *text >= '0' && *text <= '9' && *end == '\0' && !errno;
  return number && mib <= (1LL << 40) ? mib << 20 : -1;
}

// Blocks are allocated by torch, so that its profiler and whatever replaces its allocator see them.
struct Block {
  Tensor memory{nullptr};
  int64_t bytes = 0;
  int64_t freed = 0;  // how many results had been asked for then
};

class Keeper {
 public:
  const int64_t limit = limit_from_environment();
  std::mutex mutex;

  // A block of at least `bytes`, or one without memory, then to be allocated with so many.
  Block take(int64_t bytes, std::vector<Block>& gone) {
    const std::lock_guard<std::mutex> lock(mutex);
    ++asked_;
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
    peak_ = std::max(peak_, live_);
    trim(gone);
    return block;
  }

  void give(Block&& block, std::vector<Block>& gone) {
    const std::lock_guard<std::mutex> lock(mutex);
    live_ -= block.bytes;
    if (!block.memory.get()) return;  // it could not be allocated
    kept_bytes_ += block.bytes;
    block.freed = asked_;
    kept_.push_back(std::move(block));
    trim(gone);
  }

  int64_t drop_all(std::vector<Block>& gone) {
    const std::lock_guard<std::mutex> lock(mutex);
    const int64_t bytes = kept_bytes_;
    while (!kept_.empty()) drop_oldest(gone);
    peak_ = live_;
    return bytes;
  }

  ResultMemory state() {
    const std::lock_guard<std::mutex> lock(mutex);
    return {kept_bytes_, live_, limit};
  }

 private:
  using Blocks = std::vector<Block>;  // in the order in which they were freed

  // The one of exactly that size freed last, whose cache lines and pages are warmest, or else the
  // smallest that wastes no more than an eighth.
  Blocks::iterator best_fit(int64_t bytes) {
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      if (it->bytes < bytes || it->bytes - bytes > bytes / 8) continue;
      if (best == kept_.end() || it->bytes <= best->bytes) best = it;
    }
    return best;
  }

  void drop_oldest(std::vector<Block>& gone) {
    kept_bytes_ -= kept_.front().bytes;
    gone.push_back(std::move(kept_.front()));
    kept_.erase(kept_.begin());
  }

  void trim(std::vector<Block>& gone) {
    const int64_t most = std::min(limit, peak_ - live_);
    while (kept_bytes_ > most) drop_oldest(gone);
  }

  Blocks kept_;
  int64_t kept_bytes_ = 0, live_ = 0, peak_ = 0, asked_ = 0;
};

Keeper& keeper() {
  // Never destroyed: results may outlive everything else at exit.
  static Keeper* const instance = [] {
    pthread_atfork([] { keeper().mutex.lock(); }, [] { keeper().mutex.unlock(); },
                   [] { keeper().mutex.unlock(); });
    return new Keeper;
  }();
  return *instance;
}

// Gives a block back: as torch_from_blob's deleter, and where no tensor came to hold it.
void end_lease(void*, void* lease) {
  const std::unique_ptr<Block> block(static_cast<Block*>(lease));
  std::vector<Block> gone;  // freed outside of the lock
  keeper().give(std::move(*block), gone);
}
struct EndLease {
  void operator()(Block* block) const { end_lease(nullptr, block); }
};

Tensor new_memory(const Tensor& like, int64_t bytes) {
  const int64_t elements = bytes / static_cast<int64_t>(like.element_size());
  try {
    return empty_like_dtype(like, 1, &elements);
  } catch (...) {
    if (!drop_result_memory()) throw;
  }
  return empty_like_dtype(like, 1, &elements);
}

}  // namespace

Tensor empty_result(const Tensor& like, int64_t dim, const int64_t* sizes) {
  int64_t bytes = static_cast<int64_t>(like.element_size());
  for (int64_t d = 0; d < dim; ++d) bytes *= sizes[d];
  if (bytes < kMinKept || !torch_from_blob || keeper().limit <= 0)
    return empty_like_dtype(like, dim, sizes);
  std::vector<Block> gone;
  std::unique_ptr<Block, EndLease> block(new Block(keeper().take(bytes, gone)));
  gone.clear();  // before more is allocated
  if (!block->memory.get()) block->memory = new_memory(like, bytes);
  const Strides strides(dim, sizes);
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block->memory.mutable_data_ptr(), dim, sizes, strides.of, 0, dtype,
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0, end_lease,
      block.get()));
  block.release();  // end_lease has it
  return Tensor(handle);
}

ResultMemory result_memory() { return keeper().state(); }

int64_t drop_result_memory() {
  std::vector<Block> gone;
  return keeper().drop_all(gone);
}

}  // namespace sparsetrain
