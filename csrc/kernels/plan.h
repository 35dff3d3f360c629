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

// One orientation of a pattern. The nonzeros of one row inside one column block are a contiguous
// run, since columns are sorted; so blocking needs only where the runs begin.
struct Side {
  int64_t rows = 0, cols = 0, nnz = 0;
  int64_t blocks = 1;
  bool wide = false;                    // tiles of kWideTile vectors rather than kNarrowTile
  const int32_t* row_begin = nullptr;   // rows + 1: CSR row pointers
  std::unique_ptr<int32_t[]> cuts;      // (blocks - 1) x rows: where block b + 1 of a row begins
  const int32_t* index32 = nullptr;     // nnz column numbers, or null if index16 holds them
  std::unique_ptr<uint16_t[]> index16;  // the same, when cols <= 65536: less to stream by
  // Transposed, with index16: nonzero k has the value number crow[index16[k]] + place16[k]. Two
  // bytes instead of a permutation's four.
  std::unique_ptr<uint16_t[]> place16;

  // rows entries each: block b of row r is [begin_of(b)[r], begin_of(b + 1)[r])
  const int32_t* begin_of(int64_t b) const {
    if (b == 0) return row_begin;
    if (b == blocks) return row_begin + 1;
    return cuts.get() + (b - 1) * rows;
  }
  size_t bytes() const {
    return (cuts ? sizeof(int32_t) * (blocks - 1) * rows : 0) +
           (index16 ? sizeof(uint16_t) * nnz : 0) + (place16 ? sizeof(uint16_t) * nnz : 0);
  }
};

struct ConvSide;  // conv_plan.h

// From this density on, tiles are twice as wide and blocks half: at 50 % that is 1.3 times faster,
// since half as much of the pattern streams by; at 20 % it is 0.85.
constexpr double kWideDensity = 0.35;
// Rows of a block should have this many nonzeros, to pay for loading and storing their sums.
constexpr double kNonzerosPerCell = 7.5;
// A block of the operand fits this many columns of a narrow tile.
constexpr int64_t kBlockColumns = 192;

class Plan {
 public:
  explicit Plan(const Pattern& pattern);
  const Pattern& pattern() const { return pattern_; }
  const Side& forward() const;     // built by the first call, from any thread
  const Side& transposed() const;  // likewise
  // rows x ceil(cols / 8): bit c % 8 of byte c / 8 says whether a row has a nonzero in column c.
  // Built by the first call, from any thread.
  const uint8_t* bits() const;
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
  void build_forward() const;
  void build_transposed() const;
  void build_bits() const;

  Pattern pattern_;
  mutable std::once_flag forward_once_;
  mutable Side forward_;
  mutable ConvSlot conv_slots_[2];
  mutable std::once_flag transposed_once_;
  mutable Side transposed_;
  mutable std::unique_ptr<int32_t[]> trow_begin_, tindex32_;
  mutable std::once_flag bits_once_;
  mutable std::unique_ptr<uint8_t[]> bits_;
  mutable std::atomic<size_t> side_bytes_{0};  // each side adds its own once it is built
};

}  // namespace sparsetrain
