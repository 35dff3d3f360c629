// The convolutions among torch.ops.sparsetrain.*, two-dimensional, with zero padding. As in ops.cc:
// check, unpack, allocate, call a kernel.
#include <tuple>
#include <vector>

#include "checks.h"
#include "conv_plan.h"
#include "result_memory.h"

namespace sparsetrain {
namespace {

using Sizes = std::vector<int64_t>;

void check_pair(const char* op, const char* name, const Sizes& v, int64_t least) {
  require(v.size() == 2, op, name, " must have 2 entries, got ", v.size());
  for (int64_t x : v)
    require(x >= least && x <= kMaxIndex, op, name, " must be at least ", least, ", got (", v[0],
            ", ", v[1], ")");
}

// How a call names its convolution; shape() adds the sizes of the tensors, checked.
struct Settings {
  const char* op;
  const Sizes &kernel, &stride, &padding, &dilation;
  int64_t groups;

  // input: (batch, channels, height, width)
  ConvShape shape(const Sizes& input, int64_t out_channels) const {
    check_pair(op, "kernel_size", kernel, 1);
    check_pair(op, "stride", stride, 1);
    check_pair(op, "padding", padding, 0);
    check_pair(op, "dilation", dilation, 1);
    require(input.size() == 4, op, "input_size must have 4 entries, got ", input.size());
    require(groups >= 1, op, "groups must be at least 1, got ", groups);
    require(input[1] > 0 && input[1] % groups == 0, op, "groups (", groups,
            ") must divide the input's channels (", input[1], ")");
    require(out_channels > 0 && out_channels % groups == 0, op, "groups (", groups,
            ") must divide the pattern's rows (", out_channels, ")");
    ConvShape s{};
    s.batch = input[0];
    s.in_channels = input[1];
    s.out_channels = out_channels;
    s.groups = groups;
    for (int d = 0; d < 2; ++d) {
      s.in_size[d] = input[2 + d];
      s.kernel[d] = kernel[d];
      s.stride[d] = stride[d];
      s.padding[d] = padding[d];
      s.dilation[d] = dilation[d];
      const int64_t room = s.in_size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
      require(s.in_size[d] > 0 && room >= 0, op, "kernel_size (", kernel[0], ", ", kernel[1],
              ") with dilation (", dilation[0], ", ", dilation[1],
              ") is larger than the padded input (", input[2] + 2 * padding[0], ", ",
              input[3] + 2 * padding[1], ")");
      s.out_size[d] = room / stride[d] + 1;
    }
    return s;
  }
  int64_t columns(const Tensor& x) const { return columns(x.size(1)); }
  int64_t columns(int64_t channels) const {
    check_pair(op, "kernel_size", kernel, 1);
    require(groups >= 1, op, "groups must be at least 1, got ", groups);
    return channels / groups * kernel[0] * kernel[1];
  }
};

Sizes sizes_of(const Tensor& t) {
  Sizes sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

Tensor empty_planes(const Tensor& like, int64_t batch, int64_t channels, const int64_t* size) {
  const int64_t sizes[4] = {batch, channels, size[0], size[1]};
  return empty_result(like, 4, sizes);
}

Tensor conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
              const Tensor& crow, const Tensor& col, const Tensor& key, Sizes kernel, Sizes stride,
              Sizes padding, Sizes dilation, int64_t groups) {
  const Settings settings{"conv2d", kernel, stride, padding, dilation, groups};
  const char* const op = settings.op;
  check_layout(op, "values", values, 1);
  const DType dtype = dtype_of(op, "values", values);
  check_floats(op, "x", x, 4, "values", values.scalar_type());
  const auto entry = plan_for(op, key, crow, col, settings.columns(x));
  const ConvShape shape = settings.shape(sizes_of(x), entry->pattern().rows);
  check_length(op, "values", values.size(0), "nonzeros of the pattern", entry->pattern().nnz);
  if (bias) {
    check_floats(op, "bias", *bias, 1, "values", values.scalar_type());
    check_length(op, "bias", bias->size(0), "rows of the pattern", shape.out_channels);
  }
  const Tensor x_c = as_contiguous(x), values_c = as_contiguous(values);
  const std::optional<Tensor> bias_c =
      bias ? std::make_optional(as_contiguous(*bias)) : std::nullopt;
  const Tensor y = empty_planes(values, shape.batch, shape.out_channels, shape.out_size);
  if (y.numel() == 0) return y;
  kernels(op).conv_forward({dtype, entry->plan(), shape, x_c.const_data_ptr(),
                            values_c.const_data_ptr(), bias_c ? bias_c->const_data_ptr() : nullptr,
                            y.mutable_data_ptr(), torch_threads()});
  return y;
}

// What the gradients share. input: the sizes of x.
struct ConvGradients {
  const char* op;
  DType dtype;
  std::shared_ptr<const PlanEntry> entry;
  ConvShape shape;
  Tensor grad;

  ConvGradients(const Settings& settings, const char* like_name, const Tensor& like,
                const Tensor& grad, const Tensor& crow, const Tensor& col, const Tensor& key,
                const Sizes& input)
      : op(settings.op), dtype(dtype_of(op, like_name, like)), grad(grad) {
    check_floats(op, "grad", grad, 4, like_name, like.scalar_type());
    require(input.size() == 4, op, "input_size must have 4 entries, got ", input.size());
    entry = plan_for(op, key, crow, col, settings.columns(input[1]));
    shape = settings.shape(input, entry->pattern().rows);
    const bool fits = grad.size(0) == shape.batch && grad.size(1) == shape.out_channels &&
                      grad.size(2) == shape.out_size[0] && grad.size(3) == shape.out_size[1];
    require(fits, op, "grad must have shape (", shape.batch, ", ", shape.out_channels, ", ",
            shape.out_size[0], ", ", shape.out_size[1], "), got ", shape_of(grad));
  }

  // A null tensor leaves its result out; an empty one is never null to the kernel.
  void run(const Tensor* x, const Tensor* values, const Tensor* dx, const Tensor* dvalues,
           const Tensor* dbias) const {
    const Tensor grad_c = as_contiguous(grad);
    const std::optional<Tensor> x_c = x ? std::make_optional(as_contiguous(*x)) : std::nullopt;
    const std::optional<Tensor> values_c =
        values ? std::make_optional(as_contiguous(*values)) : std::nullopt;
    static char nothing;
    const auto output = [](const Tensor* t) -> void* {
      if (!t) return nullptr;
      return t->numel() ? t->mutable_data_ptr() : &nothing;
    };
    kernels(op).conv_backward({dtype, entry->plan(), shape, grad_c.const_data_ptr(),
                               x_c ? x_c->const_data_ptr() : nullptr,
                               values_c ? values_c->const_data_ptr() : nullptr, output(dx),
                               output(dvalues), output(dbias), torch_threads()});
  }
};

Tensor conv2d_grad_input(const Tensor& grad, const Tensor& values, const Tensor& crow,
                         const Tensor& col, const Tensor& key, Sizes input_size, Sizes kernel,
                         Sizes stride, Sizes padding, Sizes dilation, int64_t groups) {
  const Settings settings{"conv2d_grad_input", kernel, stride, padding, dilation, groups};
  check_layout(settings.op, "values", values, 1);
  const ConvGradients g(settings, "values", values, grad, crow, col, key, input_size);
  check_length(g.op, "values", values.size(0), "nonzeros of the pattern", g.entry->pattern().nnz);
  const Tensor dx = empty_planes(values, g.shape.batch, g.shape.in_channels, g.shape.in_size);
  g.run(nullptr, &values, &dx, nullptr, nullptr);
  return dx;
}

std::tuple<Tensor, Tensor> conv2d_grad_values(const Tensor& grad, const Tensor& x,
                                              const Tensor& crow, const Tensor& col,
                                              const Tensor& key, Sizes kernel, Sizes stride,
                                              Sizes padding, Sizes dilation, int64_t groups,
                                              bool bias) {
  const Settings settings{"conv2d_grad_values", kernel, stride, padding, dilation, groups};
  check_layout(settings.op, "x", x, 4);
  const ConvGradients g(settings, "x", x, grad, crow, col, key, sizes_of(x));
  const Tensor dvalues = empty_vector(x, g.entry->pattern().nnz);
  const Tensor dbias = empty_vector(x, bias ? g.shape.out_channels : 0);
  g.run(&x, nullptr, nullptr, &dvalues, bias ? &dbias : nullptr);
  return {dvalues, dbias};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& values, const Tensor& crow,
                                                   const Tensor& col, const Tensor& key,
                                                   Sizes kernel, Sizes stride, Sizes padding,
                                                   Sizes dilation, int64_t groups, bool bias) {
  const Settings settings{"conv2d_backward", kernel, stride, padding, dilation, groups};
  check_layout(settings.op, "values", values, 1);
  check_floats(settings.op, "x", x, 4, "values", values.scalar_type());
  const ConvGradients g(settings, "values", values, grad, crow, col, key, sizes_of(x));
  check_length(g.op, "values", values.size(0), "nonzeros of the pattern", g.entry->pattern().nnz);
  const Tensor dx = empty_planes(x, g.shape.batch, g.shape.in_channels, g.shape.in_size);
  const Tensor dvalues = empty_vector(x, values.size(0));
  const Tensor dbias = empty_vector(x, bias ? g.shape.out_channels : 0);
  g.run(&x, &values, &dx, &dvalues, bias ? &dbias : nullptr);
  return {dx, dvalues, dbias};
}

// Whether kernels whose vectors have so many float32 lanes compute a convolution as the linear
// layer of the unfolded input.
bool conv_unfolds(Sizes input_size, int64_t out_channels, int64_t nnz, Sizes kernel, Sizes stride,
                  Sizes padding, Sizes dilation, int64_t groups, int64_t lanes) {
  const Settings settings{"conv_unfolds", kernel, stride, padding, dilation, groups};
  require(lanes >= 1, settings.op, "lanes must be at least 1, got ", lanes);
  const ConvVectors vectors{lanes, sizeof(float), 0, 0};
  return samples_are_pixels(nnz, settings.shape(input_size, out_channels), vectors);
}

}  // namespace
}  // namespace sparsetrain

#define ST_PATTERN "Tensor crow, Tensor col, Tensor key, "
#define ST_SETTINGS "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, int groups"

STABLE_TORCH_LIBRARY_FRAGMENT(sparsetrain, m) {
  m.def("conv2d(Tensor x, Tensor values, Tensor? bias, " ST_PATTERN ST_SETTINGS ") -> Tensor");
  m.def("conv2d_grad_input(Tensor grad, Tensor values, " ST_PATTERN "int[] input_size, " ST_SETTINGS
        ") -> Tensor");
  m.def("conv2d_grad_values(Tensor grad, Tensor x, " ST_PATTERN ST_SETTINGS
        ", bool bias) -> (Tensor, Tensor)");
  m.def("conv2d_backward(Tensor grad, Tensor x, Tensor values, " ST_PATTERN ST_SETTINGS
        ", bool bias) -> (Tensor, Tensor, Tensor)");
  m.def("conv_unfolds(int[] input_size, int out_channels, int nnz, " ST_SETTINGS
        ", int lanes) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sparsetrain, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&sparsetrain::conv2d));
  m.impl("conv2d_grad_input", TORCH_BOX(&sparsetrain::conv2d_grad_input));
  m.impl("conv2d_grad_values", TORCH_BOX(&sparsetrain::conv2d_grad_values));
  m.impl("conv2d_backward", TORCH_BOX(&sparsetrain::conv2d_backward));
}

// No tensor argument, hence no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(sparsetrain, CompositeExplicitAutograd, m) {
  m.impl("conv_unfolds", TORCH_BOX(&sparsetrain::conv_unfolds));
}
