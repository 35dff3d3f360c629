// Convolutions with a sparse weight by the library's product, of two and three dimensions.
//
// The values are written into a dense weight, the library convolves, and the gradient is read back
// at the nonzeros. Only x and the values are kept for the backward pass: the dense weight is
// scratch that all layers of a thread share, and not needed where every weight is a nonzero. A
// large one is made a few output channels at a time.
#include <algorithm>
#include <tuple>
#include <vector>

#include "checks.h"
#include "library.h"

namespace sparsetrain {
namespace {

using Sizes = std::vector<int64_t>;

// Of a dense weight made at a time. The library copies each weight into its own layout, so that a
// large one passes through memory twice: 512 channels of 7 x 7, three products in two pieces 1.2
// times faster at batch 1, 1.03 at 8. With a stride the gradient of the input is 0.75-0.95 times as
// fast in pieces, and smaller weights gain nothing.
constexpr int64_t kPieceBytes = 5 << 20;

Tensor as_shape(const Tensor& t, const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                        sizes.data(), strides.data(), 0, &handle));
  return Tensor(handle);
}

Sizes sizes_of(const Tensor& t) {
  Sizes sizes;
  for (int64_t d = 0; d < t.dim(); d++) sizes.push_back(t.size(d));
  return sizes;
}

// The dtype that the library computes in. Its bfloat16 kernels give wrong gradients of the weight
// for some inputs smaller than the kernel's window: 2 x 6 x 6 by 3 x 3 x 3, or 6 x 1 by 3 x 3 with
// a stride.
ScalarType conv_type(ScalarType given, const Sizes& input, const Sizes& kernel,
                     const Sizes& dilation) {
  const ScalarType type = product_type(given);
  if (type != ScalarType::BFloat16) return type;
  for (size_t d = 0; d < kernel.size() && d + 2 < input.size() && d < dilation.size(); d++)
    if (input[d + 2] <= dilation[d] * (kernel[d] - 1)) return ScalarType::Float;
  return type;
}

// One layer and the dtype that the library computes it in. input: the shape of x, two entries or
// more.
struct DenseConv {
  const char* op;
  const Sizes &kernel, &stride, &padding, &dilation;
  int64_t groups;
  ScalarType given, type;
  std::shared_ptr<const PlanEntry> entry;
  Sizes weight_shape;
  int64_t pieces;  // of the output channels, about the same size: [first(i), first(i + 1))

  DenseConv(const char* op, const Tensor& like, const char* like_name, const Sizes& input,
            const Tensor& crow, const Tensor& col, const Tensor& key, const Sizes& kernel,
            const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups)
      : op(op),
        kernel(kernel),
        stride(stride),
        padding(padding),
        dilation(dilation),
        groups(groups),
        given(like.scalar_type()),
        type(conv_type(given, input, kernel, dilation)) {
    dtype_of(op, like_name, like);
    const int64_t channels = input[1];
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
    pieces = count_pieces();
  }

  int64_t count_pieces() const {
    // Sums of pieces would be rounded to bfloat16 once more.
    if (full() || groups > 1 || type == ScalarType::BFloat16) return 1;
    for (int64_t step : stride)
      if (step > 1) return 1;
    const int64_t bytes =
        entry->pattern().rows * entry->pattern().cols * (type == ScalarType::Double ? 8 : 4);
    const int64_t most = entry->pattern().rows / 16;  // of 16 channels or more
    return std::max<int64_t>(1, std::min((bytes + kPieceBytes - 1) / kPieceBytes, most));
  }
  int64_t first(int64_t i) const {
    const int64_t channels = entry->pattern().rows;
    return i == pieces ? channels : channels * i / pieces / 16 * 16;
  }
  int64_t size(int64_t i) const { return first(i + 1) - first(i); }

  int64_t dims() const { return static_cast<int64_t>(kernel.size()) + 2; }
  bool full() const {
    return entry->pattern().nnz == entry->pattern().rows * entry->pattern().cols;
  }
  DenseRows rows(int64_t i, ScalarType values_type, const void* values,
                 const Tensor& weight) const {
    return {kernel_type(values_type),
            kernel_type(type),
            entry->plan(),
            first(i),
            first(i + 1),
            const_cast<void*>(values),
            weight.mutable_data_ptr(),
            torch_threads()};
  }
  Tensor scratch(int64_t i) const {
    Sizes shape = weight_shape;
    shape[0] = size(i);
    return as_shape(kept_scratch(type, shape[0] * entry->pattern().cols), shape);
  }
  Tensor checked(const Tensor& values) const {
    check_layout(op, "values", values, 1);
    check_length(op, "values", values.size(0), "nonzeros of the pattern", entry->pattern().nnz);
    return as_contiguous(values);
  }
  // values: checked
  Tensor weight(int64_t i, const Tensor& values) const {
    if (full()) return as_shape(as_type(values, type), weight_shape);
    const Tensor weight = scratch(i);
    kernels(op).values_to_dense(rows(i, given, values.const_data_ptr(), weight));
    return weight;
  }
  Tensor empty_values() const {
    const int64_t nnz = full() ? 0 : entry->pattern().nnz;
    return empty_of(type, 1, &nnz);
  }
  // The gradient of the values of piece i, into `dvalues`; where every weight is a nonzero, instead
  // of it.
  void read_back(int64_t i, const Tensor& dweight, Tensor* dvalues) const {
    const Tensor dweight_c = as_contiguous(dweight);
    if (full()) {
      *dvalues = as_shape(dweight_c, {entry->pattern().nnz});
    } else if (entry->pattern().nnz) {
      kernels(op).dense_to_values(rows(i, type, dvalues->const_data_ptr(), dweight_c));
    }
  }

  // x and bias: of the type of the product; values: checked
  Tensor forward(const Tensor& x, const Tensor& values, const Tensor* bias) const {
    if (pieces == 1) return convolve(x, weight(0, values), bias);
    Tensor y(nullptr);
    for (int64_t i = 0; i < pieces; i++) {
      const Tensor own = bias ? part(*bias, 0, i) : x;
      const Tensor result = convolve(x, weight(i, values), bias ? &own : nullptr);
      if (!i) {
        Sizes sizes = sizes_of(result);
        sizes[1] = entry->pattern().rows;
        y = torch::stable::new_empty(result, sizes);
      }
      Tensor to = part(y, 1, i);
      torch::stable::copy_(to, result);
    }
    return y;
  }

  struct Gradients {
    Tensor x, values, bias;  // null where not wanted
  };
  // values: checked, or null without needs_x
  Gradients backward(const Tensor& grad, const Tensor& x, const Tensor* values, bool needs_x,
                     bool needs_values, bool needs_bias) const {
    const Tensor grad_wide = as_type(grad, type), x_wide = as_type(x, type);
    Gradients all{Tensor(nullptr), needs_values ? empty_values() : Tensor(nullptr),
                  Tensor(nullptr)};
    for (int64_t i = 0; i < pieces; i++) {
      // Without needs_x only the shape of the weight counts.
      auto [dx, dweight, dbias] =
          gradients(part(grad_wide, 1, i), x_wide, needs_x ? weight(i, *values) : scratch(i),
                    needs_x, needs_values, needs_bias);
      if (needs_x) all.x = i ? sum(all.x, dx) : dx;
      if (needs_values) read_back(i, dweight, &all.values);
      if (!needs_bias) continue;
      if (!i) all.bias = pieces == 1 ? dbias : torch::stable::new_empty(dbias, {weight_shape[0]});
      if (pieces == 1) break;
      Tensor to = part(all.bias, 0, i);
      torch::stable::copy_(to, dbias);
    }
    return all;
  }
  Tensor bias_of(const Gradients& gradients, bool bias, const Tensor& like) const {
    return bias ? as_type(gradients.bias, given) : empty_vector(like, 0);
  }

 private:
  Tensor part(Tensor t, int64_t dim, int64_t i) const {
    return pieces == 1 ? t : torch::stable::narrow(t, dim, first(i), size(i));
  }
  static Tensor sum(const Tensor& a, const Tensor& b) {
    AtenTensorHandle result = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_add_Tensor(a.get(), b.get(), 1.0, &result));
    return Tensor(result);
  }
  Tensor convolve(const Tensor& x, const Tensor& weight, const Tensor* bias) const {
    const Sizes zero(kernel.size(), 0);
    const auto n = static_cast<int64_t>(kernel.size());
    AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, result = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(
        x.get(), weight.get(), bias ? &bias_handle : nullptr, stride.data(), n, padding.data(), n,
        dilation.data(), n, 0, zero.data(), n, groups, &result));
    return Tensor(result);
  }
  std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad, const Tensor& x,
                                               const Tensor& weight, bool needs_x,
                                               bool needs_weight, bool needs_bias) const {
    const Sizes zero(kernel.size(), 0);
    const auto n = static_cast<int64_t>(kernel.size());
    const int64_t outputs = grad.size(1), *outputs_at = &outputs;
    const int32_t mask[3] = {needs_x, needs_weight, needs_bias};
    AtenTensorHandle results[3] = {nullptr, nullptr, nullptr};
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
        grad.get(), x.get(), weight.get(), &outputs_at, 1, stride.data(), n, padding.data(), n,
        dilation.data(), n, 0, zero.data(), n, groups, mask, 3, &results[0], &results[1],
        &results[2]));
    return {Tensor(results[0]), Tensor(results[1]), Tensor(results[2])};
  }
};

Tensor conv_dense(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                  const Tensor& crow, const Tensor& col, const Tensor& key, Sizes kernel,
                  Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  constexpr const char* op = "conv_dense";
  require(x.dim() >= 2, op, "x must have 4 or 5 dimensions, got shape ", shape_of(x));
  const DenseConv conv(op, values, "values", sizes_of(x), crow, col, key, kernel, stride, padding,
                       dilation, groups);
  check_floats(op, "x", x, conv.dims(), "values", conv.given);
  const Tensor bias_wide = bias ? as_type(*bias, conv.type) : x;
  const Tensor y =
      conv.forward(as_type(x, conv.type), conv.checked(values), bias ? &bias_wide : nullptr);
  return as_contiguous(as_type(y, conv.given));
}

Tensor conv_dense_grad_input(const Tensor& grad, const Tensor& values, const Tensor& crow,
                             const Tensor& col, const Tensor& key, Sizes input_size, Sizes kernel,
                             Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  constexpr const char* op = "conv_dense_grad_input";
  require(input_size.size() >= 2, op, "input_size must have 4 or 5 entries, got ",
          input_size.size());
  const DenseConv conv(op, values, "values", input_size, crow, col, key, kernel, stride, padding,
                       dilation, groups);
  check_floats(op, "grad", grad, conv.dims(), "values", conv.given);
  check_length(op, "input_size", static_cast<int64_t>(input_size.size()), "dimensions of the input",
               conv.dims());
  // Only the shape of x counts.
  const Tensor x =
      empty_like_dtype(grad, static_cast<int64_t>(input_size.size()), input_size.data());
  const Tensor values_c = conv.checked(values);
  const auto gradients = conv.backward(grad, x, &values_c, true, false, false);
  return as_contiguous(as_type(gradients.x, conv.given));
}

std::tuple<Tensor, Tensor> conv_dense_grad_values(const Tensor& grad, const Tensor& x,
                                                  const Tensor& crow, const Tensor& col,
                                                  const Tensor& key, Sizes kernel, Sizes stride,
                                                  Sizes padding, Sizes dilation, int64_t groups,
                                                  bool bias) {
  constexpr const char* op = "conv_dense_grad_values";
  require(x.dim() >= 2, op, "x must have 4 or 5 dimensions, got shape ", shape_of(x));
  const DenseConv conv(op, x, "x", sizes_of(x), crow, col, key, kernel, stride, padding, dilation,
                       groups);
  check_floats(op, "grad", grad, conv.dims(), "x", conv.given);
  const auto gradients = conv.backward(grad, x, nullptr, false, true, bias);
  return {as_type(gradients.values, conv.given), conv.bias_of(gradients, bias, x)};
}

std::tuple<Tensor, Tensor, Tensor> conv_dense_backward(const Tensor& grad, const Tensor& x,
                                                       const Tensor& values, const Tensor& crow,
                                                       const Tensor& col, const Tensor& key,
                                                       Sizes kernel, Sizes stride, Sizes padding,
                                                       Sizes dilation, int64_t groups, bool bias) {
  constexpr const char* op = "conv_dense_backward";
  require(x.dim() >= 2, op, "x must have 4 or 5 dimensions, got shape ", shape_of(x));
  const DenseConv conv(op, values, "values", sizes_of(x), crow, col, key, kernel, stride, padding,
                       dilation, groups);
  check_floats(op, "x", x, conv.dims(), "values", conv.given);
  check_floats(op, "grad", grad, conv.dims(), "values", conv.given);
  const Tensor values_c = conv.checked(values);
  const auto gradients = conv.backward(grad, x, &values_c, true, true, bias);
  return {as_contiguous(as_type(gradients.x, conv.given)), as_type(gradients.values, conv.given),
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
