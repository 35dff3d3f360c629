// From a pattern's key to its Plan. A plan is built on the first call that needs it, is never
// saved, and goes when the Python pattern goes (forget_plan).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>

#include "kernels.h"

namespace sparsetrain {

// One plan and the index tensors it was built from. Whoever holds the shared_ptr may use the plan,
// even where another thread forgets the key meanwhile.
class PlanEntry {
 public:
  // crow: (rows + 1) int32 contiguous, col: (nnz) int32 contiguous.
  // Throws std::runtime_error where they are no valid pattern: no kernel ever sees one.
  PlanEntry(torch::stable::Tensor crow, torch::stable::Tensor col, int64_t cols);
  ~PlanEntry();
  PlanEntry(const PlanEntry&) = delete;
  PlanEntry& operator=(const PlanEntry&) = delete;

  const Plan* plan() const { return plan_; }
  const Pattern& pattern() const { return pattern_; }
  bool describes(const Pattern& pattern) const;

 private:
  torch::stable::Tensor crow_, col_;  // so that their memory cannot be reused for another pattern
  Pattern pattern_;
  Plan* plan_;
};

// The kernels' view of two checked index tensors.
Pattern pattern_view(const torch::stable::Tensor& crow, const torch::stable::Tensor& col,
                     int64_t cols);

// Throws std::runtime_error, naming the fault and the place, unless the pattern is valid.
void require_valid(const Pattern& pattern);

// The plan of `key`, built (or rebuilt, where the key's plan belongs to other index tensors) if
// needed. Safe from several threads at once and across fork().
std::shared_ptr<const PlanEntry> find_or_build_plan(int64_t key, const torch::stable::Tensor& crow,
                                                    const torch::stable::Tensor& col, int64_t cols);

void forget_plan(int64_t key);           // an unknown key is fine
int64_t cached_plan_bytes(int64_t key);  // 0 for an unknown key

}  // namespace sparsetrain
