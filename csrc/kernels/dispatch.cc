#include <cstring>

#include "kernels.h"

namespace sparsetrain {

#if defined(__x86_64__)
extern const KernelTable kTable_avx512, kTable_avx512vl, kTable_avx2, kTable_baseline;
const KernelTable* const kKernelTables[] = {&kTable_avx512, &kTable_avx512vl, &kTable_avx2,
                                            &kTable_baseline, nullptr};
#elif defined(__aarch64__)
extern const KernelTable kTable_neon;
const KernelTable* const kKernelTables[] = {&kTable_neon, nullptr};
#else
extern const KernelTable kTable_baseline;
const KernelTable* const kKernelTables[] = {&kTable_baseline, nullptr};
#endif

const KernelTable* select_kernels(const char* forced_isa) {
  for (const KernelTable* const* t = kKernelTables; *t; t++) {
    if (!(*t)->supported()) continue;
    if (!forced_isa || !*forced_isa || !std::strcmp(forced_isa, (*t)->isa)) return *t;
  }
  return nullptr;
}

}  // namespace sparsetrain
