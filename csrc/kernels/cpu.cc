#include "cpu.h"

#include <cstdlib>
#include <cstring>

#include <unistd.h>

namespace sparsetrain {

namespace {

constexpr const char* kNames[] = {"other", "halves", "wide", "intel"};

CpuKind detected() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) return CpuKind::intel;
  if (__builtin_cpu_is("amdfam19h")) return CpuKind::halves;
  // Of AMD's earlier ones none has AVX-512, and nothing else depends on which of the two it is.
  if (__builtin_cpu_is("amd")) return CpuKind::wide;
#endif
  return CpuKind::other;
}

// The number of the forced kind, -1 if none is, -2 if it is unknown.
int forced() {
  const char* name = std::getenv("SPARSETRAIN_CPU");
  if (!name || !*name) return -1;
  for (int kind = 0; kind < 4; kind++)
    if (!std::strcmp(name, kNames[kind])) return kind;
  return -2;
}

}  // namespace

CpuKind cpu_kind() {
  static const CpuKind kind = forced() < 0 ? detected() : static_cast<CpuKind>(forced());
  return kind;
}

const char* cpu_kind_name() { return forced() == -2 ? "" : kNames[static_cast<int>(cpu_kind())]; }

bool is_intel() { return cpu_kind() == CpuKind::intel; }
bool expands_fast() { return cpu_kind() == CpuKind::wide || cpu_kind() == CpuKind::halves; }

int64_t cache_bytes(int level) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const int64_t bytes = sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return level == 1 ? 32 << 10 : 512 << 10;
}

}  // namespace sparsetrain
