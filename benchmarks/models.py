"""Whole training steps against dense and SparseProp: `sparsetrain bench models` as a script.

python benchmarks/models.py [--help]
"""

import sys

from sparsetrain._cli_bench import bench

if __name__ == "__main__":
    bench(["models", *sys.argv[1:]], prog_name="benchmarks/models.py")
