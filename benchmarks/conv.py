"""Convolutions of ResNet against dense and other libraries: `sparsetrain bench layers
--set conv` as a script.

python benchmarks/conv.py [--help]
"""

import sys

from sparsetrain._cli_bench import bench

if __name__ == "__main__":
    bench(["layers", "--set", "conv", *sys.argv[1:]], prog_name="benchmarks/conv.py")
