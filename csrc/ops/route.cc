// Training by one call: the forward product of a layer whose plan is made, with a C++ node for its
// gradients. The autograd.Function of _autograd.py does the same from Python, 25 to 40 us slower
// for a layer and step, which is what a small layer takes in all.
//
// Not built on the stable ABI, which has no autograd: this library serves the torch that it was
// built with, and only that one; without it Python does the work.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/sum.h>
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

// Which operations compute the products of one layer on one geometry (see _planner.py).
struct Route : torch::CustomClassHolder {
  using Operation = std::optional<c10::OperatorHandle>;
  Operation forward, grad_input, grad_values, backward;  // the last not if families differ
  Operation differentiable_grad_input, differentiable_grad_values;  // for higher derivatives
  Arguments geometry;
  IValue size;  // what grad_input is told of the input's shape
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
  std::vector<int64_t> dims{0};
  for (int64_t d = 2; d < grad.dim(); d++) dims.push_back(d);
  if (grad.size(1) != 1) return grad.sum(dims);
  std::vector<int64_t> two(grad.dim(), -1);
  two[1] = 2;
  return grad.expand(two).sum(dims).narrow(0, 0, 1);
}

// Records one product. A node of its own rather than a torch::autograd::Function, whose context and
// wrapping take some 10 us of a layer and step.
class SparseProductBackward : public torch::autograd::Node {
 public:
  SparseProductBackward(RoutePtr route, const Tensor& x, const Tensor& values,
                        const std::optional<Tensor>& bias, const Tensor& crow, const Tensor& col,
                        const Tensor& key)
      : Node(torch::autograd::collect_next_edges(x, values, bias)),
        route_(std::move(route)),
        x_(values.requires_grad() ? x : Tensor(), false),
        values_(x.requires_grad() ? values : Tensor(), false),
        crow_(crow, false),
        col_(col, false),
        key_(key, false) {}

  std::string name() const override { return "SparseProductBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : saved_variables()) saved->reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Needs needs{task_should_compute_output(0), task_should_compute_output(1),
                      task_should_compute_output(2)};
    variable_list out(3);  // x, values, bias
    const Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    const Saved saved{needs.values ? x_.unpack() : Tensor(), needs.x ? values_.unpack() : Tensor(),
                      crow_.unpack(), col_.unpack(), key_.unpack()};
    if (at::GradMode::is_enabled()) {
      one_by_one(route_->differentiable_grad_input, route_->differentiable_grad_values, saved, grad,
                 needs, out);
    } else {
      const at::AutoDispatchBelowAutograd below;
      compute(saved, grad, needs, out);
    }
    if (needs.bias && !needs.values) out[2] = sum_over_outputs(grad);
    return out;
  }

  // Compiled autograd: the operations above are traced, each with a fake of its own.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(reinterpret_cast<int64_t>(route_.get()));
    for (const SavedVariable* saved : {&x_, &values_, &crow_, &col_, &key_})
      args.collect(*saved, false);
  }
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable* saved : saved_variables()) swap.before(*saved);
    variable_list result = apply(variable_list(grads));
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

  std::array<SavedVariable*, 5> saved_variables() { return {&x_, &values_, &crow_, &col_, &key_}; }

  void compute(const Saved& saved, const Tensor& grad, const Needs& needs,
               variable_list& out) const {
    if (!(needs.x && needs.values && route_->backward)) {
      one_by_one(route_->grad_input, route_->grad_values, saved, grad, needs, out);
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
  SavedVariable x_, values_, crow_, col_, key_;
};

Tensor routed(int64_t name, const Tensor& x, const Tensor& values,
              const std::optional<Tensor>& bias, const Tensor& crow, const Tensor& col,
              const Tensor& key) {
  RoutePtr route = routes().find(name);
  Tensor y;
  {
    const at::AutoDispatchBelowAutograd below;
    y = std::move(call(route->forward, with({x, values, bias, crow, col, key}, route->geometry))[0])
            .toTensor();
  }
  if (torch::autograd::compute_requires_grad(x, values, bias))
    torch::autograd::set_history(y, c10::make_intrusive<SparseProductBackward>(
                                        std::move(route), x, values, bias, crow, col, key));
  return y;
}

// {1, n} is the number n, {0, n, m, ...} a list.
IValue argument(const std::vector<int64_t>& numbers) {
  if (numbers.at(0)) return numbers.at(1);
  return std::vector<int64_t>(numbers.begin() + 1, numbers.end());
}

// operations: forward, grad_input, grad_values, backward or "", differentiable grad_input and
// grad_values; arguments: the geometry, and last the size.
int64_t make_route(const std::vector<std::string>& operations,
                   const std::vector<std::vector<int64_t>>& arguments) {
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
  return routes().add(std::move(route));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparsetrain, m) {
  m.def(
      "routed(int route, Tensor x, Tensor values, Tensor? bias, Tensor crow, Tensor col, "
      "Tensor key) -> Tensor");
  m.def("make_route(str[] operations, int[][] arguments) -> int");
  m.def("forget_route(int route) -> ()");
}

TORCH_LIBRARY_IMPL(sparsetrain, Autograd, m) { m.impl("routed", &routed); }

TORCH_LIBRARY_IMPL(sparsetrain, CompositeExplicitAutograd, m) {
  m.impl("make_route",
         [](std::vector<std::string> operations, std::vector<std::vector<int64_t>> arguments) {
           return make_route(operations, arguments);
         });
  m.impl("forget_route", [](int64_t route) { routes().forget(route); });
}
