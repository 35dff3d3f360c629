#!/usr/bin/env bash
# kernels_test with the address and undefined-behaviour sanitizers.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"  # cmake may come from there
build=build/sanitize
cmake -S . -B "$build" -DSPARSETRAIN_BUILD_EXTENSION=OFF -DSPARSETRAIN_BUILD_TESTS=ON \
  "-DSPARSETRAIN_SANITIZE=address;undefined" > /dev/null
cmake --build "$build" --target kernels_test --parallel 2
UBSAN_OPTIONS=print_stacktrace=1 "$build/kernels_test" --quick
