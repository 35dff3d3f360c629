// The plain signatures between csrc/ops (tensors) and csrc/kernels (raw pointers and sizes).
// Nothing in this folder knows a tensor class.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsetrain {

// Storage type of activations, values and biases. Sums are kept in double for f64, else in float.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2 };

// How the caller's thread pool is reached. run() calls body(ctx, i) exactly once for every i in
// [0, n), on any thread, and returns when all are done. No result may depend on who ran which i.
struct Parallel {
  void (*run)(int64_t n, void (*body)(void* ctx, int64_t i), void* ctx);
  int threads;  // how many may run at once, >= 1
};

// A row-major matrix: element (r, c) is at data[r * row_stride + c]. row_stride >= cols (or
// anything, where rows <= 1). No alignment is asked for. Does not overlap any output.
struct Matrix {
  const void* data;
  int64_t rows, cols, row_stride;
};

// CSR over weight.reshape(out, -1). crow: rows + 1 entries, col: nnz entries.
// Invariants (checked by plan_create, relied on by every kernel): crow[0] == 0, crow monotone,
// crow[rows] == nnz, 0 <= col < cols, col strictly increasing inside a row, nnz < 2^31.
struct Pattern {
  int64_t rows, cols, nnz;
  const int32_t* crow;
  const int32_t* col;
};

// What check_pattern found: `where` is the row (crow faults) or the nonzero (col faults).
enum class PatternFault : int {
  none = 0,
  crow_start,        // crow[0] != 0
  crow_decreasing,   // crow[where] > crow[where + 1]
  crow_end,          // crow[rows] != nnz
  col_out_of_range,  // col[where] not in [0, cols)
  col_unsorted,      // col[where] < col[where - 1] in one row
  col_duplicate,     // col[where] == col[where - 1] in one row
};
struct PatternCheck {
  PatternFault fault;
  int64_t where;
};
PatternCheck check_pattern(const Pattern& pattern);

// CSR of the transpose. tcrow: cols + 1, tcol: nnz, perm: nnz with tvalues[k] = values[perm[k]].
void transpose_pattern(const Pattern& pattern, int32_t* tcrow, int32_t* tcol, int32_t* perm);

// The derived, rebuildable form of one pattern (plan.h). The pattern's arrays must outlive it.
class Plan;
Plan* plan_create(const Pattern& pattern);  // the pattern must have passed check_pattern
void plan_destroy(Plan* plan);
size_t plan_bytes(const Plan* plan);  // resident bytes beyond the pattern itself

// y = x W^T + bias
//   x: (batch, pattern.cols); values: (nnz); bias: (pattern.rows) or null
//   y: (batch, pattern.rows), contiguous, written in full
struct LinearForward {
  DType dtype;
  const Plan* plan;
  Matrix x;
  const void* values;
  const void* bias;
  void* y;
  Parallel parallel;
};

// dx = dy W;  dvalues[k] = sum_b dy[b, row(k)] * x[b, col(k)];  dbias[r] = sum_b dy[b, r]
//   dy: (batch, pattern.rows)
//   dx: (batch, pattern.cols), contiguous, or null; needs values: (nnz)
//   dvalues: (nnz), or null; needs x: (batch, pattern.cols)
//   dbias: (pattern.rows), or null; only together with dvalues
// What is not null is written in full. Asking for dx and dvalues at once packs dy once.
struct LinearBackward {
  DType dtype;
  const Plan* plan;
  Matrix dy;
  Matrix x;
  const void* values;
  void* dx;
  void* dvalues;
  void* dbias;
  Parallel parallel;
};

// A 2-D convolution with zero padding, as torch.nn.Conv2d counts; index 0 is vertical.
// The pattern is over weight.reshape(out_channels, in_channels / groups * kernel[0] * kernel[1]).
struct ConvShape {
  int64_t batch, in_channels, in_size[2];
  int64_t out_channels, out_size[2];
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;
};

// y = conv(x, W) + bias
//   x: (batch, in_channels, in_size), y: (batch, out_channels, out_size), both contiguous; y is
//   written in full; values: (nnz); bias: (out_channels) or null
struct ConvForward {
  DType dtype;
  const Plan* plan;
  ConvShape shape;
  const void* x;
  const void* values;
  const void* bias;
  void* y;
  Parallel parallel;
};

// The gradients of the above; dx, dvalues, dbias as in LinearBackward.
//   dy: (batch, out_channels, out_size), contiguous; x as above, or null without dvalues
struct ConvBackward {
  DType dtype;
  const Plan* plan;
  ConvShape shape;
  const void* dy;
  const void* x;
  const void* values;
  void* dx;
  void* dvalues;
  void* dbias;
  Parallel parallel;
};

// Rows [first, last) of the dense weight and the values at the pattern. `weight` begins with row
// `first`: (last - first, pattern.cols), contiguous; values: (nnz), all of the pattern.
// values_to_dense writes the weight in full, zeros included; it takes values of the weight's dtype,
// and bf16 values for an f32 weight. dense_to_values writes the values of these rows; dtypes alike.
struct DenseRows {
  DType values_dtype, weight_dtype;
  const Plan* plan;
  int64_t first, last;
  void* values;  // values_to_dense only reads
  void* weight;  // dense_to_values only reads
  Parallel parallel;
};

// One row per instruction set; all rows give results that differ by rounding only.
struct KernelTable {
  const char* isa;
  bool (*supported)();  // by this CPU
  void (*linear_forward)(const LinearForward&);
  void (*linear_backward)(const LinearBackward&);
  void (*conv_forward)(const ConvForward&);
  void (*conv_backward)(const ConvBackward&);
  void (*values_to_dense)(const DenseRows&);
  void (*dense_to_values)(const DenseRows&);
};

// Best first; the last one is supported everywhere. A null pointer ends the list.
extern const KernelTable* const kKernelTables[];

// The table in use: the best supported one, or what SPARSETRAIN_ISA names, once per process.
// An unknown or unsupported name gives null from select_kernels; ops turn that into an error.
const KernelTable* select_kernels(const char* forced_isa);

}  // namespace sparsetrain
