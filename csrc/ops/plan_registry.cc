#include "plan_registry.h"

#include <pthread.h>

#include <mutex>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <utility>

namespace sparsetrain {
namespace {

using torch::stable::Tensor;
using EntryPtr = std::shared_ptr<const PlanEntry>;

// Plans are built and destroyed outside of the lock: destroying an entry may release the last
// reference to a tensor, which may need Python's lock, and fork() must never wait for a build.
struct Registry {
  std::mutex mutex;
  std::unordered_map<int64_t, EntryPtr> entries;
};

Registry& registry() {
  // Never destroyed: at exit, torch may be gone before us.
  static Registry* const instance = [] {
    pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                   [] { registry().mutex.unlock(); });
    return new Registry;
  }();
  return *instance;
}

EntryPtr find(int64_t key) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const auto it = r.entries.find(key);
  return it == r.entries.end() ? nullptr : it->second;
}

}  // namespace

Pattern pattern_view(const Tensor& crow, const Tensor& col, int64_t cols) {
  return Pattern{crow.size(0) - 1, cols, col.size(0),
                 static_cast<const int32_t*>(crow.const_data_ptr()),
                 static_cast<const int32_t*>(col.const_data_ptr())};
}

void require_valid(const Pattern& p) {
  const PatternCheck check = check_pattern(p);
  if (check.fault == PatternFault::none) return;
  const int64_t k = check.where;
  std::ostringstream message;
  message << "crow/col are no valid pattern of " << p.rows << " x " << p.cols << " with " << p.nnz
          << " nonzeros: ";
  switch (check.fault) {
    case PatternFault::none: break;
    case PatternFault::crow_start: message << "crow[0] is " << p.crow[0] << ", it must be 0"; break;
    case PatternFault::crow_decreasing:
      message << "crow[" << k << "] = " << p.crow[k] << " is greater than crow[" << k + 1
              << "] = " << p.crow[k + 1] << "; row offsets must not decrease";
      break;
    case PatternFault::crow_end:
      message << "crow[" << p.rows << "] is " << p.crow[p.rows]
              << ", it must be the number of nonzeros";
      break;
    case PatternFault::col_out_of_range:
      message << "col[" << k << "] is " << p.col[k] << ", it must be in [0, " << p.cols << ")";
      break;
    case PatternFault::col_unsorted:
      message << "col[" << k << "] = " << p.col[k] << " comes after " << p.col[k - 1]
              << "; columns must increase inside each row";
      break;
    case PatternFault::col_duplicate:
      message << "col[" << k << "] = " << p.col[k] << " is there twice in one row";
      break;
  }
  throw std::runtime_error(message.str());
}

PlanEntry::PlanEntry(Tensor crow, Tensor col, int64_t cols)
    : crow_(std::move(crow)), col_(std::move(col)), pattern_(pattern_view(crow_, col_, cols)) {
  require_valid(pattern_);
  plan_ = plan_create(pattern_);
}

PlanEntry::~PlanEntry() { plan_destroy(plan_); }

bool PlanEntry::describes(const Pattern& p) const {
  return p.crow == pattern_.crow && p.col == pattern_.col && p.rows == pattern_.rows &&
         p.cols == pattern_.cols && p.nnz == pattern_.nnz;
}

EntryPtr find_or_build_plan(int64_t key, const Tensor& crow, const Tensor& col, int64_t cols) {
  EntryPtr entry = find(key);
  if (entry && entry->describes(pattern_view(crow, col, cols))) return entry;

  // Two threads may both build here; the later one's entry stays, and both are right.
  entry = std::make_shared<PlanEntry>(crow, col, cols);
  EntryPtr replaced = entry;
  {
    Registry& r = registry();
    std::lock_guard<std::mutex> lock(r.mutex);
    std::swap(r.entries[key], replaced);
  }
  return entry;
}

void forget_plan(int64_t key) {
  EntryPtr forgotten;
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const auto it = r.entries.find(key);
  if (it == r.entries.end()) return;
  forgotten = std::move(it->second);
  r.entries.erase(it);
}

int64_t cached_plan_bytes(int64_t key) {
  const EntryPtr entry = find(key);
  return entry ? static_cast<int64_t>(plan_bytes(entry->plan())) : 0;
}

}  // namespace sparsetrain
