// Compiled once per instruction set, each time with other flags and another SPARSETRAIN_ISA_NAME.
// Everything but the table is in anonymous namespaces: no symbol may be shared between sets.
#include "linear-inl.h"

#define ST_CAT_(a, b) a##b
#define ST_CAT(a, b) ST_CAT_(a, b)
#define ST_STRING_(a) #a
#define ST_STRING(a) ST_STRING_(a)

namespace sparsetrain {
namespace {

template <class Args>
void by_dtype(const Args& a, void (*f32)(const Args&), void (*f64)(const Args&),
              void (*b16)(const Args&)) {
  switch (a.dtype) {
    case DType::f32: return f32(a);
    case DType::f64: return f64(a);
    case DType::bf16: return b16(a);
  }
}
void forward(const LinearForward& a) {
  by_dtype(a, linear_forward<float>, linear_forward<double>, linear_forward<bf16>);
}
void backward(const LinearBackward& a) {
  by_dtype(a, linear_backward<float>, linear_backward<double>, linear_backward<bf16>);
}
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

extern const KernelTable ST_CAT(kTable_, SPARSETRAIN_ISA_NAME) = {
    ST_STRING(SPARSETRAIN_ISA_NAME), supported, forward, backward};

}  // namespace sparsetrain
