"""How well each algorithm learns: ResNet-18 on Fashion-MNIST at 95 % sparsity, several seeds.

    python examples/learning.py train                 # all algorithms, three seeds; resumes
    python examples/learning.py train --algorithm RigL --seed 0
    python examples/learning.py cost                  # steps and bytes beside masks over dense
    python examples/learning.py report                # the table and the plot of what there is

Every run starts from the same dense initialisation (of its seed), sees the same batches for equally
many steps, and writes one JSON file under --out; a run that is there already is skipped. Images are
averaged over 2 x 2 pixels, which makes a run last about a minute on one core.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _data import fashion_mnist
from torch import Tensor, nn

import sparsetrain
from sparsetrain.nn import SparseLayer
from sparsetrain.recipes.image_data import read_images
from sparsetrain.recipes.image_models import build_network

ALGORITHMS = ("dense", "Static", "SET", "RigL", "GMP", "ACDC", "TopKAST", "MEST")
OUT = Path(__file__).parent.parent / "benchmarks" / "results" / "learning"

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)
OutOption = Annotated[Path, typer.Option("--out", help="folder of the result files")]


class Data:
    """Fashion-MNIST in float32, centred: 60,000 images to learn from, 10,000 to test."""

    def __init__(self, folder: Path) -> None:
        found = read_images(folder)
        assert found.test is not None
        x = nn.functional.avg_pool2d(found.images.float() / 255.0, 2)
        test = torch.zeros(len(x), dtype=torch.bool)
        test[found.test] = True
        mean, spread = x[~test].mean(), x[~test].std()
        x = (x - mean) / spread
        self.train = x[~test], found.labels[~test]
        self.test = x[test], found.labels[test]


def network(width: int, size: int, seed: int) -> nn.Module:
    return build_network("resnet18", 1, 10, width, size, seed)


def sparsifier_for(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, sparsity: float, steps: int
) -> sparsetrain.Sparsifier | None:
    """The published settings; all layers but the first convolution and the classifier."""
    if name == "dense":
        return None
    made: sparsetrain.Sparsifier = getattr(sparsetrain, name)(
        model, optimizer, sparsity, distribution="erk", total_steps=steps, exclude=["conv1", "fc"]
    )
    return made


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(a).argmax(1) == b).sum())
        for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    model.train()
    return right / len(y)


def run(
    name: str, seed: int, data: Data, steps: int, width: int, sparsity: float
) -> dict[str, Any]:
    x, y = data.train
    model = network(width, x.shape[-1], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    sparsifier = sparsifier_for(name, model, optimizer, sparsity, steps)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.15)
    order = torch.Generator().manual_seed(seed)
    losses, start = [], time.perf_counter()
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = list(torch.randperm(len(x), generator=order)[: len(x) // 64 * 64].split(64))
        batch = batches.pop()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        rate.step()
        if sparsifier is not None:
            sparsifier.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    report: dict[str, Any] = {
        "algorithm": name,
        "seed": seed,
        "steps": steps,
        "width": width,
        "sparsity": sparsity,
        "seconds": round(time.perf_counter() - start, 2),
        "test_accuracy": accuracy(model, *data.test),
        "train_loss": statistics.fmean(losses[-50:]),
        "losses": [round(v, 4) for v in losses[::10]],
    }
    if sparsifier is not None:
        log = sparsifier.log()
        report |= {
            "final_sparsity": log["sparsity/total"],
            "updates": sparsifier.updates,
            "itop_rate": log["sparsity/itop_rate"],
            "overlap_with_start": log["sparsity/overlap_with_start"],
        }
    return report


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


@app.command()
def train(
    algorithm: Annotated[list[str] | None, typer.Option(help="which; default: all")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="which; default: 0, 1, 2")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps of each run")] = 1400,
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 16,
    sparsity: Annotated[float, typer.Option(help="of the sparse layers together")] = 0.95,
    data: Annotated[Path | None, typer.Option(help="folder of the idx files")] = None,
    out: OutOption = OUT,
) -> None:
    """Train; runs that have a result file are skipped."""
    for name in algorithm or ():
        if name not in ALGORITHMS:
            raise typer.BadParameter(f"{name}: choose from {', '.join(ALGORITHMS)}")
    images = Data(data or fashion_mnist())
    for one_seed in seed or (0, 1, 2):
        for name in algorithm or ALGORITHMS:
            file = out / f"fashion-{name}-{one_seed}.json"
            if file.exists():
                continue
            result = run(name, one_seed, images, steps, width, sparsity)
            write(file, result)
            print(f"{name} seed {one_seed}: {result['test_accuracy']:.4f}", flush=True)


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, masks: list[Tensor]) -> int:
    """Weights, gradients, optimizer state, topology and plans of the prunable layers' weights."""
    total = sum(mask.numel() * mask.element_size() for mask in masks)
    for name, module in model.named_modules():
        weight = module.values if isinstance(module, SparseLayer) else None
        if weight is None and isinstance(module, nn.Conv2d) and name != "conv1":
            weight = module.weight
        if weight is None:
            continue
        state = [v for v in optimizer.state[weight].values() if isinstance(v, Tensor)]
        total += sum(t.numel() * t.element_size() for t in (weight, weight.grad, *state))
        if isinstance(module, SparseLayer):
            pattern = module.pattern
            total += 4 * (pattern.nnz + len(pattern.crow_indices))
            total += torch.ops.sparsetrain.plan_bytes(pattern.key)
    return total


@app.command()
def cost(
    width: Annotated[int, typer.Option(help="channels of the first stage")] = 64,
    size: Annotated[int, typer.Option(help="pixels of an image's side")] = 28,
    batch: Annotated[int, typer.Option(help="images of a step")] = 64,
    repeats: Annotated[int, typer.Option(help="steps of each kind")] = 5,
    sparsity: Annotated[float, typer.Option(help="of the sparse layers together")] = 0.95,
    out: OutOption = OUT,
) -> None:
    """Time whole steps: Static and RigL here, masks over dense weights, and plain dense."""
    x, y = torch.randn(batch, 1, size, size), torch.randint(10, (batch,))
    names = ("dense", "masks over dense", "Static", "RigL update")
    lanes = {}
    for name in names:
        model = network(width, size, 0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        sparsifier, masks = None, {}
        if name == "masks over dense":
            twin = sparsetrain.sparsify(
                model, sparsity, distribution="erk", exclude=["conv1", "fc"]
            )
            for layer, module in twin.named_modules():
                if isinstance(module, SparseLayer):
                    weight = model.get_submodule(layer).weight
                    masks[weight] = module.pattern.to_mask().view(weight.shape).float()
        elif name != "dense":
            schedule = sparsetrain.schedules.Constant(0.3, every=1)
            kind = sparsetrain.RigL if name == "RigL update" else sparsetrain.Static
            sparsifier = kind(
                model,
                optimizer,
                sparsity,
                schedule=schedule if kind is sparsetrain.RigL else None,
                exclude=["conv1", "fc"],
            )
        lanes[name] = model, optimizer, sparsifier, masks, []
    sizes = {}
    for repeat in range(repeats + 1):
        for name, (model, optimizer, sparsifier, masks, times) in lanes.items():
            start = time.perf_counter()
            nn.functional.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for weight, mask in masks.items():
                    weight.grad.mul_(mask)
                optimizer.step()
                for weight, mask in masks.items():
                    weight.mul_(mask)
            if sparsifier is not None:
                sparsifier.step()
            if repeat:  # the first one warms up
                times.append(time.perf_counter() - start)
            if name != "RigL update":
                sizes[name] = state_bytes(model, optimizer, list(masks.values()))
            optimizer.zero_grad()
    medians = {name: statistics.median(lane[-1]) for name, lane in lanes.items()}
    extra = medians["RigL update"] - medians["Static"]
    report = {
        "network": f"ResNet-18, width {width}, {size}x{size}, batch {batch}, ERK {sparsity}",
        "threads": torch.get_num_threads(),
        "milliseconds": {name: round(1e3 * value, 1) for name, value in medians.items()},
        "steps_faster_than_masks": round(medians["masks over dense"] / medians["Static"], 2),
        "rigl_every_100_over_static": round(extra / 100 / medians["Static"], 4),
        "state_bytes": sizes,
        "state_share_of_dense": round(sizes["Static"] / sizes["dense"], 4),
    }
    write(out / f"cost-{width}-{size}.json", report)
    print(json.dumps(report, indent=1))


@app.command()
def report(out: OutOption = OUT) -> None:
    """Print the table of all results, as Markdown, and draw accuracy.png beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = []
    for name in ALGORITHMS:
        found = [json.loads(f.read_text()) for f in sorted(out.glob(f"fashion-{name}-*.json"))]
        if found:
            rows.append((name, [100 * r["test_accuracy"] for r in found], found[0]))
    print("| algorithm | seeds | test accuracy, mean (lowest to highest) | ever tried |")
    print("|---|---|---|---|")
    for name, scores, first in rows:
        tried = f"{first['itop_rate']:.0%}" if "itop_rate" in first else "100%"
        mean = statistics.fmean(scores)
        spread = f"{min(scores):.2f} to {max(scores):.2f}"
        print(f"| {name} | {len(scores)} | {mean:.2f} % ({spread}) | {tried} |")
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for place, (_, scores, _) in enumerate(rows):
        axes.bar(place, statistics.fmean(scores), color="tab:blue", alpha=0.6)
        axes.plot([place] * len(scores), scores, "k.")
    axes.set_xticks(range(len(rows)), [row[0] for row in rows])
    if rows:
        axes.set_ylim(min(min(r[1]) for r in rows) - 1, max(max(r[1]) for r in rows) + 1)
    axes.set_ylabel("test accuracy, %")
    figure.tight_layout()
    figure.savefig(out / "accuracy.png", dpi=120)


if __name__ == "__main__":
    app()
