#include "result_memory.h"

#include <memory>
#include <utility>

#include "kept_memory.h"
#include "scratch.h"

// From torch 2.11 on; null before.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* ctx), void* deleter_ctx);

namespace sparsetrain {
namespace {

// Allocated by torch, so that its profiler and whatever replaces its allocator see it.
struct TorchMemory {
  Tensor tensor{nullptr};

  explicit operator bool() const { return tensor.get() != nullptr; }
  static int64_t limit() { return kept_memory_limit(); }
  static int64_t most_for(int64_t bytes) { return bytes + bytes / 8; }
};
typedef KeptMemory<TorchMemory> Kept;

// Gives a block back: as torch_from_blob's deleter, and where no tensor came to hold it.
void end_lease(void*, void* lease) {
  const std::unique_ptr<Kept::Block> block(static_cast<Kept::Block*>(lease));
  Kept::Blocks gone;
  Kept::instance().give(std::move(*block), gone);
}
struct EndLease {
  void operator()(Kept::Block* block) const { end_lease(nullptr, block); }
};

Tensor new_memory(const Tensor& like, int64_t bytes) {
  const int64_t elements = bytes / static_cast<int64_t>(like.element_size());
  try {
    return empty_like_dtype(like, 1, &elements);
  } catch (...) {
    if (!drop_kept_memory()) throw;
  }
  return empty_like_dtype(like, 1, &elements);
}

}  // namespace

Tensor empty_result(const Tensor& like, int64_t dim, const int64_t* sizes) {
  int64_t bytes = static_cast<int64_t>(like.element_size());
  for (int64_t d = 0; d < dim; ++d) bytes *= sizes[d];
  if (bytes < kLeastKept || !torch_from_blob || kept_memory_limit() <= 0)
    return empty_like_dtype(like, dim, sizes);
  Kept::Blocks gone;
  std::unique_ptr<Kept::Block, EndLease> block(new Kept::Block(Kept::instance().take(bytes, gone)));
  gone.clear();  // before more is allocated
  Tensor& memory = block->memory.tensor;
  if (!memory.get()) memory = new_memory(like, bytes);
  const Strides strides(dim, sizes);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      torch_from_blob(memory.mutable_data_ptr(), dim, sizes, strides.of, 0,
                      static_cast<int32_t>(like.scalar_type()), aoti_torch_device_type_cpu(), -1,
                      &handle, aoti_torch_layout_strided(), nullptr, 0, end_lease, block.get()));
  block.release();  // end_lease has it
  return Tensor(handle);
}

ResultMemory result_memory() {
  const auto state = Kept::instance().state();
  return {state.kept, state.live, kept_memory_limit()};
}

int64_t drop_kept_memory() {
  Kept::Blocks gone;
  return Kept::instance().drop_all(gone) + drop_scratch();
}

}  // namespace sparsetrain
