// Training by one call: the forward product of a layer whose plan is made, with a C++ node for its
// gradients. The autograd.Function of _autograd.py does the same from Python, 25 to 40 us slower
// for a layer and step, which is what a small layer takes in all. In a step that is not small such
// things take several times as long, since its products drive their code from the caches: of one
// image, up to a tenth. Hence shapes are changed past the dispatcher, and the library is called
// from here where a layer holds all its weights.
//
// Not built on the stable ABI, which has no autograd: this library serves the torch that it was
// built with, and only that one; without it Python does the work.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <array>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Arguments = std::vector<IValue>;
using Sizes = std::vector<int64_t>;

// What the library's convolution is told besides its tensors.
struct Window {
  Sizes stride, padding, dilation, none;
  int64_t groups;
};

// Which operations compute the products of one layer on one geometry (see _planner.py).
struct Route : torch::CustomClassHolder {
  using Operation = std::optional<c10::OperatorHandle>;
  Operation forward, grad_input, grad_values, backward;  // the last not if families differ
  Operation differentiable_grad_input, differentiable_grad_values;  // for higher derivatives
  Arguments geometry;
  IValue size;  // what grad_input is told of the input's shape
  // The shape of the weight where the values are all of it, and the library computes all products.
  Sizes weight;
  std::optional<Window> window;

  // A linear layer takes inputs of any number of dimensions.
  bool linear() const { return geometry.empty(); }
};
using RoutePtr = c10::intrusive_ptr<Route>;

// Routes are named by numbers in Python, which forgets them when it drops a plan.
class Routes {
 public:
  int64_t add(RoutePtr route) {
    const std::lock_guard<std::mutex> lock(mutex_);
    routes_.emplace(++last_, std::move(route));
    return last_;
  }
  RoutePtr find(int64_t name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = routes_.find(name);
    TORCH_CHECK(found != routes_.end(), "sparsetrain::routed: no route ", name);
    return found->second;
  }
  void forget(int64_t name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    routes_.erase(name);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, RoutePtr> routes_;
  int64_t last_ = 0;
};

Routes& routes() {
  static Routes* const all = new Routes;  // never destroyed: nodes may outlive static objects
  return *all;
}

Arguments call(const Route::Operation& operation, Arguments arguments) {
  operation->callBoxed(arguments);
  return arguments;
}

Arguments with(Arguments arguments, const Arguments& more) {
  arguments.reserve(arguments.size() + more.size() + 1);  // a last one may follow
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

// The gradient of the bias, as sum_over_outputs of _products.py, bitwise.
Tensor sum_over_outputs(const Tensor& grad) {
  Sizes dims{0};
  for (int64_t d = 2; d < grad.dim(); d++) dims.push_back(d);
  if (grad.size(1) != 1) return grad.sum(dims);
  Sizes two(grad.dim(), -1);
  two[1] = 2;
  return grad.expand(two).sum(dims).narrow(0, 0, 1);
}

// ---- shapes -------------------------------------------------------------------------------------

// Whether nothing watches what is done to this tensor: no subclass, no mode, no trace.
bool unwatched(const Tensor& t) {
  return t.device().is_cpu() && t.layout() == c10::kStrided &&
         !t.key_set().has(c10::DispatchKey::Python) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Past the dispatcher, for what is unwatched and below autograd: the memory of t as this matrix or
// array. `sizes` may be those of its transpose.
Tensor alias(const Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides = {}) {
  Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(), t.dtype());
  c10::TensorImpl* const own = result.unsafeGetTensorImpl();
  own->set_storage_offset(t.storage_offset());
  if (strides.empty())
    own->set_sizes_contiguous(sizes);
  else
    own->set_sizes_and_strides(sizes, strides);
  return result;
}
Tensor transposed(const Tensor& t) {
  if (!unwatched(t)) return t.t();
  return alias(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)});
}

// t with other sizes; below: whether autograd has nothing to record.
Tensor shaped(const Tensor& t, at::IntArrayRef sizes, bool below) {
  if (t.sizes() == sizes) return t;
  return below && t.is_contiguous() && unwatched(t) ? alias(t, sizes) : t.reshape(sizes);
}
// (..., n) -> (rows, n)
Tensor as_matrix(const Tensor& t, bool below) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); d++) rows *= t.size(d);
  return shaped(t, {rows, t.size(-1)}, below);
}
// (rows, n) -> (..., n), the dots those of `sizes`
Tensor with_rows(const Tensor& matrix, at::IntArrayRef sizes, bool below) {
  Sizes shape(sizes.begin(), sizes.end());
  shape.back() = matrix.size(1);
  return shaped(matrix, shape, below);
}

// ---- the library's products, where no weight is left out ----------------------------------------

bool library_takes(const Route& route, const Tensor& values) {
  return !route.weight.empty() && values.is_contiguous();
}

Tensor library_forward(const Route& route, const Tensor& x, const Tensor& values,
                       const std::optional<Tensor>& bias) {
  const int64_t count = c10::multiply_integers(route.weight), rows = route.weight[0];
  TORCH_CHECK(values.dim() == 1 && values.size(0) == count,
              "sparsetrain::routed: values has shape ", values.sizes(), ", expected (", count,
              ",), the nonzeros of the pattern");
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == rows),
              "sparsetrain::routed: bias has shape ", bias ? bias->sizes() : at::IntArrayRef(),
              ", expected (", rows, ",), the rows of the pattern");
  const Tensor weight = shaped(values, route.weight, true);
  if (route.linear())
    return bias ? at::addmm(*bias, x, transposed(weight)) : at::mm(x, transposed(weight));
  const Window& w = *route.window;
  return at::convolution(x, weight, bias, w.stride, w.padding, w.dilation, false, w.none, w.groups)
      .contiguous();
}

variable_list library_backward(const Route& route, const Tensor& grad, const Tensor& x,
                               const Tensor& values, bool needs_bias) {
  const Tensor weight = shaped(values, route.weight, true);
  Tensor dx, dweight, dbias;
  if (route.linear()) {
    dx = at::mm(grad, weight);
    dweight = at::mm(transposed(grad), x);
    if (needs_bias) dbias = sum_over_outputs(grad);
  } else {
    const Window& w = *route.window;
    const int64_t rows = route.weight[0];
    std::tie(dx, dweight, dbias) = at::convolution_backward(
        grad, x, weight, needs_bias ? at::OptionalIntArrayRef(rows) : at::OptionalIntArrayRef(),
        w.stride, w.padding, w.dilation, false, w.none, w.groups, {true, true, needs_bias});
  }
  return {dx, shaped(dweight.contiguous(), values.sizes(), true), dbias};
}

// ---- the node of the graph ----------------------------------------------------------------------

// Records one product. A node of its own rather than a torch::autograd::Function, whose context and
// wrapping take some 10 us of a layer and step.
class SparseProductBackward : public torch::autograd::Node {
 public:
  SparseProductBackward(RoutePtr route, const Tensor& x, const Tensor& values,
                        const std::optional<Tensor>& bias, const Tensor& crow, const Tensor& col,
                        const Tensor& key, Sizes output)
      : Node(torch::autograd::collect_next_edges(x, values, bias)),
        route_(std::move(route)),
        output_(std::move(output)),
        x_(values.requires_grad() ? x : Tensor(), false),
        values_(x.requires_grad() ? values : Tensor(), false),
        crow_(crow, false),
        col_(col, false),
        key_(key, false) {
    if (route_->linear() && x.dim() != 2) folded_ = x.sizes().vec();
  }

  std::string name() const override { return "SparseProductBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : saved_variables()) saved->reset_data();
  }

  variable_list apply(variable_list&& grads) override { return gradients(grads[0], false); }

  // Compiled autograd: the operations above are traced, each with a fake of its own.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(reinterpret_cast<int64_t>(route_.get()));
    args.collect(folded_);
    for (const SavedVariable* saved : {&x_, &values_, &crow_, &col_, &key_})
      args.collect(*saved, false);
  }
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable* saved : saved_variables()) swap.before(*saved);
    variable_list result = gradients(grads[0], true);
    for (SavedVariable* saved : saved_variables()) swap.after(*saved);
    return result;
  }

 private:
  struct Needs {
    bool x, values, bias;
  };
  struct Saved {
    Tensor x, values, crow, col, key;
  };

  variable_list gradients(Tensor grad, bool traced) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Needs needs{task_should_compute_output(0), task_should_compute_output(1),
                      task_should_compute_output(2)};
    variable_list out(3);  // x, values, bias
    if (!grad.defined()) return out;
    const bool below = !at::GradMode::is_enabled();
    Saved saved{needs.values ? x_.unpack() : Tensor(), needs.x ? values_.unpack() : Tensor(),
                crow_.unpack(), col_.unpack(), key_.unpack()};
    std::optional<at::AutoDispatchBelowAutograd> guard;
    if (below) guard.emplace();
    if (traced)
      grad = known(grad);
    else if (!folded_.empty())
      grad = as_matrix(grad, below);
    if (!folded_.empty() && needs.values) saved.x = as_matrix(saved.x, below);
    if (below)
      compute(saved, grad, needs, out);
    else
      one_by_one(route_->differentiable_grad_input, route_->differentiable_grad_values, saved, grad,
                 needs, out);
    if (needs.x && !folded_.empty()) out[0] = with_rows(out[0], folded_, below);
    if (needs.bias && !needs.values) out[2] = sum_over_outputs(grad);
    return out;
  }

  // A trace does not know the sizes of a gradient: they are the output's.
  Tensor known(const Tensor& grad) const {
    static const Route::Operation sized =
        c10::Dispatcher::singleton().findSchemaOrThrow("sparsetrain::sized", "");
    return call(sized, {grad, output_})[0].toTensor();
  }

  std::array<SavedVariable*, 5> saved_variables() { return {&x_, &values_, &crow_, &col_, &key_}; }

  void compute(const Saved& saved, const Tensor& grad, const Needs& needs,
               variable_list& out) const {
    if (!(needs.x && needs.values && route_->backward)) {
      one_by_one(route_->grad_input, route_->grad_values, saved, grad, needs, out);
      return;
    }
    if (library_takes(*route_, saved.values)) {
      out = library_backward(*route_, grad, saved.x, saved.values, needs.bias);
      return;
    }
    Arguments arguments =
        with({grad, saved.x, saved.values, saved.crow, saved.col, saved.key}, route_->geometry);
    arguments.emplace_back(needs.bias);
    Arguments result = call(route_->backward, std::move(arguments));
    out[0] = std::move(result[0]).toTensor();
    out[1] = std::move(result[1]).toTensor();
    if (needs.bias) out[2] = std::move(result[2]).toTensor();
  }

  void one_by_one(const Route::Operation& grad_input, const Route::Operation& grad_values,
                  const Saved& saved, const Tensor& grad, const Needs& needs,
                  variable_list& out) const {
    if (needs.x) {
      Arguments result = call(
          grad_input, with({grad, saved.values, saved.crow, saved.col, saved.key, route_->size},
                           route_->geometry));
      out[0] = std::move(result[0]).toTensor();
    }
    if (needs.values) {
      Arguments arguments =
          with({grad, saved.x, saved.crow, saved.col, saved.key}, route_->geometry);
      arguments.emplace_back(needs.bias);
      Arguments result = call(grad_values, std::move(arguments));
      out[1] = std::move(result[0]).toTensor();
      if (needs.bias) out[2] = std::move(result[1]).toTensor();
    }
  }

  const RoutePtr route_;
  const Sizes output_;  // the sizes of y, as the operations know it
  Sizes folded_;        // the sizes of x, where a linear layer took it as a matrix
  SavedVariable x_, values_, crow_, col_, key_;
};

Tensor routed(int64_t name, const Tensor& x, const Tensor& values,
              const std::optional<Tensor>& bias, const Tensor& crow, const Tensor& col,
              const Tensor& key) {
  RoutePtr route = routes().find(name);
  const bool folds = route->linear() && x.dim() != 2;
  if (folds && !x.is_contiguous()) {  // a copy, which the graph has to know
    const Tensor y = routed(name, as_matrix(x, false), values, bias, crow, col, key);
    return with_rows(y, x.sizes(), false);
  }
  Tensor y;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor given = folds ? as_matrix(x, true) : x;
    y = library_takes(*route, values)
            ? library_forward(*route, given, values, bias)
            : std::move(call(route->forward,
                             with({given, values, bias, crow, col, key}, route->geometry))[0])
                  .toTensor();
  }
  Sizes output = y.sizes().vec();
  if (folds) {
    const at::AutoDispatchBelowADInplaceOrView below;
    y = with_rows(y, x.sizes(), true);
  }
  if (torch::autograd::compute_requires_grad(x, values, bias))
    torch::autograd::set_history(
        y, c10::make_intrusive<SparseProductBackward>(std::move(route), x, values, bias, crow, col,
                                                      key, std::move(output)));
  return y;
}

// {1, n} is the number n, {0, n, m, ...} a list.
IValue argument(const Sizes& numbers) {
  if (numbers.at(0)) return numbers.at(1);
  return Sizes(numbers.begin() + 1, numbers.end());
}

// operations: forward, grad_input, grad_values, backward or "", differentiable grad_input and
// grad_values; arguments: the geometry, and last the size; weight: as in Route, else empty.
int64_t make_route(const std::vector<std::string>& operations, const std::vector<Sizes>& arguments,
                   Sizes weight) {
  TORCH_CHECK(operations.size() == 6 && !arguments.empty(),
              "sparsetrain::make_route: six operations and the size are needed");
  const auto find = [&](size_t which) -> Route::Operation {
    if (operations[which].empty()) return std::nullopt;
    return c10::Dispatcher::singleton().findSchemaOrThrow(operations[which].c_str(), "");
  };
  auto route = c10::make_intrusive<Route>();
  route->forward = find(0);
  route->grad_input = find(1);
  route->grad_values = find(2);
  route->backward = find(3);
  route->differentiable_grad_input = find(4);
  route->differentiable_grad_values = find(5);
  for (const auto& numbers : arguments) route->geometry.push_back(argument(numbers));
  route->size = std::move(route->geometry.back());
  route->geometry.pop_back();
  route->weight = std::move(weight);
  if (!route->linear()) {
    const auto numbers = [&](size_t which) { return route->geometry.at(which).toIntVector(); };
    const Sizes none(numbers(1).size(), 0);
    route->window = Window{numbers(1), numbers(2), numbers(3), none, route->geometry.at(4).toInt()};
  }
  return routes().add(std::move(route));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsetrain, m) {
  m.def(
      "routed(int route, Tensor x, Tensor values, Tensor? bias, Tensor crow, Tensor col, "
      "Tensor key) -> Tensor");
  m.def("make_route(str[] operations, int[][] arguments, int[] weight) -> int");
  m.def("forget_route(int route) -> ()");
  m.def("sized(Tensor grad, int[] sizes) -> Tensor");
}

TORCH_LIBRARY_IMPL(sparsetrain, Autograd, m) { m.impl("routed", &routed); }

TORCH_LIBRARY_IMPL(sparsetrain, CompositeExplicitAutograd, m) {
  m.impl("make_route",
         [](std::vector<std::string> operations, std::vector<Sizes> arguments, Sizes weight) {
           return make_route(operations, arguments, std::move(weight));
         });
  m.impl("sized",
         [](const Tensor& grad, at::IntArrayRef sizes) { return grad.reshape(sizes).clone(); });
  m.impl("forget_route", [](int64_t route) { routes().forget(route); });
}
