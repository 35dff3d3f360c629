// How a convolution becomes the linear layer's products of sparse rows and packed tiles.
//
// Lanes are pixels. A strip of pixels of the result (some rows of some images, side by side) is a
// run of lanes, row by row; each row is padded to whole vectors. A nonzero (c, i, j) then reads the
// input's plane of channel c, moved by some rows and columns. Moving by rows is adding a constant
// to an address. Moving by columns would make every load unaligned, so the strip holds a copy of
// the plane for each distinct column shift (three for a 3x3 kernel, instead of the nine that
// unfolding makes).
//
// A stride s splits the input into s x s phases, planes of every s-th row and column, on which the
// convolution has stride 1. The gradient of the input is again such a convolution, of dy, with one
// row of results for each (phase, channel).
//
// 1x1 kernels of stride 1 shift nothing, and most are computed by pointwise-inl.h.
//
// Where rows of pixels do not fill vectors, a linear layer of the unfolded input may be faster:
// conv_columns-inl.h.
//
// Where the batch fills vectors, lanes are samples instead: a vector is one pixel of as many images
// as it has lanes. Then moving by a column is adding a constant to an address too, so that one copy
// of each plane, with zeros around it, serves every kernel position, whatever the size of the
// image. It costs a transposition on the way in and on the way out.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "plan.h"

namespace sparsetrain {

struct ConvKind {  // one copy of each channel: a phase of the source and a column shift
  int64_t phase[2];
  int64_t shift;
};
struct ConvPhase {
  int64_t phase[2];
};

// Vectors that the kernels use: lanes of the type of the sums, bytes of a lane, vectors of a tile
// for sparse and for dense patterns.
struct ConvVectors {
  int64_t lanes, lane_bytes, narrow_tile, wide_tile;
};

// Pixels of a full tile where lanes are samples: 14 sums, with a value and nothing else in
// registers. Two rows share most of what a 3 x 3 kernel reads of them.
constexpr int64_t kTileRows = 2, kTileColumns = 7;

struct ConvKey {  // what a side depends on, beyond the pattern
  ConvShape shape;
  ConvVectors vectors;
};

// One direction of a convolution: forward (source x, result y) or transposed (source dy, result
// dx).
struct ConvSide {
  ConvKey key;

  // source planes: element (qy, qx) of phase p is source[qy * step + p], else zero
  int64_t source_channels, source_size[2], source_step[2];
  // results: row = channel * phases + phase; pixel (y, x) goes to result[y * step + phase]
  int64_t result_channels, result_size[2], result_step[2];
  std::vector<ConvPhase> phases;  // of the result
  std::vector<ConvKind> kinds;    // of the source
  int64_t first_shift, span;      // row shifts are first_shift .. first_shift + span

  // lanes
  int64_t grid[2];       // pixels (y, x) of one image
  bool flat;             // no shifts at all: all pixels of all images are one run of lanes
  bool samples;          // lanes are samples: see below
  int64_t images;        // side by side in one row of lanes
  int64_t pitch;         // lanes from one row to the next (flat: from one image to the next)
  int64_t strip_lanes;   // lanes of a strip, a multiple of the vector, and of pitch unless flat
  int64_t lanes;         // of one group of images (flat: of the batch); rounded up to vectors
  int64_t groups;        // of images
  int64_t strips;        // per group
  int64_t copy_lanes;    // from one copy of a plane to the next: the strip, span rows, a vector
  int64_t centre_lanes;  // from one row of the other operand to the next: the strip, a vector
  int64_t tile_lanes;    // of a full tile

  // Lanes are samples. A strip is strip_rows rows of the grid; of each plane it holds
  // strip_rows + span rows, each of pitch vectors, copy_lanes in all. Results wait for band_rows
  // rows, so that they are written in long runs.
  int64_t strip_rows, band_rows;
  int64_t first_column;  // column shifts begin here

  Side side;  // rows: result rows; index: first lane of the operand / vector lanes
  // Where values go in the transposed direction: the phase of each kernel position.
  std::vector<int32_t> phase_of;
  std::unique_ptr<int32_t[]> row_begin, index32;
  std::unique_ptr<uint8_t[]> used;  // of each channel of the source: whether a nonzero reads it

  int64_t strip_begin(int64_t s) const { return s * strip_lanes; }
  int64_t strip_end(int64_t s) const {
    return (s + 1) * strip_lanes < lanes ? (s + 1) * strip_lanes : lanes;
  }
  // Transposed: the row of each of `columns` columns of the pattern, of the first group of
  // channels.
  void fill_row_of_column(int64_t columns, int32_t* row_of_column) const;
  size_t bytes() const;
};

// Where pixels lie, for sides whose lanes are samples. Built for each call: for a small layer it
// would be most of what its plan holds.
struct SampleTables {
  SampleTables(const ConvSide& side, int64_t vector_lanes);
  ~SampleTables();  // not inline: instruction sets would share its code
  SampleTables(const SampleTables&) = delete;
  SampleTables& operator=(const SampleTables&) = delete;
  // Vector of each pixel of a strip's source rows inside its channel's planes, or -1 where no
  // kernel position reads it; the vectors that are no pixel's; and, unless each pixel's is its
  // number, the vector of each pixel of a band's results inside its channel's rows, or -1 where no
  // kernel position reaches it.
  std::vector<int32_t> slots, gaps, places;
};

// Whether this is computed as a linear layer of the unfolded input (conv_columns-inl.h): the same
// for all directions and thread counts.
bool samples_are_pixels(int64_t nnz, const ConvShape& shape, const ConvVectors& vectors);
// Whether lanes are samples: the same for all directions, sparsities and thread counts.
bool lanes_are_samples(const ConvShape& shape, const ConvVectors& vectors);

// The side for this shape: one of the plan's last two if it fits, else newly built. From any
// thread. It lives as long as the handle. (No shared_ptr here: its code would be shared between
// instruction sets.)
class ConvHandle {
 public:
  ConvHandle(const Plan& plan, const ConvShape& shape, bool transposed, const ConvVectors& vectors);
  ~ConvHandle();
  ConvHandle(const ConvHandle&) = delete;
  ConvHandle& operator=(const ConvHandle&) = delete;
  const ConvSide& operator*() const { return *side_; }
  const ConvSide* operator->() const { return side_; }

 private:
  const ConvSide* side_;
  void* owner_;
};

}  // namespace sparsetrain
