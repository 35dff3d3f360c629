// Linear layers by the library's product, and a dense weight for other layers.
//
// The weight is made in panels of some rows that stay in the L2 cache until they are multiplied:
// written as a whole it would go to L3 and come back, which at batch 8 takes longer than the
// product. Where every weight is a nonzero, the values are the dense weight and nothing is copied.
#include <algorithm>
#include <string>
#include <tuple>

#include "checks.h"
#include "library.h"

namespace sparsetrain {
namespace {

// Bytes of a panel, for each thread.
constexpr int64_t kPanelBytes = 192 << 10;

// rows x cols elements from the one at `offset` of `t` on, at these strides.
Tensor view(const Tensor& t, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
            int64_t offset) {
  const int64_t sizes[2] = {rows, cols}, strides[2] = {row_stride, col_stride};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &handle));
  return Tensor(handle);
}
Tensor columns(const Tensor& t, int64_t first, int64_t count) {  // of a matrix
  return view(t, t.size(0), count, t.stride(0), t.stride(1), first * t.stride(1));
}
Tensor transposed(const Tensor& t) {
  return view(t, t.size(1), t.size(0), t.stride(1), t.stride(0), 0);
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
void multiply_onto(const Tensor& out, const Tensor& onto, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), onto.get(), a.get(), b.get(), 1, 1));
}

// The weight of one pattern, a panel of rows at a time.
struct Panels {
  const char* op;
  std::shared_ptr<const PlanEntry> entry;
  ScalarType type;  // of the weight
  int64_t rows, cols, height, count;
  bool full;  // every weight is a nonzero
  Tensor buffer;

  // scratch: whether a buffer is wanted even where the values are the weight.
  Panels(const char* op, std::shared_ptr<const PlanEntry> found, ScalarType type, int64_t batch)
      : op(op), entry(std::move(found)), type(type), buffer(nullptr) {
    rows = entry->pattern().rows;
    cols = entry->pattern().cols;
    full = entry->pattern().nnz == rows * cols;
    const int64_t size = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
    const int64_t threads = torch::stable::get_num_threads();
    // Every panel packs the other operand anew: twice as many rows as samples make that cheap.
    height = std::max(kPanelBytes * threads / (size * std::max<int64_t>(cols, 1)), 2 * batch);
    height = std::max<int64_t>(height / 8 * 8, 8);
    if (full || height >= rows) height = std::max<int64_t>(rows, 1);
    count = std::max<int64_t>(1, (rows + height - 1) / height);
    height = (rows + count - 1) / count;
    if (count > 1) height += height % 2;  // see product_type
  }
  int64_t first(int64_t i) const { return std::min(i * height, rows); }
  int64_t size(int64_t i) const { return first(i + 1) - first(i); }
  DenseRows view_of(int64_t i, const Tensor& values, const Tensor& weight) const {
    return {kernel_type(values.scalar_type()),
            kernel_type(type),
            entry->plan(),
            first(i),
            first(i + 1),
            const_cast<void*>(values.const_data_ptr()),
            weight.mutable_data_ptr(),
            torch_threads()};
  }
  Tensor scratch(int64_t i) {
    if (!buffer.get()) buffer = kept_scratch(type, height * cols);
    return view(buffer, size(i), cols, cols, 1, 0);
  }
  // Panel i of the weight: (size(i), cols).
  Tensor filled(int64_t i, const Tensor& values) {
    if (full) return view(as_type(values, type), rows, cols, cols, 1, 0);
    const Tensor panel = scratch(i);
    if (panel.numel()) kernels(op).values_to_dense(view_of(i, values, panel));
    return panel;
  }
};

Tensor linear_dense(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                    const Tensor& crow, const Tensor& col, const Tensor& key) {
  constexpr const char* op = "linear_dense";
  check_layout(op, "values", values, 1);
  dtype_of(op, "values", values);
  const ScalarType given = values.scalar_type();
  check_floats(op, "x", x, 2, "values", given);
  const ScalarType type = product_type(given, x.size(1));
  Panels panels(op, plan_for(op, key, crow, col, x.size(1)), type, x.size(0));
  check_length(op, "values", values.size(0), "nonzeros of the pattern",
               panels.entry->pattern().nnz);
  if (bias) {
    check_floats(op, "bias", *bias, 1, "values", given);
    check_length(op, "bias", bias->size(0), "rows of the pattern", panels.rows);
  }
  const Tensor x_wide = as_type(x, type), values_c = as_contiguous(values);
  const Tensor bias_wide = bias ? as_type(as_contiguous(*bias), type) : x_wide;
  const Tensor y = empty_of(type, x.size(0), panels.rows);
  for (int64_t i = 0; i < panels.count; ++i) {
    const Tensor weight = transposed(panels.filled(i, values_c));
    const Tensor out = columns(y, panels.first(i), panels.size(i));
    if (bias) {
      const Tensor rows = view(bias_wide, x.size(0), panels.size(i), 0, 1, panels.first(i));
      multiply_onto(out, rows, x_wide, weight);
    } else {
      multiply(out, x_wide, weight);
    }
  }
  return as_type(y, given);
}

Tensor grad_input_of(const char* op, const Tensor& grad, const Tensor& values, const Tensor& crow,
                     const Tensor& col, const Tensor& key, int64_t in_features) {
  check_layout(op, "values", values, 1);
  dtype_of(op, "values", values);
  const ScalarType given = values.scalar_type();
  check_floats(op, "grad", grad, 2, "values", given);
  const ScalarType type = product_type(given, grad.size(1));
  Panels panels(op, plan_for(op, key, crow, col, in_features), type, grad.size(0));
  check_length(op, "each row of grad", grad.size(1), "rows of the pattern", panels.rows);
  check_length(op, "values", values.size(0), "nonzeros of the pattern",
               panels.entry->pattern().nnz);
  const Tensor grad_wide = as_type(grad, type), values_c = as_contiguous(values);
  const Tensor dx = empty_of(type, grad.size(0), in_features);
  for (int64_t i = 0; i < panels.count; ++i) {
    const Tensor part = columns(grad_wide, panels.first(i), panels.size(i));
    const Tensor weight = panels.filled(i, values_c);
    if (i == 0)
      multiply(dx, part, weight);
    else
      multiply_onto(dx, dx, part, weight);
  }
  return as_type(dx, given);
}

std::tuple<Tensor, Tensor> grad_values_of(const char* op, const Tensor& grad, const Tensor& x,
                                          const Tensor& crow, const Tensor& col, const Tensor& key,
                                          bool bias) {
  check_layout(op, "x", x, 2);
  dtype_of(op, "x", x);
  const ScalarType given = x.scalar_type(), type = product_type(given);
  check_floats(op, "grad", grad, 2, "x", given);
  Panels panels(op, plan_for(op, key, crow, col, x.size(1)), type, x.size(0));
  check_length(op, "each row of grad", grad.size(1), "rows of the pattern", panels.rows);
  check_length(op, "grad", grad.size(0), "rows of x", x.size(0));
  const Tensor grad_wide = as_type(grad, type), x_wide = as_type(x, type);
  const Tensor dvalues = [&] {
    const int64_t nnz = panels.entry->pattern().nnz;
    return empty_of(type, 1, &nnz);
  }();
  for (int64_t i = 0; i < panels.count; ++i) {
    const Tensor part = transposed(columns(grad_wide, panels.first(i), panels.size(i)));
    if (panels.full) {
      multiply(view(dvalues, panels.rows, panels.cols, panels.cols, 1, 0), part, x_wide);
      break;
    }
    const Tensor weight = panels.scratch(i);
    multiply(weight, part, x_wide);
    if (weight.numel()) kernels(op).dense_to_values(panels.view_of(i, dvalues, weight));
  }
  Tensor dbias = empty_vector(x, 0);
  if (bias) {
    const int64_t first_dim[1] = {0};
    dbias = torch::stable::sum(grad, torch::headeronly::IntHeaderOnlyArrayRef(first_dim, 1));
  }
  return {as_type(dvalues, given), dbias};
}

Tensor linear_dense_grad_input(const Tensor& grad, const Tensor& values, const Tensor& crow,
                               const Tensor& col, const Tensor& key, int64_t in_features) {
  return grad_input_of("linear_dense_grad_input", grad, values, crow, col, key, in_features);
}

std::tuple<Tensor, Tensor> linear_dense_grad_values(const Tensor& grad, const Tensor& x,
                                                    const Tensor& crow, const Tensor& col,
                                                    const Tensor& key, bool bias) {
  return grad_values_of("linear_dense_grad_values", grad, x, crow, col, key, bias);
}

std::tuple<Tensor, Tensor, Tensor> linear_dense_backward(const Tensor& grad, const Tensor& x,
                                                         const Tensor& values, const Tensor& crow,
                                                         const Tensor& col, const Tensor& key,
                                                         bool bias) {
  constexpr const char* op = "linear_dense_backward";
  check_layout(op, "x", x, 2);
  Tensor dx = grad_input_of(op, grad, values, crow, col, key, x.size(1));
  auto [dvalues, dbias] = grad_values_of(op, grad, x, crow, col, key, bias);
  return {dx, dvalues, dbias};
}

// values (nnz) -> (rows, cols) in the dtype that the library multiplies
Tensor densify(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& key,
               int64_t cols) {
  constexpr const char* op = "densify";
  check_layout(op, "values", values, 1);
  dtype_of(op, "values", values);
  const ScalarType type = product_type(values.scalar_type());
  const Panels panels(op, plan_for(op, key, crow, col, cols), type, kMaxIndex);
  check_length(op, "values", values.size(0), "nonzeros of the pattern",
               panels.entry->pattern().nnz);
  const Tensor weight = empty_of(type, panels.rows, cols);
  const Tensor values_c = as_contiguous(values);
  if (weight.numel()) kernels(op).values_to_dense(panels.view_of(0, values_c, weight));
  return weight;
}

// weight (rows, cols) at the nonzeros -> (nnz)
Tensor read_nonzeros(const Tensor& weight, const Tensor& crow, const Tensor& col,
                     const Tensor& key) {
  constexpr const char* op = "read_nonzeros";
  check_layout(op, "weight", weight, 2);
  dtype_of(op, "weight", weight);
  const Panels panels(op, plan_for(op, key, crow, col, weight.size(1)), weight.scalar_type(),
                      kMaxIndex);
  check_length(op, "weight", weight.size(0), "rows of the pattern", panels.rows);
  const Tensor values = empty_vector(weight, panels.entry->pattern().nnz);
  const Tensor weight_c = as_contiguous(weight);
  if (values.numel()) kernels(op).dense_to_values(panels.view_of(0, values, weight_c));
  return values;
}

}  // namespace
}  // namespace sparsetrain

#define ST_PATTERN "Tensor crow, Tensor col, Tensor key"

STABLE_TORCH_LIBRARY_FRAGMENT(sparsetrain, m) {
  m.def("linear_dense(Tensor x, Tensor values, Tensor? bias, " ST_PATTERN ") -> Tensor");
  m.def("linear_dense_grad_input(Tensor grad, Tensor values, " ST_PATTERN
        ", int in_features) -> Tensor");
  m.def("linear_dense_grad_values(Tensor grad, Tensor x, " ST_PATTERN
        ", bool bias) -> (Tensor, Tensor)");
  m.def("linear_dense_backward(Tensor grad, Tensor x, Tensor values, " ST_PATTERN
        ", bool bias) -> (Tensor, Tensor, Tensor)");
  m.def("densify(Tensor values, " ST_PATTERN ", int cols) -> Tensor");
  m.def("read_nonzeros(Tensor weight, " ST_PATTERN ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsetrain, CPU, m) {
  m.impl("linear_dense", TORCH_BOX(&sparsetrain::linear_dense));
  m.impl("linear_dense_grad_input", TORCH_BOX(&sparsetrain::linear_dense_grad_input));
  m.impl("linear_dense_grad_values", TORCH_BOX(&sparsetrain::linear_dense_grad_values));
  m.impl("linear_dense_backward", TORCH_BOX(&sparsetrain::linear_dense_backward));
  m.impl("densify", TORCH_BOX(&sparsetrain::densify));
  m.impl("read_nonzeros", TORCH_BOX(&sparsetrain::read_nonzeros));
}
