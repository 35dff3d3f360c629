#!/usr/bin/env bash
# kernels_test with the address and undefined-behaviour sanitizers, for the instruction sets that
# this CPU has: to compile one takes minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"  # cmake may come from there
build=build/sanitize
available='from sparsetrain._native import info; print(*info()["isas_available"], sep=";")'
isas=$(python -c "$available" || true)  # all, where sparsetrain is not installed
cmake -S . -B "$build" -DSPARSETRAIN_BUILD_EXTENSION=OFF -DSPARSETRAIN_BUILD_TESTS=ON \
  "-DSPARSETRAIN_SANITIZE=address;undefined" "-DSPARSETRAIN_ONLY_ISAS=$isas" > /dev/null
cmake --build "$build" --target kernels_test --parallel 2
UBSAN_OPTIONS=print_stacktrace=1 "$build/kernels_test" --quick
