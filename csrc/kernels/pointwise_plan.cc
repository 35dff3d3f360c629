#include "pointwise_plan.h"

#include <algorithm>
#include <vector>

namespace sparsetrain {

namespace {

// A row that adds its products to what is kept loads and stores a tile for each nonzero; one that
// gathers only loads. Forward with more nonzeros than this in a row, other kernels are faster (256
// -> 64 at 80 %: 0.93, 512 -> 128 0.7). Backward it is the gradient of the input, which costs twice
// as much, but both gradients read each tensor only once: 1.3-1.4 times faster at 80 %, 1.1-1.25 at
// 70 %.
constexpr double kMostScatteredForward = 11;
constexpr double kDensestScatteredBackward = 0.25;
// Where images end inside a vector, pixels are computed twice: backward 0.9-1.0 at 50-80 %.
constexpr double kDensestRagged = 0.15, kDensestRaggedScattered = 0.07;
// Bytes of the tile that is kept: where each pixel of it is read often it must stay in L1, else L2
// will do.
constexpr int64_t kMostKept = 64 << 10;
constexpr double kOften = 0.15;

struct Rule {
  const ConvShape& s;
  const double nnz;
  const int64_t lanes, tile_bytes;

  bool applies() const {
    for (int d = 0; d < 2; d++)
      if (s.kernel[d] != 1 || s.stride[d] != 1 || s.padding[d] != 0) return false;
    return s.groups == 1 && pixels() >= lanes;
  }
  bool ragged() const { return pixels() % lanes; }
  int64_t pixels() const { return s.in_size[0] * s.in_size[1]; }
  double density() const { return nnz / static_cast<double>(s.in_channels * s.out_channels); }
  bool fits(int64_t channels) const {
    return channels * tile_bytes <= (density() > kOften ? cache_bytes(1) * 3 / 4 : kMostKept);
  }
};

}  // namespace

PointwiseBy pointwise_by(const ConvForward& call, int64_t lanes, int64_t tile_bytes) {
  const ConvShape& s = call.shape;
  const Rule rule{s, static_cast<double>(call.plan->pattern().nnz), lanes, tile_bytes};
  // Ragged: other kernels are as fast (14 x 14: 0.7-1.05).
  if (!rule.applies() || rule.ragged()) return PointwiseBy::none;
  const bool can_gather = rule.fits(s.in_channels);
  const bool can_scatter = rule.fits(s.out_channels) &&
                           rule.nnz <= kMostScatteredForward * static_cast<double>(s.in_channels);
  if (can_gather && (s.out_channels >= s.in_channels || !can_scatter)) return PointwiseBy::output;
  return can_scatter ? PointwiseBy::input : PointwiseBy::none;
}

PointwiseBy pointwise_by(const ConvBackward& call, int64_t lanes, int64_t tile_bytes) {
  const ConvShape& s = call.shape;
  const Rule rule{s, static_cast<double>(call.plan->pattern().nnz), lanes, tile_bytes};
  if (!rule.applies()) return PointwiseBy::none;
  const double gathered = rule.ragged() ? kDensestRagged : 1;
  const double scattered = rule.ragged() ? kDensestRaggedScattered : kDensestScatteredBackward;
  const bool can_gather = rule.fits(s.out_channels) && rule.density() <= gathered;
  const bool can_scatter = rule.fits(s.in_channels) && rule.density() <= scattered;
  if (can_gather && (s.in_channels >= s.out_channels || !can_scatter)) return PointwiseBy::input;
  return can_scatter ? PointwiseBy::output : PointwiseBy::none;
}

void build_pointwise(const Pattern& p, bool by_input, int64_t tile_bytes, PointwiseSide* s) {
  s->by_input = by_input;
  s->rows = by_input ? p.cols : p.rows;
  s->kept = by_input ? p.rows : p.cols;
  s->nnz = p.nnz;
  std::vector<int32_t> count(static_cast<size_t>(s->rows));
  for (int64_t o = 0; o < p.rows; o++) {
    if (!s->by_input) count[o] = p.crow[o + 1] - p.crow[o];
    for (int32_t k = p.crow[o]; s->by_input && k < p.crow[o + 1]; k++) count[p.col[k]]++;
  }
  s->row.reset(new int32_t[s->rows + kPointwiseAhead]);
  for (int64_t r = 0; r < s->rows; r++) s->row[r] = static_cast<int32_t>(r);
  std::stable_sort(s->row.get(), s->row.get() + s->rows,
                   [&](int32_t a, int32_t b) { return count[a] < count[b]; });
  std::vector<CellRun> runs;
  s->first.reset(new int32_t[s->rows]);
  int32_t at = 0;
  for (int64_t i = 0; i < s->rows; i++) {
    const int32_t r = s->row[i], n = count[r];
    if (runs.empty() || runs.back().nonzeros != n) runs.push_back({n, 0});
    runs.back().cells++;
    s->first[r] = at;
    at += n;
  }
  s->run_count = static_cast<int64_t>(runs.size());
  s->runs.reset(new CellRun[runs.size()]);
  std::copy(runs.begin(), runs.end(), s->runs.get());
  s->index.reset(new uint16_t[s->nnz + kIndicesAhead]());
  std::vector<int32_t> next(s->first.get(), s->first.get() + s->rows);
  for (int64_t o = 0; o < p.rows; o++) {
    for (int32_t k = p.crow[o]; k < p.crow[o + 1]; k++) {
      const int64_t row = s->by_input ? p.col[k] : o, kept = s->by_input ? o : p.col[k];
      s->index[next[row]++] = static_cast<uint16_t>(kept * tile_bytes / 8);
    }
  }
  // What follows a tile's last rows are the next one's first.
  s->empty = runs.empty() || runs[0].nonzeros ? 0 : runs[0].cells;
  const int64_t left = std::max<int64_t>(1, s->rows - s->empty);
  for (int64_t i = 0; i < kPointwiseAhead; i++)
    s->row[s->rows + i] = s->row[s->rows - left + i % left];
}

size_t PointwiseSide::bytes() const {
  return sizeof(CellRun) * run_count + sizeof(int32_t) * (2 * rows + kPointwiseAhead) +
         sizeof(uint16_t) * (nnz + kIndicesAhead);
}

}  // namespace sparsetrain
