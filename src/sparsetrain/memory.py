"""What the process does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys

import torch

__all__ = ["empty_cache", "keep_memory"]

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Keeps freed memory in the process, so that the next training step finds it there.

    By default the C library takes memory for large tensors from the system and gives it back as
    soon as they are freed: every activation of every step is then zeroed by the system and mapped
    anew, a page fault for each 4 KiB. (The sparse layers' own results, of 4 MiB or more, are kept
    anyway: see :func:`empty_cache`.) A sparse step, whose products take less time, spends more of
    it on that than a dense one: ResNet-18 at 95 % sparsity takes 0.6-0.75 of the time with memory
    kept, dense 0.9 (docs/performance.md).

    Holds for the whole process and for all that uses malloc, from the call on, and cannot be
    undone. The process's memory stays at its peak, which is itself some 10-35 % higher, since
    pieces of freed memory do not always fit what comes next. Call it once, before training.

    Returns:
        Whether the C library was told. On systems without glibc nothing happens, and the result is
        False; where another malloc is loaded in front of it (jemalloc, tcmalloc), which keeps
        memory by rules of its own, nothing changes either.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl has none
        return False
    never, pad = -1, 64 << 20
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, never), (_M_TOP_PAD, pad))
    told = [mallopt(what, value) == 1 for what, value in settings]  # all of them, whatever one says
    return all(told)


def empty_cache() -> int:
    """Frees the memory that the sparse layers keep for their next calls.

    When a result of 4 MiB or more (an output, a gradient of an input) is no longer used, the next
    one of about its size takes its memory. What is kept so is at most what such results took
    together at some time, never more than ``SPARSETRAIN_CACHE_MIB`` (an environment variable, in
    MiB, read when sparsetrain is imported; 1024 where it is not set; 0: nothing is kept), and goes
    when 1024 results have not used it. Up to 64 MiB are kept in the same way of what the kernels
    work in. Worth a call where something else needs the memory, after training for example.

    The storage of such results cannot be resized (``Tensor.resize_`` to more elements raises).

    Returns:
        The number of bytes that were freed.
    """
    freed: int = torch.ops.sparsetrain.drop_kept_memory()
    return freed
