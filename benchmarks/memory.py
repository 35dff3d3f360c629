"""Memory of sparse layers in training: `sparsetrain bench memory` as a script.

python benchmarks/memory.py [--help]
"""

import sys

from sparsetrain._cli_bench import bench

if __name__ == "__main__":
    bench(["memory", *sys.argv[1:]], prog_name="benchmarks/memory.py")
