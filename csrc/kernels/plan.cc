#include "plan.h"

#include "conv_plan.h"
#include "pointwise_plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace sparsetrain {

namespace {

constexpr int64_t kShort = 65536;  // numbers below it take 16 bits

double density_of(const Side& side) {
  const double size = static_cast<double>(side.rows) * static_cast<double>(side.cols);
  return size > 0 ? static_cast<double>(side.nnz) / size : 0;
}

// Of one column of a packed tile.
int64_t column_bytes(const Side& side, const TileRule& rule) {
  return (side.wide ? rule.wide : rule.narrow) * rule.vector_bytes;
}

// A block of the packed tile should stay near L1, yet give each row enough nonzeros to pay for
// loading and storing its sums.
int64_t count_blocks(const Side& side, const TileRule& rule) {
  if (side.nnz == 0) return 1;
  int64_t width = side.wide ? rule.wide_columns : rule.narrow_columns;
  const double density = density_of(side);
  if (density >= kFitsL1Density)
    width = std::min(width, dense_block_bytes() / column_bytes(side, rule));
  if (side.wide) width = std::max(width, static_cast<int64_t>(rule.wide_nonzeros / density));
  while (!side.wide && width < side.cols && width * density < rule.narrow_nonzeros) width *= 2;
  const int64_t most = kShort >> side.column_shift;  // columns of a block, for index16
  return std::max((side.cols + width / 2) / width, (side.cols + most - 1) / most);
}

void choose_blocks(Side* side, const TileRule& rule) {
  const bool fits = rule.wide_columns * rule.wide * rule.vector_bytes <= cache_bytes(1);
  side->wide = fits && density_of(*side) >= rule.wide_density;
  while ((int64_t{8} << side->column_shift) < column_bytes(*side, rule)) side->column_shift++;
  side->blocks = std::max<int64_t>(1, count_blocks(*side, rule));
}

// Rows of a unit: with more, fewer ends of loops are mispredicted; with fewer, their results stay
// in L1 and more workers can share out the rows.
int64_t unit_rows(int64_t rows) { return rows >= 2048 ? kMostUnit : rows >= 512 ? 128 : 64; }

// (blocks + 1) x rows: where each cell begins in CSR order, and where the last one ends
std::vector<int32_t> find_cells(const Side& side, const int32_t* col) {
  std::vector<int32_t> begin((side.blocks + 1) * side.rows);
  for (int64_t r = 0; r < side.rows; r++) {
    int32_t k = side.row_begin[r];
    const int32_t end = side.row_begin[r + 1];
    for (int64_t b = 0; b <= side.blocks; b++) {
      const int64_t first = side.first_column(b);
      while (k < end && col[k] < first) k++;
      begin[b * side.rows + r] = k;
    }
  }
  return begin;
}

// Sorts the cells of each unit; by_row: the columns in CSR order.
void sort_cells(Side* side, const int32_t* by_row) {
  const std::vector<int32_t> begin = find_cells(*side, by_row);
  const int64_t rows = side->rows, cells = side->blocks * rows;
  Sweeps& s = side->sweeps;
  s.unit = unit_rows(rows);
  s.units = (rows + s.unit - 1) / s.unit;
  s.row.reset(new uint8_t[cells + kSweepAhead]());
  s.from.reset(new int32_t[cells + kSweepAhead]());
  s.first.reset(new int32_t[side->blocks * s.units]);
  s.first_run.reset(new int32_t[side->blocks * s.units + 1]());
  std::vector<CellRun> runs;
  int32_t nonzeros = 0;
  for (int64_t b = 0, cell = 0; b < side->blocks; b++) {
    const int32_t* from = begin.data() + b * rows;
    for (int64_t u = 0; u < s.units; u++) {
      const int64_t first = u * s.unit, end = std::min(first + s.unit, rows);
      auto size = [&](int64_t r) { return from[rows + r] - from[r]; };
      std::vector<uint8_t> order(end - first);
      std::iota(order.begin(), order.end(), uint8_t{0});
      std::stable_sort(order.begin(), order.end(),
                       [&](uint8_t i, uint8_t j) { return size(first + i) < size(first + j); });
      s.first[b * s.units + u] = nonzeros;
      const size_t first_run = runs.size();
      for (const uint8_t i : order) {
        const int32_t n = size(first + i);
        if (runs.size() == first_run || runs.back().nonzeros != n) runs.push_back({n, 0});
        runs.back().cells++;
        nonzeros += n;
        s.row[cell] = i;
        s.from[cell++] = from[first + i];
      }
      s.first_run[b * s.units + u + 1] = static_cast<int32_t>(runs.size());
    }
  }
  s.runs.reset(new CellRun[runs.size()]);
  std::copy(runs.begin(), runs.end(), s.runs.get());
}

// out: f(thing, block) for nnz things of `by_row` (CSR order), in the order of the sweeps.
template <class I, class O, class F>
void lay_out(const Side& side, const I* by_row, O* out, const F& f) {
  const Sweeps& s = side.sweeps;
  const int32_t* from = s.from.get();
  for (int64_t b = 0; b < side.blocks; b++) {
    const CellRun* end = s.runs.get() + s.first_run[(b + 1) * s.units];
    for (const CellRun* run = s.runs.get() + s.first_run[b * s.units]; run < end; run++)
      for (int32_t c = 0; c < run->cells; c++, from++)
        for (int32_t k = 0; k < run->nonzeros; k++) *out++ = f(by_row[*from + k], b);
  }
}

void number_columns(Side* side, const int32_t* by_row) {
  side->index16.reset(new uint16_t[side->nnz + kIndicesAhead]());
  uint16_t* index = side->index16.get();
  lay_out(*side, by_row, index, [&](int32_t column, int64_t b) {
    return static_cast<uint16_t>((column - side->first_column(b)) << side->column_shift);
  });
}

// place: of each nonzero from its row's entry of `base` on
void transpose_into(const Pattern& p, int32_t* tcrow, int32_t* tcol, int32_t* perm,
                    const int32_t* base, uint16_t* place) {
  std::memset(tcrow, 0, sizeof(int32_t) * (p.cols + 1));
  for (int64_t k = 0; k < p.nnz; k++) tcrow[p.col[k] + 1]++;
  for (int64_t c = 0; c < p.cols; c++) tcrow[c + 1] += tcrow[c];
  for (int64_t r = 0; r < p.rows; r++) {
    for (int32_t k = p.crow[r]; k < p.crow[r + 1]; k++) {
      const int32_t at = tcrow[p.col[k]]++;
      tcol[at] = static_cast<int32_t>(r);
      if (perm) perm[at] = k;
      if (place) place[at] = static_cast<uint16_t>(k - base[r]);
    }
  }
  for (int64_t c = p.cols; c > 0; c--) tcrow[c] = tcrow[c - 1];
  tcrow[0] = 0;
}

// For each row of the pattern, a column of its transposed side: the value from which places count.
// Says in the side which one that is.
std::vector<int32_t> bases_of_places(const Pattern& p, Side* transposed) {
  int32_t longest = 0;
  for (int64_t b = 0; b < transposed->blocks; b++)
    longest = std::max(
        longest, p.crow[transposed->first_column(b + 1)] - p.crow[transposed->first_column(b)]);
  transposed->place_in_block = longest <= kShort;
  std::vector<int32_t> base(p.crow, p.crow + p.rows);
  for (int64_t b = 0; transposed->place_in_block && b < transposed->blocks; b++)
    for (int64_t r = transposed->first_column(b); r < transposed->first_column(b + 1); r++)
      base[r] = p.crow[transposed->first_column(b)];
  return base;
}

}  // namespace

int64_t dense_block_bytes() { return std::min(cache_bytes(1), kMostDenseBlock); }

const int32_t* Side::begin_of(int64_t b) const {
  if (b == 0) return row_begin;
  if (b == blocks) return row_begin + 1;
  return cuts.get() + (b - 1) * rows;
}
Sweep Side::sweep(int64_t b, int64_t unit) const {
  const int64_t i = b * sweeps.units + unit, cell = b * rows + unit * sweeps.unit;
  return {sweeps.runs.get() + sweeps.first_run[i],
          sweeps.runs.get() + sweeps.first_run[i + 1],
          sweeps.row.get() + cell,
          sweeps.from ? sweeps.from.get() + cell : nullptr,
          sweeps.first[i],
          !is_intel()};
}
size_t Side::bytes() const {
  const int64_t swept = blocks * sweeps.units, cells = swept ? blocks * rows + kSweepAhead : 0;
  return (cuts ? sizeof(int32_t) * (blocks - 1) * rows : 0) + sizeof(int32_t) * 2 * swept +
         (swept ? sizeof(CellRun) * sweeps.first_run[swept] : 0) +
         (sweeps.from ? sizeof(int32_t) + 1 : 1) * cells +
         (index16 ? sizeof(uint16_t) * (nnz + kIndicesAhead) : 0) +
         (place16 ? sizeof(uint16_t) * nnz : 0);
}
int64_t Side::first_column(int64_t b) const { return cols * b / blocks; }
int64_t Side::block_end(int64_t b) const {
  return b + 1 == blocks ? nnz : sweeps.first[(b + 1) * sweeps.units];
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
  transpose_into(p, tcrow, tcol, perm, nullptr, nullptr);
}

Plan::Plan(const Pattern& pattern) : pattern_(pattern) {}
Plan::~Plan() = default;

double Plan::density() const {
  const double size = static_cast<double>(pattern_.rows) * static_cast<double>(pattern_.cols);
  return size > 0 ? static_cast<double>(pattern_.nnz) / size : 0;
}

const Side& Plan::forward(const TileRule& rule) const {
  Built& built = forward_[sizes_place(rule)];
  std::call_once(built.once, [&] { build_forward(rule, &built); });
  return built.side;
}

void Plan::build_forward(const TileRule& rule, Built* built) const {
  const Pattern& p = pattern_;
  Side& side = built->side;
  side.rows = p.rows;
  side.cols = p.cols;
  side.nnz = p.nnz;
  side.row_begin = p.crow;
  choose_blocks(&side, rule);
  sort_cells(&side, p.col);
  number_columns(&side, p.col);
  side_bytes_ += side.bytes();
}

const Side& Plan::transposed(const TileRule& rule) const {
  Built& built = transposed_[sizes_place(rule)];
  std::call_once(built.once, [&] { build_transposed(rule, &built); });
  return built.side;
}

void Plan::build_transposed(const TileRule& rule, Built* built) const {
  const Pattern& p = pattern_;
  Side& side = built->side;
  built->row_begin.reset(new int32_t[p.cols + 1]);
  side.rows = p.cols;
  side.cols = p.rows;
  side.nnz = p.nnz;
  side.row_begin = built->row_begin.get();
  const bool squares = rule.vector_bytes == 64 && density() >= kSquaresDensity && expands_fast();
  const bool places = !squares && p.rows <= kShort && p.cols <= kShort;
  std::unique_ptr<int32_t[]> by_row(new int32_t[p.nnz]);
  std::unique_ptr<uint16_t[]> place(places ? new uint16_t[p.nnz] : nullptr);
  choose_blocks(&side, rule);
  const std::vector<int32_t> base = bases_of_places(p, &side);
  transpose_into(p, built->row_begin.get(), by_row.get(), nullptr, base.data(), place.get());
  sort_cells(&side, by_row.get());
  number_columns(&side, by_row.get());
  if (places) {
    side.place16.reset(new uint16_t[p.nnz]);
    lay_out(side, place.get(), side.place16.get(), [](uint16_t place, int64_t) { return place; });
  }
  side.sweeps.from.reset();  // values are brought into this order
  side_bytes_ += side.bytes() + sizeof(int32_t) * (p.cols + 1);
}

const PointwiseSide& Plan::pointwise(bool by_input, int64_t vector_bytes,
                                     int64_t tile_bytes) const {
  const int64_t place = vector_bytes / 32;
  std::unique_ptr<PointwiseSide>& side = pointwise_[by_input][place];
  std::call_once(pointwise_once_[by_input][place], [&] {
    side.reset(new PointwiseSide);
    build_pointwise(pattern_, by_input, tile_bytes, side.get());
    side_bytes_ += sizeof(PointwiseSide) + side->bytes();
  });
  return *side;
}

const uint8_t* Plan::bits() const {
  std::call_once(bits_once_, [this] { build_bits(); });
  return bits_.get();
}

int64_t Plan::bits_stride() const { return (pattern_.cols + 15) / 16 * 2; }

void Plan::build_bits() const {
  const Pattern& p = pattern_;
  const int64_t stride = bits_stride();
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
