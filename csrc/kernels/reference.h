// The oracle of the kernel tests: one scalar loop per operator, summed in double. For each result
// also the sum of the magnitudes of its terms, which is what a rounding error must be measured by.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace sparsetrain {
namespace reference {

struct Sum {
  double value = 0;      // sum of the terms
  double magnitude = 0;  // sum of |term|
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};

// Element i of an array of dtype.
inline double read(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::f64) return static_cast<const double*>(data)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline double read(DType dtype, const Matrix& m, int64_t row, int64_t col) {
  return read(dtype, m.data, row * m.row_stride + col);
}

// body(row, column, k) for every nonzero k.
template <class Body>
void for_each_nonzero(const Pattern& p, const Body& body) {
  for (int64_t row = 0; row < p.rows; row++)
    for (int64_t k = p.crow[row]; k < p.crow[row + 1]; k++) body(row, int64_t{p.col[k]}, k);
}

// x: (batch, p.cols), values: (p.nnz), bias: (p.rows) or null -> (batch, p.rows)
inline std::vector<Sum> linear_forward(DType dtype, const Pattern& p, const Matrix& x,
                                       const void* values, const void* bias) {
  std::vector<Sum> y(x.rows * p.rows);
  for (int64_t b = 0; b < x.rows; b++) {
    Sum* out = y.data() + b * p.rows;
    for (int64_t row = 0; bias && row < p.rows; row++) out[row].add(read(dtype, bias, row));
    for_each_nonzero(p, [&](int64_t row, int64_t col, int64_t k) {
      out[row].add(read(dtype, values, k) * read(dtype, x, b, col));
    });
  }
  return y;
}

// dy: (batch, p.rows), values: (p.nnz) -> (batch, p.cols)
inline std::vector<Sum> linear_grad_input(DType dtype, const Pattern& p, const Matrix& dy,
                                          const void* values) {
  std::vector<Sum> dx(dy.rows * p.cols);
  for (int64_t b = 0; b < dy.rows; b++) {
    Sum* out = dx.data() + b * p.cols;
    for_each_nonzero(p, [&](int64_t row, int64_t col, int64_t k) {
      out[col].add(read(dtype, values, k) * read(dtype, dy, b, row));
    });
  }
  return dx;
}

// dy: (batch, p.rows), x: (batch, p.cols) -> (p.nnz)
inline std::vector<Sum> linear_grad_values(DType dtype, const Pattern& p, const Matrix& dy,
                                           const Matrix& x) {
  std::vector<Sum> dvalues(p.nnz);
  for (int64_t b = 0; b < x.rows; b++) {
    for_each_nonzero(p, [&](int64_t row, int64_t col, int64_t k) {
      dvalues[k].add(read(dtype, dy, b, row) * read(dtype, x, b, col));
    });
  }
  return dvalues;
}

// dy: (batch, rows) -> (rows)
inline std::vector<Sum> linear_grad_bias(DType dtype, const Matrix& dy) {
  std::vector<Sum> dbias(dy.cols);
  for (int64_t b = 0; b < dy.rows; b++)
    for (int64_t row = 0; row < dy.cols; row++) dbias[row].add(read(dtype, dy, b, row));
  return dbias;
}

}  // namespace reference
}  // namespace sparsetrain
