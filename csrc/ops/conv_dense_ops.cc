// Convolutions with a sparse weight by the library's product, of two and three dimensions.
//
// The values are written into a dense weight, the library convolves, and the gradient is read back
// at the nonzeros. Only x and the values are kept for the backward pass: the dense weight is
// scratch that all layers of a thread share, and not needed where every weight is a nonzero.
#include <tuple>
#include <vector>

#include "checks.h"
#include "library.h"

namespace sparsetrain {
namespace {

using Sizes = std::vector<int64_t>;

Tensor as_shape(const Tensor& t, const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                        sizes.data(), strides.data(), 0, &handle));
  return Tensor(handle);
}

// One layer and the dtype that the library computes it in.
struct DenseConv {
  const char* op;
  const Sizes &kernel, &stride, &padding, &dilation;
  int64_t groups;
  ScalarType given, type;
  std::shared_ptr<const PlanEntry> entry;
  Sizes weight_shape;

  DenseConv(const char* op, const Tensor& like, const char* like_name, int64_t channels,
            const Tensor& crow, const Tensor& col, const Tensor& key, const Sizes& kernel,
            const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups)
      : op(op),
        kernel(kernel),
        stride(stride),
        padding(padding),
        dilation(dilation),
        groups(groups),
        given(like.scalar_type()),
        type(product_type(given)) {
    dtype_of(op, like_name, like);
    require(kernel.size() == 2 || kernel.size() == 3, op,
            "kernel_size must have 2 or 3 entries, got ", kernel.size());
    require(groups >= 1 && channels % groups == 0, op, "groups (", groups,
            ") must divide the input's channels (", channels, ")");
    weight_shape = {0, channels / groups};
    int64_t cols = channels / groups;
    for (int64_t size : kernel) {
      require(size >= 1 && size <= kMaxIndex, op, "kernel_size must be at least 1, got ", size);
      cols *= size;
      weight_shape.push_back(size);
    }
    entry = plan_for(op, key, crow, col, cols);
    weight_shape[0] = entry->pattern().rows;
  }

  int64_t dims() const { return static_cast<int64_t>(kernel.size()) + 2; }
  bool full() const {
    return entry->pattern().nnz == entry->pattern().rows * entry->pattern().cols;
  }
  DenseRows rows(ScalarType values_type, const void* values, const Tensor& weight) const {
    return {kernel_type(values_type),
            kernel_type(type),
            entry->plan(),
            0,
            entry->pattern().rows,
            const_cast<void*>(values),
            weight.mutable_data_ptr(),
            torch_threads()};
  }
  Tensor scratch() const {
    return as_shape(kept_scratch(type, entry->pattern().rows * entry->pattern().cols),
                    weight_shape);
  }
  Tensor weight(const Tensor& values) const {
    check_layout(op, "values", values, 1);
    check_length(op, "values", values.size(0), "nonzeros of the pattern", entry->pattern().nnz);
    const Tensor values_c = as_contiguous(values);
    if (full()) return as_shape(as_type(values_c, type), weight_shape);
    const Tensor weight = scratch();
    kernels(op).values_to_dense(rows(given, values_c.const_data_ptr(), weight));
    return weight;
  }
  Tensor read_back(const Tensor& dweight) const {
    const Tensor dweight_c = as_contiguous(dweight);
    const int64_t nnz = entry->pattern().nnz;
    if (full()) return as_type(as_shape(dweight_c, {nnz}), given);
    const Tensor dvalues = empty_of(type, 1, &nnz);
    if (nnz) kernels(op).dense_to_values(rows(type, dvalues.const_data_ptr(), dweight_c));
    return as_type(dvalues, given);
  }

  Tensor forward(const Tensor& x, const Tensor& weight, const Tensor* bias) const {
    const Sizes zero(kernel.size(), 0);
    const auto n = static_cast<int64_t>(kernel.size());
    AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, result = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(
        x.get(), weight.get(), bias ? &bias_handle : nullptr, stride.data(), n, padding.data(), n,
        dilation.data(), n, 0, zero.data(), n, groups, &result));
    return Tensor(result);
  }
  struct Gradients {
    Tensor x, weight, bias;
  };
  Gradients backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool needs_x,
                     bool needs_weight, bool needs_bias) const {
    const Sizes zero(kernel.size(), 0);
    const auto n = static_cast<int64_t>(kernel.size());
    const int64_t outputs = grad.size(1), *outputs_at = &outputs;
    const int32_t mask[3] = {needs_x, needs_weight, needs_bias};
    AtenTensorHandle results[3] = {nullptr, nullptr, nullptr};
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
        as_type(grad, type).get(), as_type(x, type).get(), weight.get(), &outputs_at, 1,
        stride.data(), n, padding.data(), n, dilation.data(), n, 0, zero.data(), n, groups, mask, 3,
        &results[0], &results[1], &results[2]));
    return {Tensor(results[0]), Tensor(results[1]), Tensor(results[2])};
  }
  Tensor bias_of(const Gradients& gradients, bool bias, const Tensor& like) const {
    return bias ? as_type(gradients.bias, given) : empty_vector(like, 0);
  }
};

Tensor conv_dense(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                  const Tensor& crow, const Tensor& col, const Tensor& key, Sizes kernel,
                  Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  constexpr const char* op = "conv_dense";
  require(x.dim() >= 2, op, "x must have 4 or 5 dimensions, got shape ", shape_of(x));
  const DenseConv conv(op, values, "values", x.size(1), crow, col, key, kernel, stride, padding,
                       dilation, groups);
  check_floats(op, "x", x, conv.dims(), "values", conv.given);
  const Tensor bias_wide = bias ? as_type(*bias, conv.type) : x;
  const Tensor y =
      conv.forward(as_type(x, conv.type), conv.weight(values), bias ? &bias_wide : nullptr);
  return as_contiguous(as_type(y, conv.given));
}

Tensor conv_dense_grad_input(const Tensor& grad, const Tensor& values, const Tensor& crow,
                             const Tensor& col, const Tensor& key, Sizes input_size, Sizes kernel,
                             Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  constexpr const char* op = "conv_dense_grad_input";
  require(input_size.size() >= 2, op, "input_size must have 4 or 5 entries, got ",
          input_size.size());
  const DenseConv conv(op, values, "values", input_size[1], crow, col, key, kernel, stride, padding,
                       dilation, groups);
  check_floats(op, "grad", grad, conv.dims(), "values", conv.given);
  check_length(op, "input_size", static_cast<int64_t>(input_size.size()), "dimensions of the input",
               conv.dims());
  // Only the shape of x counts.
  const Tensor x =
      empty_like_dtype(grad, static_cast<int64_t>(input_size.size()), input_size.data());
  const auto gradients = conv.backward(grad, x, conv.weight(values), true, false, false);
  return as_contiguous(as_type(gradients.x, conv.given));
}

std::tuple<Tensor, Tensor> conv_dense_grad_values(const Tensor& grad, const Tensor& x,
                                                  const Tensor& crow, const Tensor& col,
                                                  const Tensor& key, Sizes kernel, Sizes stride,
                                                  Sizes padding, Sizes dilation, int64_t groups,
                                                  bool bias) {
  constexpr const char* op = "conv_dense_grad_values";
  require(x.dim() >= 2, op, "x must have 4 or 5 dimensions, got shape ", shape_of(x));
  const DenseConv conv(op, x, "x", x.size(1), crow, col, key, kernel, stride, padding, dilation,
                       groups);
  check_floats(op, "grad", grad, conv.dims(), "x", conv.given);
  // Only the shape of the weight counts.
  const auto gradients = conv.backward(grad, x, conv.scratch(), false, true, bias);
  return {conv.read_back(gradients.weight), conv.bias_of(gradients, bias, x)};
}

std::tuple<Tensor, Tensor, Tensor> conv_dense_backward(const Tensor& grad, const Tensor& x,
                                                       const Tensor& values, const Tensor& crow,
                                                       const Tensor& col, const Tensor& key,
                                                       Sizes kernel, Sizes stride, Sizes padding,
                                                       Sizes dilation, int64_t groups, bool bias) {
  constexpr const char* op = "conv_dense_backward";
  require(x.dim() >= 2, op, "x must have 4 or 5 dimensions, got shape ", shape_of(x));
  const DenseConv conv(op, values, "values", x.size(1), crow, col, key, kernel, stride, padding,
                       dilation, groups);
  check_floats(op, "x", x, conv.dims(), "values", conv.given);
  check_floats(op, "grad", grad, conv.dims(), "values", conv.given);
  const auto gradients = conv.backward(grad, x, conv.weight(values), true, true, bias);
  return {as_contiguous(as_type(gradients.x, conv.given)), conv.read_back(gradients.weight),
          conv.bias_of(gradients, bias, x)};
}

}  // namespace
}  // namespace sparsetrain

#define ST_PATTERN "Tensor crow, Tensor col, Tensor key, "
#define ST_WINDOW "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"

STABLE_TORCH_LIBRARY_FRAGMENT(sparsetrain, m) {
  m.def("conv_dense(Tensor x, Tensor values, Tensor? bias, " ST_PATTERN ST_WINDOW ") -> Tensor");
  m.def("conv_dense_grad_input(Tensor grad, Tensor values, " ST_PATTERN
        "int[] input_size, " ST_WINDOW ") -> Tensor");
  m.def("conv_dense_grad_values(Tensor grad, Tensor x, " ST_PATTERN ST_WINDOW
        ", bool bias) -> (Tensor, Tensor)");
  m.def("conv_dense_backward(Tensor grad, Tensor x, Tensor values, " ST_PATTERN ST_WINDOW
        ", bool bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sparsetrain, CPU, m) {
  m.impl("conv_dense", TORCH_BOX(&sparsetrain::conv_dense));
  m.impl("conv_dense_grad_input", TORCH_BOX(&sparsetrain::conv_dense_grad_input));
  m.impl("conv_dense_grad_values", TORCH_BOX(&sparsetrain::conv_dense_grad_values));
  m.impl("conv_dense_backward", TORCH_BOX(&sparsetrain::conv_dense_backward));
}
