// A pattern in the form the kernels read: the pattern as given and its transpose, each cut into
// column blocks. No permutation of the values is kept: values_to_transposed finds their places by
// counting, as fast as a gather would, and 4 bytes per nonzero are saved. Everything here is
// derived from the pattern alone, in O(nnz), and can be rebuilt.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "kernels.h"

namespace sparsetrain {

// One orientation of a pattern, cut into blocks of columns. A cell is what one row has in one
// block: a contiguous run of nonzeros, in one of two layouts: by rows: in CSR order, since columns
// are sorted; `cuts` says where the later blocks' cells begin. by blocks (transposed linear layers,
// whose values are gathered anyway): block after block, the rows
//   in order inside each, so that a sweep reads one stream: 1.05-1.15 times faster. Forward,
//   bringing the values into that order costs as much at batch 128 as it saves at 2048.
struct Side {
  int64_t rows = 0, cols = 0, nnz = 0;
  int64_t blocks = 1;
  bool wide = false;                    // tiles of rule.wide vectors rather than rule.narrow
  const int32_t* row_begin = nullptr;   // rows + 1: CSR row pointers
  std::unique_ptr<int32_t[]> cuts;      // by rows: (blocks - 1) x rows
  std::unique_ptr<int32_t[]> cells;     // by blocks: blocks x rows + 1, where each cell begins
  const int32_t* index32 = nullptr;     // nnz column numbers, or null if index16 holds them
  std::unique_ptr<uint16_t[]> index16;  // the same, when cols <= 65536: less to stream by
  std::unique_ptr<int32_t[]> own32;     // holds index32 where that is not the pattern's
  // Transposed, with index16: nonzero k has the value number crow[index16[k]] + place16[k]. Two
  // bytes instead of a permutation's four.
  std::unique_ptr<uint16_t[]> place16;

  // rows entries each: the cell of row r and block b is [begin_of(b)[r], end_of(b)[r])
  // (Not inline: instruction sets would share their code.)
  const int32_t* begin_of(int64_t b) const;
  const int32_t* end_of(int64_t b) const;
  size_t bytes() const;
};

struct ConvSide;  // conv_plan.h

// What suits the vectors and caches of one instruction set.
struct TileRule {
  int narrow, wide;                      // vectors of samples in a tile
  double wide_density;                   // from which on tiles are wide
  int64_t narrow_columns, wide_columns;  // of the narrowest column block: its operand fits L1
  double nonzeros_per_cell;              // what a row of a block needs, to pay for its sums
};

// For convolutions.
constexpr double kWideDensity = 0.35;
constexpr double kNonzerosPerCell = 7.5;
constexpr int64_t kBlockColumns = 192;

class Plan {
 public:
  explicit Plan(const Pattern& pattern);
  const Pattern& pattern() const { return pattern_; }
  // rows x ceil(cols / 8): bit c % 8 of byte c / 8 says whether a row has a nonzero in column c.
  // Built by the first call, from any thread.
  const uint8_t* bits() const;
  // Built by the first call, from any thread, with its rule; later ones get the same.
  const Side& forward(const TileRule& rule) const;
  const Side& transposed(const TileRule& rule) const;
  double density() const;
  size_t bytes() const;  // of what is built; from any thread

  // The last two convolutions computed with this pattern, by direction (see conv_plan.h): two, so
  // that a smaller last batch does not displace the others' plan.
  struct ConvSlot {
    std::mutex mutex;
    std::shared_ptr<const ConvSide> side, older;
  };
  ConvSlot& conv_slot(bool transposed) const { return conv_slots_[transposed]; }

 private:
  void build_bits() const;
  void build_forward(const TileRule& rule) const;
  void build_transposed(const TileRule& rule) const;

  Pattern pattern_;
  mutable std::once_flag forward_once_;
  mutable Side forward_;
  mutable ConvSlot conv_slots_[2];
  mutable std::once_flag transposed_once_;
  mutable Side transposed_;
  mutable std::once_flag bits_once_;
  mutable std::unique_ptr<uint8_t[]> bits_;
  mutable std::unique_ptr<int32_t[]> trow_begin_;
  mutable std::atomic<size_t> side_bytes_{0};  // each side adds its own once it is built
};

}  // namespace sparsetrain
