// What differs between CPUs beyond instruction sets and the sizes of caches. (Nothing inline here:
// instruction sets would share its code.)
#pragma once

#include <cstdint>

namespace sparsetrain {

// AMD's, by how they compute 512-bit vectors, Intel's, and every other. SPARSETRAIN_CPU forces one
// of the names below: for tests, since every kind's results must be right on any CPU.
enum class CpuKind : int { other = 0, halves, wide, intel };
CpuKind cpu_kind();
// "other", "halves", "wide", "intel"; empty if SPARSETRAIN_CPU is none of them.
const char* cpu_kind_name();

// Of one core's cache, or a usual size where the system does not say.
int64_t cache_bytes(int level);

// Intel's hide the way from L2 and follow streams better unasked: asking costs them 3-10 %, and
// gives AMD's 0-8 %. Long rows packed in pieces gain 2-4 % there and lose as much on AMD's, as do
// operands' addresses in registers of their own (simd-inl.h).
bool is_intel();

// Whether AVX-512's instructions that expand and compress vectors, their target cleared, beat
// tables: on AMD's by 1.1-1.5 times. On Intel's, without clearing, they were as fast.
bool expands_fast();

}  // namespace sparsetrain
