"""Linear layers against dense and other libraries: `sparsetrain bench layers --set linear` as a
script.

python benchmarks/linear.py [--help]
"""

import sys

from sparsetrain._cli_bench import bench

if __name__ == "__main__":
    bench(["layers", "--set", "linear", *sys.argv[1:]], prog_name="benchmarks/linear.py")
