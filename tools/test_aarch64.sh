#!/usr/bin/env bash
# Cross-compiles kernels_test for 64-bit Arm and runs it under an emulator: the NEON kernels
# against the oracle, on an x86 machine. Skips (exit 0) where a tool is missing.
# On Debian: apt-get install g++-aarch64-linux-gnu qemu-user
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"  # cmake may come from there

for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake; do
  if ! command -v "$tool" > /dev/null; then
    echo "skipped: $tool is missing (Debian: apt-get install g++-aarch64-linux-gnu qemu-user cmake)"
    exit 0
  fi
done

build=build/aarch64
cmake -S . -B "$build" \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static \
  -DSPARSETRAIN_BUILD_EXTENSION=OFF -DSPARSETRAIN_BUILD_TESTS=ON > /dev/null
cmake --build "$build" --target kernels_test
exec qemu-aarch64 "$build/kernels_test" --quick
