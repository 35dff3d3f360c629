// 1x1 convolutions of stride 1. What they take is mostly memory, so that each tensor is read or
// written once: tile by tile of pixels, channel by channel of one tensor (mostly the one with more
// of them), from its planes or to them. Of the other tensor, a tile of all channels is kept. Both
// gradients come from one pass, and nothing is copied but what is kept.
#pragma once

#include <cstdint>
#include <memory>

#include "plan.h"

namespace sparsetrain {

// Rows are channels of the tensor that is passed over, and cells their nonzeros. Rows are visited
// from those with fewest to those with most, as in a sweep (plan.h); nonzeros lie in that order.
struct PointwiseSide {
  bool by_input = false;  // rows are input channels, else output channels
  int64_t rows = 0, kept = 0, nnz = 0;
  int64_t empty = 0;  // rows without a nonzero, the first ones
  int64_t run_count = 0;
  std::unique_ptr<CellRun[]> runs;
  std::unique_ptr<int32_t[]> row;  // of each visit; and kPointwiseAhead more, the first ones again
  std::unique_ptr<int32_t[]> first;   // of each row: the place of its first nonzero
  std::unique_ptr<uint16_t[]> index;  // of each nonzero: its place in the kept tile, in 8 bytes

  size_t bytes() const;
};
// Rows whose pixels are asked for ahead of their use.
constexpr int64_t kPointwiseAhead = 8;

// How a pass is computed: the same for every thread count, and for every gradient that is wanted.
enum class PointwiseBy {
  none,    // not here
  input,   // rows are input channels
  output,  // rows are output channels
};
// lanes: of a vector of sums; tile_bytes: of one channel's pixels in a tile.
PointwiseBy pointwise_by(const ConvForward& call, int64_t lanes, int64_t tile_bytes);
PointwiseBy pointwise_by(const ConvBackward& call, int64_t lanes, int64_t tile_bytes);

void build_pointwise(const Pattern& pattern, bool by_input, int64_t tile_bytes,
                     PointwiseSide* side);

}  // namespace sparsetrain
