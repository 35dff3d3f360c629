"""A narrow ResNet-18 on Fashion-MNIST, pruned to 90 % while it trains: sparse beside dense.

Both start from the same weights and see the same batches equally long; the dense twin is never
pruned. The data is the Debian package dataset-fashion-mnist, unpacked without root if it is not
installed. Further arguments are handed on to `sparsetrain train image`:

    python examples/fashion_resnet.py --out runs/fashion
"""

from __future__ import annotations

import sys

from _data import fashion_mnist

from sparsetrain.cli import app

if __name__ == "__main__":
    given = sys.argv[1:]
    data = [] if any(word.split("=")[0] == "--data" for word in given) else [str(fashion_mnist())]
    defaults = [word for folder in data for word in ("--data", folder)]
    defaults += ["--network", "resnet18", "--width", "16", "--batch", "64", "--epochs", "2"]
    defaults += ["--compare", "--evaluate-every", "469", "--checkpoint-every", "100"]
    defaults += ["--schedule", "cubic:every=25,start=94,stop=1124"]  # 5 % to 60 % of the steps
    app(["train", "image", *defaults, "--title", "ResNet-18 (width 16), Fashion-MNIST", *given])
