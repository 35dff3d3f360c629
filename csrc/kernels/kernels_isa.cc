// Compiled once per instruction set, each time with other flags and another SPARSETRAIN_ISA_NAME.
// Everything but the table is in anonymous namespaces: no symbol may be shared between sets.
#include "conv-inl.h"
#include "dense-inl.h"
#include "linear-inl.h"

#define ST_CAT_(a, b) a##b
#define ST_CAT(a, b) ST_CAT_(a, b)
#define ST_STRING_(a) #a
#define ST_STRING(a) ST_STRING_(a)

namespace sparsetrain {
namespace {

#define ST_BY_DTYPE(name, Args)                        \
  void name##_any(const Args& a) {                     \
    if (a.dtype == DType::f32) return name<float>(a);  \
    if (a.dtype == DType::f64) return name<double>(a); \
    return name<bf16>(a);                              \
  }
ST_BY_DTYPE(linear_forward, LinearForward)
ST_BY_DTYPE(linear_backward, LinearBackward)
ST_BY_DTYPE(conv_forward, ConvForward)
ST_BY_DTYPE(conv_backward, ConvBackward)

bool supported() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("x86-64-v4");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("x86-64-v3");
#else
  return true;
#endif
}

}  // namespace

extern const KernelTable ST_CAT(kTable_, SPARSETRAIN_ISA_NAME) = {ST_STRING(SPARSETRAIN_ISA_NAME),
                                                                  supported,
                                                                  linear_forward_any,
                                                                  linear_backward_any,
                                                                  conv_forward_any,
                                                                  conv_backward_any,
                                                                  values_to_dense_any,
                                                                  dense_to_values_any};

}  // namespace sparsetrain
