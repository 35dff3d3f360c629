#include "plan.h"

#include "conv_plan.h"

#include <algorithm>
#include <cstring>

namespace sparsetrain {

namespace {

// Column numbers of up to this many columns take 16 bits.
constexpr int64_t kShortIndex = 65536;

double density_of(const Side& side) {
  const double size = static_cast<double>(side.rows) * static_cast<double>(side.cols);
  return size > 0 ? static_cast<double>(side.nnz) / size : 0;
}

// A block of the packed tile should stay near L1, yet give each row enough nonzeros to pay for
// loading and storing its sums.
int64_t count_blocks(const Side& side, const TileRule& rule) {
  if (side.nnz == 0) return 1;
  int64_t width = side.wide ? rule.wide_columns : rule.narrow_columns;
  while (width < side.cols && width * density_of(side) < rule.nonzeros_per_cell) width *= 2;
  return std::max<int64_t>(1, (side.cols + width / 2) / width);
}

void choose_blocks(Side* side, const TileRule& rule) {
  side->wide = density_of(*side) >= rule.wide_density;
  side->blocks = count_blocks(*side, rule);
}

// by rows. col: nnz columns in CSR order.
void cut_rows(Side* side, const int32_t* col) {
  if (side->blocks == 1) return;
  side->cuts.reset(new int32_t[(side->blocks - 1) * side->rows]);
  for (int64_t r = 0; r < side->rows; r++) {
    int32_t k = side->row_begin[r];
    const int32_t end = side->row_begin[r + 1];
    for (int64_t b = 1; b < side->blocks; b++) {
      const int64_t first = side->cols * b / side->blocks;
      while (k < end && col[k] < first) k++;
      side->cuts[(b - 1) * side->rows + r] = k;
    }
  }
}

// by blocks. col as above.
void count_cells(Side* side, const int32_t* col) {
  if (side->blocks == 1) return;
  const int64_t cells = side->blocks * side->rows;
  side->cells.reset(new int32_t[cells + 1]());
  int32_t* size = side->cells.get() + 1;
  for (int64_t r = 0; r < side->rows; r++) {
    int64_t b = 0, end = side->cols / side->blocks;
    for (int32_t k = side->row_begin[r]; k < side->row_begin[r + 1]; k++) {
      while (col[k] >= end) end = side->cols * (++b + 1) / side->blocks;
      size[b * side->rows + r]++;
    }
  }
  for (int64_t c = 0; c < cells; c++) size[c] += side->cells[c];
}

// out: nnz things of `by_row` (CSR order) in the order of the side.
template <class I, class O>
void lay_out(const Side& side, const I* by_row, O* out) {
  if (!side.cells) {
    for (int64_t k = 0; k < side.nnz; k++) out[k] = static_cast<O>(by_row[k]);
    return;
  }
  for (int64_t r = 0; r < side.rows; r++) {
    const I* from = by_row + side.row_begin[r];
    for (int64_t b = 0; b < side.blocks; b++)
      for (int32_t k = side.begin_of(b)[r]; k < side.end_of(b)[r]; k++)
        out[k] = static_cast<O>(*from++);
  }
}

void transpose_into(const Pattern& p, int32_t* tcrow, int32_t* tcol, int32_t* perm,
                    uint16_t* place) {
  std::memset(tcrow, 0, sizeof(int32_t) * (p.cols + 1));
  for (int64_t k = 0; k < p.nnz; k++) tcrow[p.col[k] + 1]++;
  for (int64_t c = 0; c < p.cols; c++) tcrow[c + 1] += tcrow[c];
  for (int64_t r = 0; r < p.rows; r++) {
    for (int32_t k = p.crow[r]; k < p.crow[r + 1]; k++) {
      const int32_t at = tcrow[p.col[k]]++;
      tcol[at] = static_cast<int32_t>(r);
      if (perm) perm[at] = k;
      if (place) place[at] = static_cast<uint16_t>(k - p.crow[r]);
    }
  }
  for (int64_t c = p.cols; c > 0; c--) tcrow[c] = tcrow[c - 1];
  tcrow[0] = 0;
}

}  // namespace

const int32_t* Side::begin_of(int64_t b) const {
  if (cells) return cells.get() + b * rows;
  if (b == 0) return row_begin;
  if (b == blocks) return row_begin + 1;
  return cuts.get() + (b - 1) * rows;
}
const int32_t* Side::end_of(int64_t b) const {
  return cells ? cells.get() + b * rows + 1 : begin_of(b + 1);
}
size_t Side::bytes() const {
  return (cuts ? sizeof(int32_t) * (blocks - 1) * rows : 0) +
         (cells ? sizeof(int32_t) * (blocks * rows + 1) : 0) +
         (index16 ? sizeof(uint16_t) * nnz : 0) + (place16 ? sizeof(uint16_t) * nnz : 0) +
         (own32 ? sizeof(int32_t) * nnz : 0);
}

PatternCheck check_pattern(const Pattern& p) {
  if (p.crow[0] != 0) return {PatternFault::crow_start, 0};
  for (int64_t r = 0; r < p.rows; r++)
    if (p.crow[r] > p.crow[r + 1]) return {PatternFault::crow_decreasing, r};
  if (p.crow[p.rows] != p.nnz) return {PatternFault::crow_end, p.rows};
  for (int64_t r = 0; r < p.rows; r++) {
    for (int32_t k = p.crow[r]; k < p.crow[r + 1]; k++) {
      if (p.col[k] < 0 || p.col[k] >= p.cols) return {PatternFault::col_out_of_range, k};
      if (k == p.crow[r]) continue;
      if (p.col[k] == p.col[k - 1]) return {PatternFault::col_duplicate, k};
      if (p.col[k] < p.col[k - 1]) return {PatternFault::col_unsorted, k};
    }
  }
  return {PatternFault::none, 0};
}

void transpose_pattern(const Pattern& p, int32_t* tcrow, int32_t* tcol, int32_t* perm) {
  transpose_into(p, tcrow, tcol, perm, nullptr);
}

Plan::Plan(const Pattern& pattern) : pattern_(pattern) {}

double Plan::density() const {
  const double size = static_cast<double>(pattern_.rows) * static_cast<double>(pattern_.cols);
  return size > 0 ? static_cast<double>(pattern_.nnz) / size : 0;
}

const Side& Plan::forward(const TileRule& rule) const {
  std::call_once(forward_once_, [&] { build_forward(rule); });
  return forward_;
}

void Plan::build_forward(const TileRule& rule) const {
  const Pattern& p = pattern_;
  Side& side = forward_;
  side.rows = p.rows;
  side.cols = p.cols;
  side.nnz = p.nnz;
  side.row_begin = p.crow;
  choose_blocks(&side, rule);
  cut_rows(&side, p.col);
  if (p.cols <= kShortIndex) {
    side.index16.reset(new uint16_t[p.nnz]);
    lay_out(side, p.col, side.index16.get());
  } else {
    side.index32 = p.col;
  }
  side_bytes_ += side.bytes();
}

const Side& Plan::transposed(const TileRule& rule) const {
  std::call_once(transposed_once_, [&] { build_transposed(rule); });
  return transposed_;
}

void Plan::build_transposed(const TileRule& rule) const {
  const Pattern& p = pattern_;
  Side& side = transposed_;
  trow_begin_.reset(new int32_t[p.cols + 1]);
  side.rows = p.cols;
  side.cols = p.rows;
  side.nnz = p.nnz;
  side.row_begin = trow_begin_.get();
  const bool places = p.rows <= kShortIndex && p.cols <= kShortIndex;
  std::unique_ptr<int32_t[]> by_row(new int32_t[p.nnz]);
  std::unique_ptr<uint16_t[]> place(places ? new uint16_t[p.nnz] : nullptr);
  transpose_into(p, trow_begin_.get(), by_row.get(), nullptr, place.get());
  choose_blocks(&side, rule);
  count_cells(&side, by_row.get());
  if (p.rows <= kShortIndex) {
    side.index16.reset(new uint16_t[p.nnz]);
    lay_out(side, by_row.get(), side.index16.get());
  } else {
    side.own32.reset(new int32_t[p.nnz]);
    lay_out(side, by_row.get(), side.own32.get());
    side.index32 = side.own32.get();
  }
  if (places) {
    side.place16.reset(new uint16_t[p.nnz]);
    lay_out(side, place.get(), side.place16.get());
  }
  side_bytes_ += side.bytes() + sizeof(int32_t) * (p.cols + 1);
}

const uint8_t* Plan::bits() const {
  std::call_once(bits_once_, [this] { build_bits(); });
  return bits_.get();
}

void Plan::build_bits() const {
  const Pattern& p = pattern_;
  const int64_t stride = (p.cols + 7) / 8;
  bits_.reset(new uint8_t[p.rows * stride]());
  for (int64_t r = 0; r < p.rows; r++)
    for (int32_t k = p.crow[r]; k < p.crow[r + 1]; k++)
      bits_[r * stride + p.col[k] / 8] |= static_cast<uint8_t>(1 << p.col[k] % 8);
  side_bytes_ += p.rows * stride;
}

size_t Plan::bytes() const {
  size_t bytes = sizeof(Plan) + side_bytes_;
  for (ConvSlot& slot : conv_slots_) {
    const std::lock_guard<std::mutex> lock(slot.mutex);
    if (slot.side) bytes += slot.side->bytes();
    if (slot.older) bytes += slot.older->bytes();
  }
  return bytes;
}

Plan* plan_create(const Pattern& pattern) { return new Plan(pattern); }
void plan_destroy(Plan* plan) { delete plan; }
size_t plan_bytes(const Plan* plan) { return plan->bytes(); }

}  // namespace sparsetrain
