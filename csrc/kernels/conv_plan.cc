#include "conv_plan.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace sparsetrain {

namespace {

// Bytes of a strip: the copies and, for the gradient of the values, the other operand. With the
// pattern and the results they should stay in L2, if each vector of them is used only a few times.
constexpr int64_t kStripBytes = 900 << 10;
// Where nothing shifts pixels, fewer: 1x1 from 256 to 64 channels 1.02-1.18 times faster, back
// 1.03-1.12. But no fewer lanes than this: runs of the input that are shorter come slower from
// memory, and the pattern more often (1024 channels forward 0.87-0.95 with half of them).
constexpr int64_t kFlatStripBytes = 300 << 10, kFlatLanes = 256;
constexpr int64_t kMostImages = 16;
// Where lanes are samples a strip need not fit L2: the tiles of a block of channels are read often
// enough. One of L2's size is 1.04-1.15 times faster than of twice that (128ch/28; most with two
// threads, and where phases make planes of every second row) unless its rows are too few: 6 at
// 256ch/14 0.9-1.0, 0.85-0.95 with two threads.
constexpr int64_t kFewStripRows = 8;
// Rows of a block of channels should have this many nonzeros, to pay for loading and storing the 14
// sums: rather than 7.5, 12 were 1.05 times faster at 95 %, 20 slower at 64ch/56.
constexpr double kNonzerosPerTile = 12;
// Vectors of a strip that 16-bit indices reach.
constexpr int64_t kShortIndex = 65536;
// Of a band of results, which all blocks of channels pass over, and which is then written at once.
constexpr int64_t kBandBytes = 224 << 10;

// Bytes of the source that the tiles of one block of channels may have: the rest of L1 is for the
// results and the pattern.
int64_t tile_budget() { return cache_bytes(1) * 3 / 4; }

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }
int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }

// Kernel position i along one dimension reads phase `phase` of x, `shift` further on.
struct Tap {
  int64_t phase, shift;
};
Tap tap_of(const ConvShape& s, int dim, int64_t i) {
  const int64_t at = i * s.dilation[dim] - s.padding[dim];
  const int64_t phase = modulo(at, s.stride[dim]);
  return {phase, (at - phase) / s.stride[dim]};
}

struct Builder {
  const Plan& plan;
  const ConvShape& shape;
  const ConvVectors& v;
  bool transposed;
  ConvSide* s;
  // per kernel position (i, j): which copy, which row and column shift
  std::vector<int64_t> kind_of, row_shift_of, column_shift_of;
  std::vector<int32_t> row_of_column;
  int64_t column_span = 0;

  void geometry() {
    const ConvShape& c = shape;
    for (int d = 0; d < 2; d++) {
      s->source_size[d] = transposed ? c.out_size[d] : c.in_size[d];
      s->source_step[d] = transposed ? 1 : c.stride[d];
      s->result_size[d] = transposed ? c.in_size[d] : c.out_size[d];
      s->result_step[d] = transposed ? c.stride[d] : 1;
      s->grid[d] = transposed ? div_up(c.in_size[d], c.stride[d]) : c.out_size[d];
    }
    s->source_channels = transposed ? c.out_channels : c.in_channels;
    s->result_channels = transposed ? c.in_channels : c.out_channels;
  }

  void taps() {
    int64_t first = 0, last = 0;
    if (!transposed) s->phases.push_back({{0, 0}});
    for (int64_t i = 0; i < shape.kernel[0]; i++) {
      for (int64_t j = 0; j < shape.kernel[1]; j++) {
        const Tap y = tap_of(shape, 0, i), x = tap_of(shape, 1, j);
        const int64_t row_shift = transposed ? -y.shift : y.shift;
        const bool none = kind_of.empty();
        first = none ? row_shift : std::min(first, row_shift);
        last = none ? row_shift : std::max(last, row_shift);
        row_shift_of.push_back(row_shift);
        const int64_t column_shift = transposed ? -x.shift : x.shift;
        column_shift_of.push_back(column_shift);
        ConvKind kind{{0, 0}, s->samples ? 0 : column_shift};
        if (!transposed) kind = {{y.phase, x.phase}, kind.shift};
        kind_of.push_back(find_kind(kind));
        if (transposed)
          s->phase_of.push_back(static_cast<int32_t>(find_phase({{y.phase, x.phase}})));
      }
    }
    s->first_shift = first;
    s->span = last - first;
    const auto ends = std::minmax_element(column_shift_of.begin(), column_shift_of.end());
    s->first_column = *ends.first;
    column_span = *ends.second - *ends.first;
  }
  int64_t find_kind(const ConvKind& k) {
    for (size_t i = 0; i < s->kinds.size(); i++)
      if (!std::memcmp(&s->kinds[i], &k, sizeof k)) return static_cast<int64_t>(i);
    s->kinds.push_back(k);
    return static_cast<int64_t>(s->kinds.size()) - 1;
  }
  int64_t find_phase(const ConvPhase& p) {
    for (size_t i = 0; i < s->phases.size(); i++)
      if (!std::memcmp(&s->phases[i], &p, sizeof p)) return static_cast<int64_t>(i);
    s->phases.push_back(p);
    return static_cast<int64_t>(s->phases.size()) - 1;
  }

  int64_t copies() const { return s->source_channels * static_cast<int64_t>(s->kinds.size()); }
  // Bytes of one lane of a strip.
  int64_t bytes_per_lane() const {
    const int64_t other =
        transposed ? static_cast<int64_t>(s->phases.size()) * s->result_channels : 0;
    return (copies() + other) * v.lane_bytes;
  }
  // Bytes of the source that the tiles of one block of channels may have.
  int64_t block_bytes() const {
    if (s->samples) return tile_budget();
    if (plan.density() < kWideDensity) return sparse_block_bytes();
    return std::min(sparse_block_bytes(), s->flat ? dense_block_bytes() : cache_bytes(1));
  }
  int64_t sparse_block_bytes() const {
    return kBlockColumns * v.narrow_tile * v.lanes * v.lane_bytes;
  }
  void lanes() {
    // Each kernel row reads another row of pixels, so that wide tiles want a larger L1.
    const bool fits = sparse_block_bytes() <= cache_bytes(1);
    const bool wide = plan.density() >= kWideDensity && (fits || kind_of.size() == 1);
    s->tile_lanes = (wide ? v.wide_tile : v.narrow_tile) * v.lanes;
    if (s->samples) return sample_lanes();
    s->flat = is_flat();
    if (s->flat) {
      flat_lanes();
    } else {
      row_lanes();
    }
    s->strips = std::max<int64_t>(1, div_up(s->lanes, s->strip_lanes));
    s->copy_lanes = s->strip_lanes + s->span * s->pitch + v.lanes;
    if (!s->flat)
      s->copy_lanes += v.lanes * spread(s->copy_lanes / v.lanes, s->pitch / v.lanes, s->span + 1,
                                        s->tile_lanes * v.lane_bytes);
    s->centre_lanes = s->strip_lanes + v.lanes;
  }
  bool is_flat() const {
    if (s->span || s->first_shift) return false;
    for (const ConvKind& k : s->kinds) {
      if (k.shift) return false;
      for (int d = 0; d < 2; d++)
        if (div_up(s->source_size[d] - k.phase[d], s->source_step[d]) != s->grid[d]) return false;
    }
    for (const ConvPhase& p : s->phases)
      for (int d = 0; d < 2; d++)
        if (div_up(s->result_size[d] - p.phase[d], s->result_step[d]) != s->grid[d]) return false;
    return true;
  }
  void flat_lanes() {
    s->images = shape.batch;
    s->groups = 1;
    s->pitch = s->grid[0] * s->grid[1];
    s->lanes = round_up(shape.batch * s->pitch, v.lanes);
    const int64_t least = std::min(kFlatLanes, kStripBytes / bytes_per_lane());
    const int64_t fit = std::max({kFlatStripBytes / bytes_per_lane(), least, 2 * s->tile_lanes});
    s->strip_lanes =
        std::max<int64_t>(1, std::min<int64_t>(fit / s->tile_lanes, 16)) * s->tile_lanes;
    s->strip_lanes = std::min(s->strip_lanes, std::max(s->lanes, v.lanes));
  }
  // As many images side by side, and as many rows in a strip, as cost least for a pixel.
  void row_lanes() {
    double best = 0;
    int64_t rows = 0;
    for (int64_t n = 1; n <= std::min(shape.batch, kMostImages); n++) {
      for (int64_t strips = 1; strips <= s->grid[0]; strips++) {
        const int64_t r = div_up(s->grid[0], strips);
        const int64_t pitch = round_up(n * s->grid[1], v.lanes);
        const int64_t bytes = (r + s->span) * pitch * bytes_per_lane();
        const double cost = strip_cost(r, pitch, bytes) / static_cast<double>(r * n);
        if (rows && cost > best * 0.99) continue;
        best = cost;
        rows = r;
        s->images = n;
        s->pitch = pitch;
      }
    }
    s->groups = div_up(shape.batch, s->images);
    s->lanes = s->grid[0] * s->pitch;
    s->strip_lanes = rows * s->pitch;
  }
  // Cycles, about. A vector of a nonzero's product takes 1.6, of a copy 2.5, and a tile fetches its
  // part of the copies into L1 at 24 bytes a cycle. A strip beyond L2 costs more (512 channels of
  // 7 x 7 at 95 %: 0.9 MB 11.4 ms, 1.7 MB 11.1, 3.5 MB 14.8, 6 MB 28).
  double strip_cost(int64_t rows, int64_t pitch, int64_t bytes) const {
    const double vectors = static_cast<double>(rows * pitch / v.lanes);
    const double products = 1.6 * vectors * static_cast<double>(plan.pattern().nnz);
    const double lanes = static_cast<double>((rows + s->span) * pitch * copies());
    const double copying = 2.5 * lanes / static_cast<double>(v.lanes);
    const double tiles = std::max(1.0, vectors * v.lanes / s->tile_lanes);
    const double tile =
        std::min<double>(s->tile_lanes * (s->span + 1), s->tile_lanes + s->span * pitch);
    const double fetched = tiles * tile * static_cast<double>(copies() * v.lane_bytes) / 24;
    const double beyond = static_cast<double>(bytes) / kStripBytes - 1;
    return (products + copying + fetched) * (1 + 0.2 * std::max(0.0, beyond));
  }

  // Rows of a strip come in multiples of this: whole tiles, and bands of results that are whole
  // cache lines of each plane, which can go past the caches. The same for both directions, so that
  // they can share strips.
  int64_t unit_rows() const {
    const ConvShape& c = shape;
    return std::max(rows_in_whole_lines(c.out_size, 1),
                    rows_in_whole_lines(c.in_size, c.stride[0]));
  }
  // For results of this size, `step` rows of which are one of the grid.
  int64_t rows_in_whole_lines(const int64_t size[2], int64_t step) const {
    constexpr int64_t kLine = 64;
    if (size[0] * size[1] * v.lane_bytes % kLine) return kTileRows;
    for (int64_t rows = kTileRows; rows <= 2 * kTileRows; rows += kTileRows)
      if (rows * step * size[1] * v.lane_bytes % kLine == 0) return rows;
    return kTileRows;
  }
  // As many rows in a strip as stay near enough.
  void sample_lanes() {
    const int64_t vector = v.lanes * v.lane_bytes;
    s->pitch = s->grid[1] + column_span;
    const int64_t row = s->pitch * copies();
    const bool phases = shape.stride[0] * shape.stride[1] > 1;
    auto rows_of = [&](int64_t bytes) {
      return std::min(bytes / vector, kShortIndex) / row - s->span;
    };
    int64_t fit = rows_of(cache_bytes(2));
    if (fit < kFewStripRows && !phases) fit = rows_of(2 * cache_bytes(2));
    const int64_t unit = unit_rows();
    const int64_t near = (fit + unit / 2 - 1) / unit * unit;  // 2: below it; 4: the nearest
    const int64_t rows = std::min(std::max(near, unit), s->grid[0]);
    s->strips = div_up(s->grid[0], rows);
    s->strip_rows = std::min(round_up(div_up(s->grid[0], s->strips), unit), s->grid[0]);
    s->strips = div_up(s->grid[0], s->strip_rows);
    const int64_t plane = (s->strip_rows + s->span) * s->pitch;
    const int64_t free =
        spread(plane, s->pitch, kTileRows + s->span, sample_tile_columns() * vector);
    s->copy_lanes = (plane + free) * v.lanes;
    const int64_t results = s->result_channels * static_cast<int64_t>(s->phases.size());
    const int64_t band = kBandBytes / (results * s->grid[1] * vector);
    s->band_rows = std::min(std::max<int64_t>(band / unit * unit, unit), s->strip_rows);
  }
  // Of the source, that a tile of pixels reads.
  int64_t sample_tile_columns() const { return std::min(s->grid[1], kTileColumns) + column_span; }
  // Vectors to leave free after a plane, so that the tiles of the channels of a block, each of some
  // rows of `width` bytes, `pitch` vectors apart, spread evenly over L1's sets (256 channels of 14
  // x 14 are 8 KiB apart without: 1.6 times slower; 64 of 56 x 56 where lanes are pixels: 1.3). At
  // most a quarter of the plane.
  int64_t spread(int64_t plane, int64_t pitch, int64_t rows, int64_t width) const {
    constexpr int64_t kLine = 64, kSets = 64, kWays = 8;
    const int64_t vector = v.lanes * v.lane_bytes;
    const int64_t planes = std::min(copies(), block_bytes() / (width * rows) + 1);
    int64_t best = 0, least_beyond = INT64_MAX;
    for (int64_t pad = 0; pad < 32 && 4 * pad <= plane; pad++) {
      int64_t lines[kSets] = {}, beyond = 0;
      for (int64_t c = 0; c < planes; c++) {
        for (int64_t y = 0; y < rows; y++) {
          const int64_t from = (c * (plane + pad) + y * pitch) * vector;
          for (int64_t i = from / kLine; i * kLine < from + width; i++) lines[i % kSets]++;
        }
      }
      for (const int64_t n : lines) beyond += std::max<int64_t>(0, n - (kWays - 1));
      if (beyond >= least_beyond) continue;
      least_beyond = beyond;
      best = pad;
    }
    return best;
  }
  // First lane of what nonzero (o, column) reads, in vectors.
  int64_t operand(int64_t o, int64_t column) const {
    const int64_t size = shape.kernel[0] * shape.kernel[1];
    const int64_t per_group = shape.in_channels / shape.groups;
    const int64_t group = o / (shape.out_channels / shape.groups);
    const int64_t channel = transposed ? o : group * per_group + column / size;
    const int64_t tap = column % size;
    const int64_t copy = channel * static_cast<int64_t>(s->kinds.size()) + kind_of[tap];
    const int64_t row = row_shift_of[tap] - s->first_shift;
    if (s->samples)
      return copy * (s->copy_lanes / v.lanes) + row * s->pitch + column_shift_of[tap] -
             s->first_column;
    return (copy * s->copy_lanes + row * s->pitch) / v.lanes;
  }

  template <class I>
  void fill_index(I* index) {
    const Pattern& p = plan.pattern();
    if (!transposed) {
      std::vector<I> of_column(static_cast<size_t>(p.cols));
      const int64_t per_group = shape.out_channels / shape.groups;
      for (int64_t o = 0; o < p.rows; o++) {
        if (o % per_group == 0)
          for (int64_t c = 0; c < p.cols; c++) of_column[c] = static_cast<I>(operand(o, c));
        for (int32_t k = p.crow[o]; k < p.crow[o + 1]; k++) index[k] = of_column[p.col[k]];
      }
      return;
    }
    std::vector<int32_t> next(s->side.row_begin, s->side.row_begin + s->side.rows);
    const int64_t size = shape.kernel[0] * shape.kernel[1];
    std::vector<int64_t> of_tap(size);
    for (int64_t o = 0; o < p.rows; o++) {
      for (int64_t t = 0; t < size; t++) of_tap[t] = operand(o, t);
      const int64_t first = first_row(o);
      for (int32_t k = p.crow[o]; k < p.crow[o + 1]; k++)
        index[next[first + row_of_column[p.col[k]]]++] = static_cast<I>(of_tap[p.col[k] % size]);
    }
  }
  void find_used() {
    const Pattern& p = plan.pattern();
    const int64_t size = shape.kernel[0] * shape.kernel[1];
    const int64_t per_group = shape.in_channels / shape.groups;
    s->used.reset(new uint8_t[s->source_channels]());
    for (int64_t o = 0; o < p.rows; o++) {
      const int64_t first = o / (shape.out_channels / shape.groups) * per_group;
      for (int32_t k = p.crow[o]; k < p.crow[o + 1]; k++)
        s->used[transposed ? o : first + p.col[k] / size] = 1;
    }
  }
  int64_t first_row(int64_t o) const {
    return o / (shape.out_channels / shape.groups) * (shape.in_channels / shape.groups) *
           static_cast<int64_t>(s->phases.size());
  }

  void rows() {
    const Pattern& p = plan.pattern();
    Side& side = s->side;
    side.nnz = p.nnz;
    side.rows = static_cast<int64_t>(s->phases.size()) * s->result_channels;
    if (!transposed) {
      side.row_begin = p.crow;
      return;
    }
    row_of_column.resize(static_cast<size_t>(p.cols));
    s->fill_row_of_column(p.cols, row_of_column.data());
    s->row_begin.reset(new int32_t[side.rows + 1]());
    int32_t* begin = s->row_begin.get();
    for (int64_t o = 0; o < p.rows; o++)
      for (int32_t k = p.crow[o]; k < p.crow[o + 1]; k++)
        begin[first_row(o) + row_of_column[p.col[k]] + 1]++;
    for (int64_t r = 0; r < side.rows; r++) begin[r + 1] += begin[r];
    side.row_begin = begin;
  }

  void index() {
    Side& side = s->side;
    const int64_t kinds = static_cast<int64_t>(s->kinds.size());
    const int64_t vectors = s->source_channels * kinds * s->copy_lanes / v.lanes;
    if (vectors <= kShortIndex) {
      side.index16.reset(new uint16_t[side.nnz + kIndicesAhead]());
      fill_index(side.index16.get());
      cut(side.index16.get());
    } else {
      s->index32.reset(new int32_t[side.nnz + kIndicesAhead]());
      fill_index(s->index32.get());
      side.index32 = s->index32.get();
      cut(s->index32.get());
    }
  }
  // Blocks of channels whose copies, as far as one tile reads them, are near L1.
  template <class I>
  void cut(const I* index) {
    Side& side = s->side;
    if (!side.nnz) return;
    const int64_t kinds = static_cast<int64_t>(s->kinds.size());
    int64_t channel = kinds * (s->tile_lanes + s->span * s->pitch) * v.lane_bytes;
    if (s->samples)
      channel = kinds * (kTileRows + s->span) * sample_tile_columns() * v.lanes * v.lane_bytes;
    const int64_t fit = std::max<int64_t>(1, block_bytes() / channel);
    const double per_cell = s->samples ? kNonzerosPerTile : kNonzerosPerCell;
    const double most = static_cast<double>(side.nnz) / (side.rows * per_cell);
    side.blocks =
        std::min(div_up(s->source_channels, fit), std::max<int64_t>(1, static_cast<int64_t>(most)));
    if (side.blocks == 1) return;
    side.cuts.reset(new int32_t[(side.blocks - 1) * side.rows]);
    for (int64_t r = 0; r < side.rows; r++) {
      int32_t k = side.row_begin[r];
      for (int64_t b = 1; b < side.blocks; b++) {
        const int64_t first =
            s->source_channels * b / side.blocks * kinds * (s->copy_lanes / v.lanes);
        while (k < side.row_begin[r + 1] && index[k] < first) k++;
        side.cuts[(b - 1) * side.rows + r] = k;
      }
    }
  }
};

}  // namespace

SampleTables::~SampleTables() = default;

SampleTables::SampleTables(const ConvSide& s, int64_t vector_lanes) {
  const int64_t rows = s.strip_rows + s.span, plane = s.copy_lanes / vector_lanes;
  std::vector<char> used(s.kinds.size() * plane);
  for (int64_t y = 0; y < rows * s.source_step[0]; y++) {
    for (int64_t x = 0; x < s.source_size[1]; x++) {
      const ConvKind kind{{y % s.source_step[0], x % s.source_step[1]}, 0};
      const int64_t column = x / s.source_step[1] - s.first_column;
      int64_t slot = -1;
      for (size_t k = 0; k < s.kinds.size(); k++)
        if (!std::memcmp(&s.kinds[k], &kind, sizeof kind) && column >= 0 && column < s.pitch)
          slot = static_cast<int64_t>(k) * plane + y / s.source_step[0] * s.pitch + column;
      if (slot >= 0) used[slot] = 1;
      slots.push_back(static_cast<int32_t>(slot));
    }
  }
  for (size_t i = 0; i < used.size(); i++)
    if (!used[i]) gaps.push_back(static_cast<int32_t>(i));
  const int64_t* step = s.result_step;
  if (step[0] == 1 && step[1] == 1) return;
  for (int64_t y = 0; y < s.band_rows * step[0]; y++) {
    for (int64_t x = 0; x < s.result_size[1]; x++) {
      const ConvPhase phase{{y % step[0], x % step[1]}};
      int64_t place = -1;
      for (size_t f = 0; f < s.phases.size(); f++)
        if (!std::memcmp(&s.phases[f], &phase, sizeof phase))
          place = (static_cast<int64_t>(f) * s.band_rows + y / step[0]) * s.grid[1] + x / step[1];
      places.push_back(static_cast<int32_t>(place));
    }
  }
}

// Vectors of pixels of the result, where lanes are pixels: rows of as many images side by side as
// fit best, or, where nothing shifts them, pixels of all images in one run.
static int64_t vectors_of_pixels(const ConvShape& s, int64_t lanes) {
  const int64_t plane = s.out_size[0] * s.out_size[1];
  if (s.kernel[0] * s.kernel[1] == 1 && !s.padding[0] && !s.padding[1])
    return div_up(s.batch * plane, lanes);
  int64_t fewest = INT64_MAX;
  for (int64_t n = 1; n <= std::min(s.batch, kMostImages); n++)
    fewest =
        std::min(fewest, div_up(s.batch, n) * s.out_size[0] * div_up(n * s.out_size[1], lanes));
  return fewest;
}

// Whether moving pixels is moving whole vectors of them (ShiftedRun).
static bool moves_vectors(const ConvShape& s, const ConvVectors& v) {
  return s.stride[0] * s.stride[1] == 1 && s.in_size[0] == s.out_size[0] &&
         s.in_size[1] == s.out_size[1] && v.lane_bytes == 4 && v.lanes >= 8;
}

// What one column of the pattern costs, where a nonzero costs one unit for each vector. In rows of
// pixels there is one unit more for the results; the copies, as many as the kernel is wide times
// the stride's height, are 4 each; and a nonzero is 8 more for its value and gradient, which are in
// another order than the pattern's. To unfold and fold costs as much as 12 nonzeros, or 6 where
// vectors of pixels are moved. 1 x 1 kernels make no copies: 4 for the order, 5 to unfold. Of 125
// layers of 3 x 3 and 5 x 5, 30-99 % sparse, at batches of 1 to 4 (AVX-512 in halves) this is wrong
// about 6, which then take 1.05 times as long.
struct ColumnCost {
  double in_rows, unfolded;
};
static ColumnCost column_cost(const ConvShape& s, const ConvVectors& v, double nonzeros) {
  const int64_t pixels = s.batch * s.out_size[0] * s.out_size[1];
  const int64_t taps = s.kernel[0] * s.kernel[1];
  const double rows = static_cast<double>(vectors_of_pixels(s, v.lanes));
  const double vectors = static_cast<double>(div_up(pixels, v.lanes));
  if (taps == 1) return {rows * (nonzeros + 1) + 4 * nonzeros, vectors * (nonzeros + 5)};
  const double copies = static_cast<double>(s.kernel[1] * s.stride[0]) / static_cast<double>(taps);
  return {rows * (nonzeros + 1 + 4 * copies) + 8 * nonzeros,
          vectors * (nonzeros + (moves_vectors(s, v) ? 6 : 12))};
}

bool samples_are_pixels(int64_t nnz, const ConvShape& s, const ConvVectors& v) {
  // What is folded at a time, some hundred columns of all pixels, is no more than a few megabytes.
  constexpr int64_t kMostPixels = 4096;
  // 1 x 1 kernels leave nothing to fold: with 1568 pixels copying takes 1.05-1.5 times as long.
  constexpr int64_t kMost1x1Pixels = 1024;
  const int64_t pixels = s.batch * s.out_size[0] * s.out_size[1];
  if (s.groups > 1 || !pixels || pixels > kMostPixels) return false;
  if (s.kernel[0] * s.kernel[1] == 1 && pixels > std::min(2 * s.out_channels, kMost1x1Pixels))
    return false;
  if (lanes_are_samples(s, v)) return false;
  const int64_t columns = s.in_channels * s.kernel[0] * s.kernel[1];
  const ColumnCost cost =
      column_cost(s, v, static_cast<double>(nnz) / static_cast<double>(columns));
  return cost.unfolded <= cost.in_rows;
}

bool lanes_are_samples(const ConvShape& s, const ConvVectors& v) {
  const int64_t filled = div_up(s.batch, v.lanes) * v.lanes;
  const bool pointwise = s.kernel[0] * s.kernel[1] == 1;
  return !pointwise && s.batch * 4 >= filled * 3;
}

void ConvSide::fill_row_of_column(int64_t columns, int32_t* row_of_column) const {
  const int64_t taps = static_cast<int64_t>(phase_of.size());
  const int32_t count = static_cast<int32_t>(phases.size());
  for (int64_t c = 0, row = 0; c < columns; c += taps, row += count)
    for (int64_t t = 0; t < taps; t++)
      row_of_column[c + t] = static_cast<int32_t>(row) + phase_of[t];
}

size_t ConvSide::bytes() const {
  return sizeof(ConvSide) + side.bytes() + phase_of.size() * sizeof(int32_t) +
         (row_begin ? sizeof(int32_t) * (side.rows + 1) : 0) +
         (index32 ? sizeof(int32_t) * (side.nnz + kIndicesAhead) : 0) + source_channels;
}

static std::shared_ptr<const ConvSide> find_or_build(const Plan& plan, const ConvShape& shape,
                                                     bool transposed, const ConvVectors& vectors) {
  Plan::ConvSlot& slot = plan.conv_slot(transposed);
  const std::lock_guard<std::mutex> lock(slot.mutex);
  ConvKey key;
  std::memset(&key, 0, sizeof key);
  key.shape = shape;
  key.vectors = vectors;
  const bool samples = lanes_are_samples(shape, vectors);
  if (samples) key.shape.batch = 0;  // nothing depends on it
  if (slot.older && !std::memcmp(&slot.older->key, &key, sizeof key)) slot.side.swap(slot.older);
  if (slot.side && !std::memcmp(&slot.side->key, &key, sizeof key)) return slot.side;
  auto side = std::make_shared<ConvSide>();
  side->key = key;
  side->samples = samples;
  Builder builder{plan, shape, vectors, transposed, side.get(), {}, {}, {}, {}};
  builder.geometry();
  builder.taps();
  builder.lanes();
  builder.rows();
  builder.index();
  builder.find_used();
  slot.older = std::move(slot.side);
  slot.side = side;
  return side;
}

ConvHandle::ConvHandle(const Plan& plan, const ConvShape& shape, bool transposed,
                       const ConvVectors& vectors) {
  auto* owner =
      new std::shared_ptr<const ConvSide>(find_or_build(plan, shape, transposed, vectors));
  owner_ = owner;
  side_ = owner->get();
}
ConvHandle::~ConvHandle() { delete static_cast<std::shared_ptr<const ConvSide>*>(owner_); }

}  // namespace sparsetrain
