// The operators torch.ops.sparsetrain.*: check, unpack, allocate, call a kernel. No loops over
// data. Built on torch's stable ABI, so that one library serves every Python and every torch
// since 2.10.
#include <string>
#include <tuple>

#include "checks.h"
#include "cpu.h"
#include "result_memory.h"

namespace sparsetrain {
namespace {

Tensor empty_rows(const Tensor& like, int64_t rows, int64_t cols) {
  const int64_t sizes[2] = {rows, cols};
  return empty_result(like, 2, sizes);
}

// x (B, in), values (nnz), bias (out)? -> (B, out)
Tensor linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
              const Tensor& crow, const Tensor& col, const Tensor& key) {
  constexpr const char* op = "linear";
  check_layout(op, "values", values, 1);
  const DType dtype = dtype_of(op, "values", values);
  const ScalarType scalar = values.scalar_type();
  check_floats(op, "x", x, 2, "values", scalar);
  const auto entry = plan_for(op, key, crow, col, x.size(1));
  const int64_t out = entry->pattern().rows;
  check_length(op, "values", values.size(0), "nonzeros of the pattern", entry->pattern().nnz);
  if (bias) {
    check_floats(op, "bias", *bias, 1, "values", scalar);
    check_length(op, "bias", bias->size(0), "rows of the pattern", out);
  }

  const Tensor x_rows = with_unit_inner_stride(x);
  const Tensor values_c = as_contiguous(values);
  const std::optional<Tensor> bias_c =
      bias ? std::make_optional(as_contiguous(*bias)) : std::nullopt;
  const Tensor y = empty_rows(values, x.size(0), out);
  if (y.numel() == 0) return y;
  kernels(op).linear_forward({dtype, entry->plan(), matrix_view(x_rows), values_c.const_data_ptr(),
                              bias_c ? bias_c->const_data_ptr() : nullptr, y.mutable_data_ptr(),
                              torch_threads()});
  return y;
}

// What the three gradient operators share. x without dvalues, and values without dx, are not read.
struct Gradients {
  const char* op;
  DType dtype;
  std::shared_ptr<const PlanEntry> entry;
  Tensor grad;

  Gradients(const char* op, const char* like_name, const Tensor& like, const Tensor& grad,
            const Tensor& crow, const Tensor& col, const Tensor& key, int64_t in_features)
      : op(op), dtype(dtype_of(op, like_name, like)), grad(grad) {
    check_floats(op, "grad", grad, 2, like_name, like.scalar_type());
    entry = plan_for(op, key, crow, col, in_features);
    check_length(op, "each row of grad", grad.size(1), "rows of the pattern",
                 entry->pattern().rows);
  }

  // A null tensor leaves its result out; an empty one is never null to the kernel.
  void run(const Tensor* x, const Tensor* values, const Tensor* dx, const Tensor* dvalues,
           const Tensor* dbias) const {
    const Tensor grad_rows = with_unit_inner_stride(grad);
    const std::optional<Tensor> x_rows =
        x ? std::make_optional(with_unit_inner_stride(*x)) : std::nullopt;
    const std::optional<Tensor> values_c =
        values ? std::make_optional(as_contiguous(*values)) : std::nullopt;
    static char nothing;
    const auto output = [](const Tensor* t) -> void* {
      if (!t) return nullptr;
      return t->numel() ? t->mutable_data_ptr() : &nothing;
    };
    kernels(op).linear_backward({dtype, entry->plan(), matrix_view(grad_rows),
                                 x_rows ? matrix_view(*x_rows) : Matrix{nullptr, 0, 0, 0},
                                 values_c ? values_c->const_data_ptr() : nullptr, output(dx),
                                 output(dvalues), output(dbias), torch_threads()});
  }
};

// grad (B, out), values (nnz) -> (B, in)
Tensor linear_grad_input(const Tensor& grad, const Tensor& values, const Tensor& crow,
                         const Tensor& col, const Tensor& key, int64_t in_features) {
  constexpr const char* op = "linear_grad_input";
  check_layout(op, "values", values, 1);
  const Gradients g(op, "values", values, grad, crow, col, key, in_features);
  check_length(op, "values", values.size(0), "nonzeros of the pattern", g.entry->pattern().nnz);
  const Tensor dx = empty_rows(values, grad.size(0), in_features);
  g.run(nullptr, &values, &dx, nullptr, nullptr);
  return dx;
}

// grad (B, out), x (B, in) -> (nnz), (out) or (0)
std::tuple<Tensor, Tensor> linear_grad_values(const Tensor& grad, const Tensor& x,
                                              const Tensor& crow, const Tensor& col,
                                              const Tensor& key, bool bias) {
  constexpr const char* op = "linear_grad_values";
  check_layout(op, "x", x, 2);
  const Gradients g(op, "x", x, grad, crow, col, key, x.size(1));
  check_length(op, "grad", grad.size(0), "rows of x", x.size(0));
  const Tensor dvalues = empty_vector(x, g.entry->pattern().nnz);
  const Tensor dbias = empty_vector(x, bias ? grad.size(1) : 0);
  g.run(&x, nullptr, nullptr, &dvalues, bias ? &dbias : nullptr);
  return {dvalues, dbias};
}

// Both of the above in one pass over grad:
// grad (B, out), x (B, in), values (nnz) -> (B, in), (nnz), (out) or (0)
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& values, const Tensor& crow,
                                                   const Tensor& col, const Tensor& key,
                                                   bool bias) {
  constexpr const char* op = "linear_backward";
  check_layout(op, "values", values, 1);
  check_floats(op, "x", x, 2, "values", values.scalar_type());
  const Gradients g(op, "values", values, grad, crow, col, key, x.size(1));
  check_length(op, "grad", grad.size(0), "rows of x", x.size(0));
  check_length(op, "values", values.size(0), "nonzeros of the pattern", g.entry->pattern().nnz);
  const Tensor dx = empty_rows(x, x.size(0), x.size(1));
  const Tensor dvalues = empty_vector(x, values.size(0));
  const Tensor dbias = empty_vector(x, bias ? grad.size(1) : 0);
  g.run(&x, &values, &dx, &dvalues, bias ? &dbias : nullptr);
  return {dx, dvalues, dbias};
}

std::tuple<int64_t, int64_t> check_pattern_op(const Tensor& crow, const Tensor& col, int64_t cols) {
  check_pattern_tensors("check_pattern", crow, col, cols);
  const PatternCheck found = check_pattern(pattern_view(crow, col, cols));
  return {static_cast<int64_t>(found.fault), found.where};
}

std::tuple<Tensor, Tensor, Tensor> transpose_pattern_op(const Tensor& crow, const Tensor& col,
                                                        int64_t cols) {
  check_pattern_tensors("transpose_pattern", crow, col, cols);
  const Pattern pattern = pattern_view(crow, col, cols);
  require_valid(pattern);
  const Tensor tcrow = empty_vector(crow, cols + 1);
  const Tensor tcol = empty_vector(crow, pattern.nnz);
  const Tensor perm = empty_vector(crow, pattern.nnz);
  transpose_pattern(pattern, static_cast<int32_t*>(tcrow.mutable_data_ptr()),
                    static_cast<int32_t*>(tcol.mutable_data_ptr()),
                    static_cast<int32_t*>(perm.mutable_data_ptr()));
  return {tcrow, tcol, perm};
}

int64_t plan_bytes_op(const Tensor& key) {
  check_layout("plan_bytes", "key", key, 1);
  require(key.scalar_type() == ScalarType::Long && key.size(0) == 1, "plan_bytes",
          "key must be one int64 number, got shape ", shape_of(key));
  return cached_plan_bytes(*static_cast<const int64_t*>(key.const_data_ptr()));
}

// "<chosen>;<available, best first>;<kind of CPU>;<hash of the kernels>;<compiler>": an empty first
// or third field means that SPARSETRAIN_ISA or SPARSETRAIN_CPU cannot be obeyed.
std::string native_info() {
  const KernelTable* const table = chosen_kernels();
  return std::string(table ? table->isa : "") + ";" + isas_available() + ";" + cpu_kind_name() +
         ";" SPARSETRAIN_KERNELS ";" __VERSION__;
}

std::tuple<int64_t, int64_t, int64_t> result_memory_op() {
  const ResultMemory memory = result_memory();
  return {memory.kept, memory.live, memory.limit};
}

}  // namespace
}  // namespace sparsetrain

STABLE_TORCH_LIBRARY(sparsetrain, m) {
  m.def(
      "linear(Tensor x, Tensor values, Tensor? bias, Tensor crow, Tensor col, Tensor key) "
      "-> Tensor");
  m.def(
      "linear_grad_input(Tensor grad, Tensor values, Tensor crow, Tensor col, Tensor key, "
      "int in_features) -> Tensor");
  m.def(
      "linear_grad_values(Tensor grad, Tensor x, Tensor crow, Tensor col, Tensor key, bool bias) "
      "-> (Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor values, Tensor crow, Tensor col, Tensor key, "
      "bool bias) -> (Tensor, Tensor, Tensor)");
  m.def("check_pattern(Tensor crow, Tensor col, int cols) -> (int fault, int where)");
  m.def(
      "transpose_pattern(Tensor crow, Tensor col, int cols) "
      "-> (Tensor tcrow, Tensor tcol, Tensor perm)");
  m.def("plan_bytes(Tensor key) -> int");
  m.def("forget_plan(int key) -> ()");
  m.def("native_info() -> str");
  m.def("result_memory() -> (int kept, int live, int limit)");
  m.def("drop_kept_memory() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(sparsetrain, CPU, m) {
  m.impl("linear", TORCH_BOX(&sparsetrain::linear));
  m.impl("linear_grad_input", TORCH_BOX(&sparsetrain::linear_grad_input));
  m.impl("linear_grad_values", TORCH_BOX(&sparsetrain::linear_grad_values));
  m.impl("linear_backward", TORCH_BOX(&sparsetrain::linear_backward));
  m.impl("check_pattern", TORCH_BOX(&sparsetrain::check_pattern_op));
  m.impl("transpose_pattern", TORCH_BOX(&sparsetrain::transpose_pattern_op));
  m.impl("plan_bytes", TORCH_BOX(&sparsetrain::plan_bytes_op));
}

// No tensor argument, hence no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(sparsetrain, CompositeExplicitAutograd, m) {
  m.impl("forget_plan", TORCH_BOX(&sparsetrain::forget_plan));
  m.impl("native_info", TORCH_BOX(&sparsetrain::native_info));
  m.impl("result_memory", TORCH_BOX(&sparsetrain::result_memory_op));
  m.impl("drop_kept_memory", TORCH_BOX(&sparsetrain::drop_kept_memory));
}
