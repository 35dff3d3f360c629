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

// body(element of x, element of y, k) for every product of a convolution.
template <class Body>
void for_each_product(const Pattern& p, const ConvShape& s, const Body& body) {
  const int64_t in_group = s.in_channels / s.groups, out_group = s.out_channels / s.groups;
  for_each_nonzero(p, [&](int64_t o, int64_t column, int64_t k) {
    const int64_t j = column % s.kernel[1], i = column / s.kernel[1] % s.kernel[0];
    const int64_t c = column / (s.kernel[0] * s.kernel[1]) + o / out_group * in_group;
    for (int64_t n = 0; n < s.batch; n++) {
      for (int64_t v = 0; v < s.out_size[0]; v++) {
        const int64_t y = v * s.stride[0] + i * s.dilation[0] - s.padding[0];
        if (y < 0 || y >= s.in_size[0]) continue;
        const int64_t from = ((n * s.in_channels + c) * s.in_size[0] + y) * s.in_size[1];
        const int64_t to = ((n * s.out_channels + o) * s.out_size[0] + v) * s.out_size[1];
        for (int64_t u = 0; u < s.out_size[1]; u++) {
          const int64_t x = u * s.stride[1] + j * s.dilation[1] - s.padding[1];
          if (x >= 0 && x < s.in_size[1]) body(from + x, to + u, k);
        }
      }
    }
  });
}

inline int64_t count_x(const ConvShape& s) {
  return s.batch * s.in_channels * s.in_size[0] * s.in_size[1];
}
inline int64_t count_y(const ConvShape& s) {
  return s.batch * s.out_channels * s.out_size[0] * s.out_size[1];
}

// x: count_x, values: (p.nnz), bias: (s.out_channels) or null -> count_y
inline std::vector<Sum> conv_forward(DType dtype, const Pattern& p, const ConvShape& s,
                                     const void* x, const void* values, const void* bias) {
  std::vector<Sum> y(count_y(s));
  const int64_t plane = s.out_size[0] * s.out_size[1];
  for (size_t i = 0; bias && i < y.size(); i++)
    y[i].add(read(dtype, bias, static_cast<int64_t>(i) / plane % s.out_channels));
  for_each_product(p, s, [&](int64_t from, int64_t to, int64_t k) {
    y[to].add(read(dtype, values, k) * read(dtype, x, from));
  });
  return y;
}

// dy: count_y, values: (p.nnz) -> count_x
inline std::vector<Sum> conv_grad_input(DType dtype, const Pattern& p, const ConvShape& s,
                                        const void* dy, const void* values) {
  std::vector<Sum> dx(count_x(s));
  for_each_product(p, s, [&](int64_t to, int64_t from, int64_t k) {
    dx[to].add(read(dtype, values, k) * read(dtype, dy, from));
  });
  return dx;
}

// dy: count_y, x: count_x -> (p.nnz)
inline std::vector<Sum> conv_grad_values(DType dtype, const Pattern& p, const ConvShape& s,
                                         const void* dy, const void* x) {
  std::vector<Sum> dvalues(p.nnz);
  for_each_product(p, s, [&](int64_t i, int64_t j, int64_t k) {
    dvalues[k].add(read(dtype, dy, j) * read(dtype, x, i));
  });
  return dvalues;
}

// dy: count_y -> (s.out_channels)
inline std::vector<Sum> conv_grad_bias(DType dtype, const ConvShape& s, const void* dy) {
  std::vector<Sum> dbias(s.out_channels);
  const int64_t plane = s.out_size[0] * s.out_size[1];
  for (int64_t i = 0; i < count_y(s); i++)
    dbias[i / plane % s.out_channels].add(read(dtype, dy, i));
  return dbias;
}

}  // namespace reference
}  // namespace sparsetrain
