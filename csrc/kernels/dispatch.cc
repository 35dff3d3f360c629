#include <cstring>

#include "kernels.h"

namespace sparsetrain {

// SPARSETRAIN_ISAS: what was compiled, best first, as in ISA(avx2) ISA(baseline).
#define ISA(name) extern const KernelTable kTable_##name;
SPARSETRAIN_ISAS
#undef ISA
#define ISA(name) &kTable_##name,
const KernelTable* const kKernelTables[] = {SPARSETRAIN_ISAS nullptr};

const KernelTable* select_kernels(const char* forced_isa) {
  for (const KernelTable* const* t = kKernelTables; *t; t++) {
    if (!(*t)->supported()) continue;
    if (!forced_isa || !*forced_isa || !std::strcmp(forced_isa, (*t)->isa)) return *t;
  }
  return nullptr;
}

}  // namespace sparsetrain
