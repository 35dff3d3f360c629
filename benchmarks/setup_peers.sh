#!/usr/bin/env bash
# Makes the virtual environment in which this library is measured beside others:
#   benchmarks/setup_peers.sh [FOLDER]        (default: build/peers-venv)
#   build/peers-venv/bin/python benchmarks/linear.py --peers
# PYTHON chooses the interpreter, TORCH the torch requirement. Run again to refresh sparsetrain.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$root/build/peers-venv}
python=${PYTHON:-python3}
torch=${TORCH:-torch==2.13.0}

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# torch first and alone: both builds below compile against the installed one.
pip install "$torch"
pip install setuptools wheel pybind11 scipy numpy \
  "scikit-build-core>=1.1,<2" "cmake>=3.25" ninja
# sparseprop's setup.py imports torch and pybind11: no isolated build.
pip install --no-build-isolation -r "$root/benchmarks/requirements-peers.txt"
pip install --no-build-isolation --no-deps --force-reinstall "$root"
pip install --no-build-isolation "$root[recipes]" # what the command line and the models need

cd /  # import what was installed, not the source tree
"$folder/bin/python" - <<'PYTHON'
import importlib.metadata
import sparselab, sparseprop.modules, sparsetrain  # noqa: F401
for name in ("torch", "sparsetrain", "sparseprop", "sparselab"):
    print(name, importlib.metadata.version(name))
PYTHON
echo "ready: $folder/bin/python benchmarks/linear.py --peers"
