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

#if defined(ST_512_BITS)
extern const KernelTable kTable_avx512vl;
#endif

namespace {

// The table of another instruction set, where that is faster; mostly null.
template <class Args>
const KernelTable* other_table(const Args&) {
  return nullptr;
}
#if defined(ST_512_BITS)
// Lanes that are samples, with vectors of half the size. Eight samples fill those, but not whole
// ones, whose lanes are pixels then: at 90 % whole ones are 0.7-0.87 times as fast forward,
// 0.7-1.04 backward; at 80 % 0.87-1.05 and 0.8-1.14. Where a CPU computes whole ones in two halves,
// they are also slower (0.8-0.97) where a batch fills them: twice as many channels fit in L1 with
// halves.
template <class Args>
const KernelTable* conv_table(const Args& a) {
  constexpr double kMostDensity = 0.12;
  const ConvVectors whole = a.dtype == DType::f64 ? conv_vectors<double>() : conv_vectors<float>();
  ConvVectors half = whole;
  half.lanes /= 2;
  // Twice as many channels fit in L1 here too.
  if (cpu_kind() == CpuKind::halves &&
      pointwise_by(a, half.lanes, kPointwiseBytes / 2) != PointwiseBy::none)
    return &kTable_avx512vl;
  const bool faster = cpu_kind() == CpuKind::halves ||
                      (a.plan->density() <= kMostDensity && !lanes_are_samples(a.shape, whole));
  return faster && lanes_are_samples(a.shape, half) ? &kTable_avx512vl : nullptr;
}
const KernelTable* other_table(const ConvForward& a) { return conv_table(a); }
const KernelTable* other_table(const ConvBackward& a) { return conv_table(a); }
#endif

#define ST_BY_DTYPE(name, Args)                                           \
  void name##_any(const Args& a) {                                        \
    if (const KernelTable* other = other_table(a)) return other->name(a); \
    if (a.dtype == DType::f32) return name<float>(a);                     \
    if (a.dtype == DType::f64) return name<double>(a);                    \
    return name<bf16>(a);                                                 \
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
