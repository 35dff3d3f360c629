// What every operator needs: errors, checks of arguments, results, threads, the chosen kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "plan_registry.h"

namespace sparsetrain {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- errors -------------------------------------------------------------------------------------

template <typename... Parts>
void require(bool ok, const char* op, const Parts&... parts) {
  if (__builtin_expect(ok, true)) return;
  std::ostringstream message;
  message << "sparsetrain::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << ")";
  return text.str();
}

// ---- arguments ----------------------------------------------------------------------------------

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

inline void check_layout(const char* op, const char* name, const Tensor& t, int64_t dim) {
  require(t.is_cpu(), op, name, " is on another device; the kernels take CPU tensors: ", name,
          ".cpu()");
  if (t.dim() != dim) {
    require(false, op, name, " must have ", dim, dim == 1 ? " dimension" : " dimensions",
            ", got shape ", shape_of(t));
  }
}

inline void check_floats(const char* op, const char* name, const Tensor& t, int64_t dim,
                         const char* like_name, ScalarType like) {
  check_layout(op, name, t, dim);
  const ScalarType got = t.scalar_type();
  if (got != like) {
    require(false, op, name, " is ", torch::headeronly::toString(got), " but ", like_name, " is ",
            torch::headeronly::toString(like), "; they must have the same dtype");
  }
}

inline void check_indices(const char* op, const char* name, const Tensor& t) {
  check_layout(op, name, t, 1);
  require(t.scalar_type() == ScalarType::Int, op, name, " must be int32, got ",
          torch::headeronly::toString(t.scalar_type()));
  require(t.is_contiguous(), op, name, " must be contiguous, got stride ", t.stride(0));
  require(t.size(0) <= kMaxIndex, op, name, " has ", t.size(0),
          " entries, more than int32 indices can count (", kMaxIndex, ")");
}

inline void check_pattern_tensors(const char* op, const Tensor& crow, const Tensor& col,
                                  int64_t cols) {
  check_indices(op, "crow", crow);
  check_indices(op, "col", col);
  require(crow.size(0) >= 1, op, "crow must have rows + 1 entries, got none");
  require(cols >= 0 && cols <= kMaxIndex, op, "the pattern must have 0 to ", kMaxIndex,
          " columns, got ", cols);
}

inline void check_length(const char* op, const char* name, int64_t got, const char* what,
                         int64_t expected) {
  require(got == expected, op, name, " has ", got, " entries, expected ", expected, " (", what,
          ")");
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      require(false, op, name, " must be float32, float64 or bfloat16, got ",
              torch::headeronly::toString(t.scalar_type()));
      return DType::f32;
  }
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Rows may be any distance apart, if they do not overlap; anything else is copied. The result holds
// the memory that matrix_view() points into.
inline Tensor with_unit_inner_stride(const Tensor& t) {
  const bool fits =
      (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= t.size(1));
  return fits ? t : torch::stable::contiguous(t);
}

inline Matrix matrix_view(const Tensor& t) {
  return Matrix{t.const_data_ptr(), t.size(0), t.size(1), t.stride(0)};
}

inline std::shared_ptr<const PlanEntry> plan_for(const char* op, const Tensor& key,
                                                 const Tensor& crow, const Tensor& col,
                                                 int64_t cols) {
  check_pattern_tensors(op, crow, col, cols);
  check_layout(op, "key", key, 1);
  require(key.scalar_type() == ScalarType::Long && key.size(0) == 1, op,
          "key must be one int64 number, got ", torch::headeronly::toString(key.scalar_type()),
          " of shape ", shape_of(key));
  const int64_t id = *static_cast<const int64_t*>(key.const_data_ptr());
  require(id > 0, op, "key must hold a positive number, got ", id);
  return find_or_build_plan(id, crow, col, cols);
}

// ---- results and threads ------------------------------------------------------------------------

// A result of some size is written in full at once, and new memory costs a page fault for every
// 4 KiB: 100 MB of results took 83 ms, 28 with pages of 2 MiB, which Linux gives where asked.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  if (bytes < static_cast<int64_t>(2 * page)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Of a contiguous tensor, in elements.
struct Strides {
  int64_t of[5] = {1, 1, 1, 1, 1};
  Strides(int64_t dim, const int64_t* sizes) {  // dim <= 5
    for (int64_t d = dim - 2; d >= 0; --d) of[d] = of[d + 1] * sizes[d + 1];
  }
};

// Uninitialised and contiguous. Straight to the allocator: through the dispatcher it costs more
// than a small kernel.
inline Tensor empty_of(ScalarType type, int64_t dim, const int64_t* sizes) {
  const Strides strides(dim, sizes);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides.of,
                                                  static_cast<int32_t>(type),
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  const int64_t bytes = static_cast<int64_t>(result.numel() * result.element_size());
  if (bytes >= (4 << 20)) prefer_huge_pages(result.mutable_data_ptr(), bytes);
  return result;
}
inline Tensor empty_like_dtype(const Tensor& t, int64_t dim, const int64_t* sizes) {
  return empty_of(t.scalar_type(), dim, sizes);
}

inline Tensor empty_vector(const Tensor& like, int64_t n) { return empty_like_dtype(like, 1, &n); }

inline void run_on_torch_threads(int64_t n, void (*body)(void*, int64_t), void* ctx) {
  if (n <= 1) {
    for (int64_t i = 0; i < n; ++i) body(ctx, i);
    return;
  }
  torch::stable::parallel_for(0, n, 1, [body, ctx](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(ctx, i);
  });
}

inline Parallel torch_threads() {
  return Parallel{run_on_torch_threads, static_cast<int>(torch::stable::get_num_threads())};
}

inline std::string isas_available() {
  std::string names;
  for (const KernelTable* const* t = kKernelTables; *t && (*t)->isa; ++t) {
    if ((*t)->supported()) names += (names.empty() ? "" : ",") + std::string((*t)->isa);
  }
  return names;
}

// Chosen once per process; null where SPARSETRAIN_ISA names nothing that this CPU can run.
inline const KernelTable* chosen_kernels() {
  static const KernelTable* const table = select_kernels(std::getenv("SPARSETRAIN_ISA"));
  return table;
}

inline const KernelTable& kernels(const char* op) {
  const KernelTable* const table = chosen_kernels();
  require(table != nullptr, op, "SPARSETRAIN_ISA names an instruction set that is unknown here; ",
          "choose one of ", isas_available(), " or unset it");
  return *table;
}

}  // namespace sparsetrain
