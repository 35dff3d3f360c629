// Training by one call: the forward product of a layer whose plan is made, with a C++ node for its
// gradients. The autograd.Function of _autograd.py does the same from Python, 25 to 40 us slower
// for a layer and step, which is what a small layer takes in all.
//
// Not built on the stable ABI, which has no autograd: this library serves the torch that it was
// built with, and only that one; without it Python does the work.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
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

struct SparseProduct : torch::autograd::Function<SparseProduct> {
  static Tensor forward(AutogradContext* ctx, const RoutePtr& route, const Tensor& x,
                        const Tensor& values, const std::optional<Tensor>& bias, const Tensor& crow,
                        const Tensor& col, const Tensor& key) {
    const at::AutoDispatchBelowAutograd below;
    Arguments result =
        call(route->forward, with({x, values, bias, crow, col, key}, route->geometry));
    ctx->save_for_backward({values.requires_grad() ? x : Tensor(),
                            x.requires_grad() ? values : Tensor(), crow, col, key});
    ctx->saved_data["route"] = IValue::make_capsule(route);
    ctx->saved_data["bias"] = bias.has_value();
    return std::move(result[0]).toTensor();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto capsule = ctx->saved_data["route"].toCapsule();
    const Route& route = *static_cast<const Route*>(capsule.get());
    const bool has_bias = ctx->saved_data["bias"].toBool();
    const bool needs_x = ctx->needs_input_grad(0), needs_values = ctx->needs_input_grad(1);
    const bool needs_bias = has_bias && ctx->needs_input_grad(2);
    // As inputs are listed: the route, x, values, bias, crow, col, key.
    variable_list out(7);
    if (at::GradMode::is_enabled()) {
      one_by_one(route.differentiable_grad_input, route.differentiable_grad_values, route, saved,
                 grads[0], needs_x, needs_values, needs_bias, out);
    } else {
      const at::AutoDispatchBelowAutograd below;
      compute(route, saved, grads[0], needs_x, needs_values, needs_bias, out);
    }
    if (needs_bias && !needs_values) out[3] = sum_over_outputs(grads[0]);
    return out;
  }

 private:
  static void compute(const Route& route, const variable_list& saved, const Tensor& grad,
                      bool needs_x, bool needs_values, bool needs_bias, variable_list& out) {
    if (!(needs_x && needs_values && route.backward)) {
      one_by_one(route.grad_input, route.grad_values, route, saved, grad, needs_x, needs_values,
                 needs_bias, out);
      return;
    }
    Arguments arguments =
        with({grad, saved[0], saved[1], saved[2], saved[3], saved[4]}, route.geometry);
    arguments.emplace_back(needs_bias);
    Arguments result = call(route.backward, std::move(arguments));
    out[1] = std::move(result[0]).toTensor();
    out[2] = std::move(result[1]).toTensor();
    if (needs_bias) out[3] = std::move(result[2]).toTensor();
  }

  static void one_by_one(const Route::Operation& grad_input, const Route::Operation& grad_values,
                         const Route& route, const variable_list& saved, const Tensor& grad,
                         bool needs_x, bool needs_values, bool needs_bias, variable_list& out) {
    if (needs_x) {
      Arguments result =
          call(grad_input,
               with({grad, saved[1], saved[2], saved[3], saved[4], route.size}, route.geometry));
      out[1] = std::move(result[0]).toTensor();
    }
    if (needs_values) {
      Arguments arguments = with({grad, saved[0], saved[2], saved[3], saved[4]}, route.geometry);
      arguments.emplace_back(needs_bias);
      Arguments result = call(grad_values, std::move(arguments));
      out[2] = std::move(result[0]).toTensor();
      if (needs_bias) out[3] = std::move(result[1]).toTensor();
    }
  }
};

Tensor routed(int64_t route, const Tensor& x, const Tensor& values,
              const std::optional<Tensor>& bias, const Tensor& crow, const Tensor& col,
              const Tensor& key) {
  return SparseProduct::apply(routes().find(route), x, values, bias, crow, col, key);
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
