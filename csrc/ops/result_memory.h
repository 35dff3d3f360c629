// Results of operators, in memory of freed ones where they are large.
#pragma once

#include "checks.h"

namespace sparsetrain {

// Uninitialised and contiguous. From kLeastKept bytes on, its memory is kept when the last tensor
// that holds it goes, and used for a later one (csrc/kernels/kept_memory.h); such a tensor's
// storage cannot be resized.
constexpr int64_t kLeastKept = 4 << 20;
Tensor empty_result(const Tensor& like, int64_t dim, const int64_t* sizes);

struct ResultMemory {
  int64_t kept, live, limit;  // bytes
};
ResultMemory result_memory();
// Frees all that is kept, scratch memory too; its bytes.
int64_t drop_kept_memory();

}  // namespace sparsetrain
