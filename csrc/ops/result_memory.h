// Memory of large results that was freed, kept for the next ones.
#pragma once

#include "checks.h"

namespace sparsetrain {

// An uninitialised, contiguous result. New memory costs a page fault for each of its pages, as much
// as a sparse product of few nonzeros; from kMinKept bytes on, what was freed is therefore used
// again. The storage of such a tensor cannot be resized.
constexpr int64_t kMinKept = 4 << 20;
Tensor empty_result(const Tensor& like, int64_t dim, const int64_t* sizes);

// What is kept never makes results take more than they once took together, all of them alive, nor
// does it exceed `limit`; what no result took for a while goes.
struct ResultMemory {
  int64_t kept, live, limit;  // bytes
};
// limit is negative where SPARSETRAIN_RESULT_CACHE_MIB is no number of MiB.
ResultMemory result_memory();
// Frees what is kept; its bytes.
int64_t drop_result_memory();

}  // namespace sparsetrain
