// What operators that hand work on to the library's dense products need.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>

#include "checks.h"

namespace sparsetrain {

inline bool library_has_bf16() {
  static const bool has = [] {
    std::array<StableIValue, 1> stack{};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_is_mkldnn_bf16_supported", "",
                                                 stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<bool>(stack[0]);
  }();
  return has;
}

// The dtype that the library multiplies fast, rounding once, at the end.
inline ScalarType product_type(ScalarType type) {
  return type == ScalarType::BFloat16 && !library_has_bf16() ? ScalarType::Float : type;
}
// The same for a product of rows of `inner` elements. oneDNN's bfloat16 kernels read those in
// pairs: with an odd number, one from beyond each row's end too, which spoils the row if it is no
// number.
inline ScalarType product_type(ScalarType type, int64_t inner) {
  return type == ScalarType::BFloat16 && inner % 2 ? ScalarType::Float : product_type(type);
}
inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

inline Tensor empty_of(ScalarType type, int64_t rows, int64_t cols) {
  const int64_t sizes[2] = {rows, cols};
  return empty_of(type, 2, sizes);
}

inline DType kernel_type(ScalarType type) {
  return type == ScalarType::Float    ? DType::f32
         : type == ScalarType::Double ? DType::f64
                                      : DType::bf16;
}

// Room for a weight or a part of one, kept by the thread for later calls: never part of a result.
// One-dimensional, of at least `elements`; new memory for each call costs more than to fill it.
inline Tensor kept_scratch(ScalarType type, int64_t elements) {
  struct Kept {
    Tensor tensor{nullptr};
    int64_t elements = 0;
  };
  static thread_local Kept kept[3];
  Kept& mine = kept[static_cast<int>(kernel_type(type))];
  if (mine.elements < elements) {
    mine = Kept{};  // the old one goes before the new one comes
    mine = Kept{empty_of(type, 1, &elements), elements};
  }
  return mine.tensor;
}

}  // namespace sparsetrain
