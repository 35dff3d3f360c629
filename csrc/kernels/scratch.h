// Memory that a kernel works in. Nothing inline here: the kernels of every instruction set use it.
#pragma once

#include <cstdint>

namespace sparsetrain {

// Aligned for any vector; not initialised; kept when it is freed, for the next call. Throws
// std::bad_alloc.
void* take_scratch(int64_t bytes);
// data: what take_scratch(bytes) gave, or null.
void give_scratch(void* data, int64_t bytes);
// Frees what is kept; its bytes.
int64_t drop_scratch();

}  // namespace sparsetrain
