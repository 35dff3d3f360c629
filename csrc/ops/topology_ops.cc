// torch.ops.sparsetrain.change_pattern: which weights exist, changed in O(nnz).
#include <string>
#include <tuple>

#include "checks.h"
#include "topology.h"

namespace sparsetrain {
namespace {

const char* describe(GrowthFault fault) {
  switch (fault) {
    case GrowthFault::out_of_range: return "is outside the weight";
    case GrowthFault::not_increasing: return "is not above the one before it";
    case GrowthFault::already_there: return "is a weight that exists and is not dropped";
    case GrowthFault::none: break;
  }
  return "is fine";
}

// crow (rows + 1), col (nnz), drop (nnz) bool, grown (g) int64
//   -> crow (rows + 1), col (n), source (n), with n = nnz - dropped + g
std::tuple<Tensor, Tensor, Tensor> change_pattern_op(const Tensor& crow, const Tensor& col,
                                                     int64_t cols, const Tensor& drop,
                                                     const Tensor& grown) {
  constexpr const char* op = "change_pattern";
  check_pattern_tensors(op, crow, col, cols);
  check_layout(op, "drop", drop, 1);
  check_layout(op, "grown", grown, 1);
  require(drop.scalar_type() == ScalarType::Bool, op, "drop must be bool, got ",
          torch::headeronly::toString(drop.scalar_type()));
  require(grown.scalar_type() == ScalarType::Long, op, "grown must be int64, got ",
          torch::headeronly::toString(grown.scalar_type()));
  const Pattern pattern = pattern_view(crow, col, cols);
  require_valid(pattern);
  check_length(op, "drop", drop.size(0), "nonzeros of the pattern", pattern.nnz);
  const Tensor drop_c = as_contiguous(drop), grown_c = as_contiguous(grown);
  const auto* drops = static_cast<const uint8_t*>(drop_c.const_data_ptr());
  const auto* grows = static_cast<const int64_t*>(grown_c.const_data_ptr());
  const int64_t nnz = count_kept(pattern, drops) + grown.size(0);
  require(nnz <= kMaxIndex, op, "the new pattern would have ", nnz,
          " nonzeros, more than int32 indices can count (", kMaxIndex, ")");
  const Tensor new_crow = empty_vector(crow, crow.size(0));
  const Tensor new_col = empty_vector(crow, nnz);
  const Tensor source = empty_vector(crow, nnz);
  const GrowthCheck found = change_pattern(pattern, drops, grows, grown.size(0),
                                           static_cast<int32_t*>(new_crow.mutable_data_ptr()),
                                           static_cast<int32_t*>(new_col.mutable_data_ptr()),
                                           static_cast<int32_t*>(source.mutable_data_ptr()));
  if (found.fault != GrowthFault::none) {
    require(false, op, "grown[", found.where, "] = ", grows[found.where], " ",
            describe(found.fault), "; grown must hold positions in the flattened weight of ",
            pattern.rows, " x ", cols, ", increasing, none of them kept");
  }
  return {new_crow, new_col, source};
}

}  // namespace
}  // namespace sparsetrain

STABLE_TORCH_LIBRARY_FRAGMENT(sparsetrain, m) {
  m.def(
      "change_pattern(Tensor crow, Tensor col, int cols, Tensor drop, Tensor grown) "
      "-> (Tensor crow, Tensor col, Tensor source)");
}

STABLE_TORCH_LIBRARY_IMPL(sparsetrain, CPU, m) {
  m.impl("change_pattern", TORCH_BOX(&sparsetrain::change_pattern_op));
}
