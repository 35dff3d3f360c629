#include "topology.h"

namespace sparsetrain {

int64_t count_kept(const Pattern& p, const uint8_t* drop) {
  int64_t kept = 0;
  for (int64_t k = 0; k < p.nnz; k++) kept += drop[k] == 0;
  return kept;
}

GrowthCheck change_pattern(const Pattern& p, const uint8_t* drop, const int64_t* grown,
                           int64_t n_grown, int32_t* crow, int32_t* col, int32_t* source) {
  const int64_t size = p.rows * p.cols;
  for (int64_t g = 0; g < n_grown; g++) {
    if (grown[g] < 0 || grown[g] >= size) return {GrowthFault::out_of_range, g};
    if (g > 0 && grown[g] <= grown[g - 1]) return {GrowthFault::not_increasing, g};
  }
  int64_t g = 0, n = 0;
  crow[0] = 0;
  for (int64_t r = 0; r < p.rows; r++) {
    const int64_t start = r * p.cols, end = start + p.cols;
    for (int64_t k = p.crow[r]; k < p.crow[r + 1]; k++) {
      if (drop[k]) continue;
      const int64_t here = start + p.col[k];
      for (; g < n_grown && grown[g] < here; g++, n++) {
        col[n] = static_cast<int32_t>(grown[g] - start);
        source[n] = -1;
      }
      if (g < n_grown && grown[g] == here) return {GrowthFault::already_there, g};
      col[n] = p.col[k];
      source[n++] = static_cast<int32_t>(k);
    }
    for (; g < n_grown && grown[g] < end; g++, n++) {
      col[n] = static_cast<int32_t>(grown[g] - start);
      source[n] = -1;
    }
    crow[r + 1] = static_cast<int32_t>(n);
  }
  return {GrowthFault::none, 0};
}

}  // namespace sparsetrain
