// A pattern in the form the kernels read: the pattern as given and its transpose, each cut into
// column blocks. No permutation of the values is kept: place16, half as large, tells where a value
// is in its row. Everything here is derived from the pattern alone, in about O(nnz), and can be
// rebuilt.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "cpu.h"
#include "kernels.h"

namespace sparsetrain {

// A cell is what one row has in one block of columns. The cells of a block are visited in units of
// rows, in each from those with fewest nonzeros to those with most: the loop over a cell then runs
// as often as for the cell before, and its end is predicted. In the order of the rows, a
// misprediction for each cell is a quarter of the time at 20 nonzeros a cell.
struct CellRun {
  int32_t nonzeros, cells;  // `cells` cells of `nonzeros` each
};
struct Sweep {  // one block of one unit
  const CellRun* runs;
  const CellRun* end;
  const uint8_t* row;   // of each cell, inside the unit
  const int32_t* from;  // of each cell: its first value's number. Null: values lie in this order
  int64_t first;        // place of the first nonzero's column number (and value, if from is null)
  bool ask;             // for what later cells read, not only for values that lie anywhere
};
struct Sweeps {
  int64_t unit = 0;  // rows, a multiple of 16; the last unit may have fewer
  int64_t units = 0;
  std::unique_ptr<CellRun[]> runs;
  std::unique_ptr<int32_t[]> first_run;  // blocks x units + 1
  std::unique_ptr<int32_t[]> first;      // blocks x units
  std::unique_ptr<uint8_t[]> row;        // blocks x rows, and kSweepAhead more
  std::unique_ptr<int32_t[]> from;       // the same, or null
};
constexpr int64_t kMostUnit = 256;  // rows of the largest unit: others divide it
// Cells ahead of their use whose `from` a kernel may read.
constexpr int64_t kSweepAhead = 8;

// Entries that an array of indices has beyond its last, zeros: kernels take up to 8 at a time and
// read 8 ahead.
constexpr int64_t kIndicesAhead = 16;

// One orientation of a pattern, cut into blocks of columns.
//   linear layers: cells in the order of `sweeps`, one block after the other
//   convolutions (conv_plan.h): cells in CSR order; `cuts` says where the later blocks' begin
struct Side {
  int64_t rows = 0, cols = 0, nnz = 0;
  int64_t blocks = 1;
  bool wide = false;                   // tiles of rule.wide vectors rather than rule.narrow
  const int32_t* row_begin = nullptr;  // rows + 1: CSR row pointers
  std::unique_ptr<int32_t[]> cuts;     // (blocks - 1) x rows
  Sweeps sweeps;
  // What a nonzero reads. Linear layers: index16, its column inside the block << column_shift,
  // which is where the column's full tile begins in the packed block, in units of 8 bytes: x86
  // multiplies an index by 8 for nothing. Convolutions: a number of vectors, in index32 if it takes
  // more than 16 bits.
  std::unique_ptr<uint16_t[]> index16;
  const int32_t* index32 = nullptr;
  int column_shift = 0;
  // Transposed linear layers: the place of each nonzero's value among those of its block, which are
  // one stretch of the pattern's; or, where such a stretch is longer than 65536 (!place_in_block),
  // in its row of the pattern, which is its column here. Two bytes instead of a permutation's four.
  // Null if there are more than 65536 columns on either side, and for dense patterns
  // (kSquaresDensity).
  bool place_in_block = false;
  std::unique_ptr<uint16_t[]> place16;

  // (None of these inline: instruction sets would share their code.)
  // rows entries each: row r has [begin_of(b)[r], begin_of(b + 1)[r]) in block b, without sweeps
  const int32_t* begin_of(int64_t b) const;
  Sweep sweep(int64_t b, int64_t unit) const;
  int64_t first_column(int64_t b) const;
  int64_t block_end(int64_t b) const;  // with sweeps: the place after block b's last nonzero
  size_t bytes() const;
};

struct ConvSide;       // conv_plan.h
struct PointwiseSide;  // pointwise_plan.h

// What suits the vectors and caches of one instruction set.
struct TileRule {
  int narrow, wide;                       // vectors of samples in a tile
  double wide_density;                    // from which on tiles are wide, if L1 holds such a block
  int64_t narrow_columns, wide_columns;   // of the narrowest column block
  double narrow_nonzeros, wide_nonzeros;  // what a row of a block needs, to pay for its sums
  int64_t vector_bytes;
};

// From this density on the operand of a block must fit L1: each vector is read again for so many
// rows that its way from L2 is what costs. With 32 KiB, tiles of 256 bytes: 128 columns for 192 are
// 1.5-1.7 times faster at 0-30 % sparsity, 1.1 at 50 and 80 %, 0.97-1.01 at 90 %. With 48 KiB, 64
// columns of 512 bytes for 96: 1.7-2.3 at 0 %, 1.06-1.18 at 20 %, 1.04 at 50 %, 1.0 at 80 %;
// without room for what passes through L1 besides, a block that is read from end to end leaves it
// each time.
constexpr double kFitsL1Density = 0.15;
constexpr int64_t kMostDenseBlock = 32 << 10;

// Of the operand of a dense pattern's block.
int64_t dense_block_bytes();

// From this density on, with vectors of 512 bits, the transposed side of a linear layer gets its
// values by squares (transposed_values-inl.h), and has no place16.
constexpr double kSquaresDensity = 0.4;

// For convolutions.
constexpr double kWideDensity = 0.35;
constexpr double kNonzerosPerCell = 7.5;
constexpr int64_t kBlockColumns = 192;

class Plan {
 public:
  explicit Plan(const Pattern& pattern);
  ~Plan();
  const Pattern& pattern() const { return pattern_; }
  // rows x bits_stride(): bit c % 8 of byte c / 8 says whether a row has a nonzero in column c;
  // rows are whole pairs of bytes. Built by the first call, from any thread.
  const uint8_t* bits() const;
  int64_t bits_stride() const;
  // Built by the first call with vectors of this size, from any thread; later ones get the same.
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
  // For tiles of so many bytes a channel. Built by the first call with vectors of this size.
  const PointwiseSide& pointwise(bool by_input, int64_t vector_bytes, int64_t tile_bytes) const;

 private:
  void build_bits() const;
  struct Built {
    std::once_flag once;
    Side side;
    std::unique_ptr<int32_t[]> row_begin;  // transposed
  };
  static int sizes_place(const TileRule& rule) { return static_cast<int>(rule.vector_bytes / 32); }
  void build_forward(const TileRule& rule, Built* built) const;
  void build_transposed(const TileRule& rule, Built* built) const;

  Pattern pattern_;
  mutable Built forward_[3], transposed_[3];  // vectors of 16, 32 and 64 bytes
  mutable ConvSlot conv_slots_[2];
  mutable std::once_flag pointwise_once_[2][3];
  mutable std::unique_ptr<PointwiseSide> pointwise_[2][3];
  mutable std::once_flag bits_once_;
  mutable std::unique_ptr<uint8_t[]> bits_;
  mutable std::atomic<size_t> side_bytes_{0};  // each side adds its own once it is built
};

}  // namespace sparsetrain
