"""Writes docs/performance.md from benchmarks/results: `sparsetrain bench report` as a script.

python benchmarks/report.py [--help]
"""

import sys

from sparsetrain._cli_bench import bench

if __name__ == "__main__":
    bench(["report", *sys.argv[1:]], prog_name="benchmarks/report.py")
