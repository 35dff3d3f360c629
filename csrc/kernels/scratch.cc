#include "scratch.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "kept_memory.h"

namespace sparsetrain {
namespace {

constexpr int64_t kDefaultMiB = 1024, kMostMiB = int64_t{1} << 40;
constexpr int64_t kMostScratch = 64 << 20;
#if defined(__SANITIZE_ADDRESS__)
// The sanitizer shall see where each ends, and tests that nothing depends on what was in it.
constexpr int64_t kLeastKept = INT64_MAX;
constexpr bool kFilledWithNaN = true;
#else
constexpr int64_t kLeastKept = 64 << 10;  // less comes from the C library's heap, mapped already
constexpr bool kFilledWithNaN = false;
#endif

int64_t limit_from_environment() {
  const char* text = std::getenv("SPARSETRAIN_CACHE_MIB");
  if (!text || !*text) return kDefaultMiB << 20;
  char* end = nullptr;
  errno = 0;
  const long long mib = std::strtoll(text, &end, 10);
  const bool number = *text >= '0' && *text <= '9' && *end == '\0' && !errno && mib <= kMostMiB;
  return number ? mib << 20 : -1;
}

struct Free {
  void operator()(void* data) const { std::free(data); }
};
struct ScratchMemory : std::unique_ptr<void, Free> {
  using std::unique_ptr<void, Free>::unique_ptr;
  static int64_t limit() { return std::min(kept_memory_limit(), kMostScratch); }
  static int64_t most_for(int64_t bytes) { return bytes; }  // give_scratch must know it
};
typedef KeptMemory<ScratchMemory> Kept;

// Blocks come in eighths of powers of two, so that calls of about the same size share them, with
// room for a vector that is read at the last element.
int64_t block_bytes(int64_t bytes) {
  const int64_t least = bytes + 64;
  int64_t step = 64;
  while (step * 16 <= least) step *= 2;
  return (least + step - 1) / step * step;
}

void* allocate(int64_t bytes) {
  void* const data = std::aligned_alloc(64, static_cast<size_t>(bytes));
  if (!data) throw std::bad_alloc();
  if (kFilledWithNaN) std::memset(data, 0xff, static_cast<size_t>(bytes));
  return data;
}

}  // namespace

int64_t kept_memory_limit() {
  static const int64_t limit = limit_from_environment();
  return limit;
}

void* take_scratch(int64_t bytes) {
  const int64_t size = block_bytes(bytes);
  if (size < kLeastKept || kept_memory_limit() <= 0) return allocate(size);
  Kept::Blocks gone;
  Kept::Block block = Kept::instance().take(size, gone);
  if (block.memory) return block.memory.release();
  gone.clear();  // before more is allocated
  try {
    return allocate(size);
  } catch (...) {
    Kept::instance().give(std::move(block), gone);
    throw;
  }
}

void give_scratch(void* data, int64_t bytes) {
  const int64_t size = block_bytes(bytes);
  if (!data || size < kLeastKept || kept_memory_limit() <= 0) return std::free(data);
  Kept::Blocks gone;
  Kept::Block block;
  block.memory.reset(data);
  block.bytes = size;
  Kept::instance().give(std::move(block), gone);
}

int64_t drop_scratch() {
  Kept::Blocks gone;
  return Kept::instance().drop_all(gone);
}

}  // namespace sparsetrain
