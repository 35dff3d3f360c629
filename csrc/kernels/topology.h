// Changing which weights exist, in O(nnz + grown): no dense mask is ever made.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace sparsetrain {

// What is wrong with `grown`, and at which of its entries.
enum class GrowthFault : int { none = 0, out_of_range, not_increasing, already_there };
struct GrowthCheck {
  GrowthFault fault;
  int64_t where;
};

// How many of the pattern's nonzeros stay. drop: nnz entries, nonzero where one goes.
int64_t count_kept(const Pattern& pattern, const uint8_t* drop);

// The pattern without its dropped nonzeros and with the grown ones.
//   drop: (nnz), nonzero where a weight goes
//   grown: (n_grown) positions in weight.reshape(-1), strictly increasing; a dropped position may
//     be among them, and is then a newcomer like the others
//   crow: (rows + 1), col and source: (count_kept + n_grown), written in full unless there is a
//     fault; source[k] is where the k-th weight was among the old ones, or -1 for a newcomer
// The pattern must have passed check_pattern. No buffer overlaps another.
GrowthCheck change_pattern(const Pattern& pattern, const uint8_t* drop, const int64_t* grown,
                           int64_t n_grown, int32_t* crow, int32_t* col, int32_t* source);

}  // namespace sparsetrain
