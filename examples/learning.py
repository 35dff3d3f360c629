"""How well each algorithm learns: ResNet-18 on Fashion-MNIST at 95 % sparsity, several seeds.

    python examples/learning.py train                 # all algorithms, three seeds; resumes
    python examples/learning.py train --algorithm RigL --seed 0
    python examples/learning.py cost                  # steps and bytes beside masks over dense
    python examples/learning.py report                # tables and plots of what there is

Every run is a process of its own, starts from the same dense initialisation (of its seed), sees the
same batches for equally many steps, and writes one JSON file under --out; a run that is there
already is skipped. Images are averaged over 2 x 2 pixels, which makes a run last about a minute on
one core. The run "masks" is Static without sparse storage, for comparison of time and memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from _data import fashion_mnist
from _learning import (
    RESULTS,
    CountsOption,
    Json,
    Setting,
    child_of,
    measure_cost,
    peak_of,
    time_steps,
    train,
)
from _learning_report import FASHION, OutOption, report
from torch import Tensor, nn

from sparsetrain.bench.memory import resident
from sparsetrain.bench.processes import write_json
from sparsetrain.recipes.image_data import read_images
from sparsetrain.recipes.image_models import build_network

KEPT_DENSE = ["conv1", "fc"]
RATE, BATCH = 0.1, 64

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)
WidthOption = Annotated[int, typer.Option(help="channels of the first stage")]
SparsityOption = Annotated[float, typer.Option(help="of the sparse layers together")]


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


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(a).argmax(1) == b).sum())
        for a, b in zip(x.split(500), y.split(500), strict=True)
    )
    model.train()
    return right / len(y)


def batches(x: Tensor, y: Tensor, seed: int) -> Callable[[nn.Module], Tensor]:
    """The loss of a model on one batch after the other, shuffled anew in each epoch."""
    order = torch.Generator().manual_seed(seed)
    left: list[Tensor] = []

    def loss(model: nn.Module) -> Tensor:
        if not left:
            whole = len(x) // BATCH * BATCH
            left.extend(torch.randperm(len(x), generator=order)[:whole].split(BATCH))
        batch = left.pop()
        return nn.functional.cross_entropy(model(x[batch]), y[batch])

    return loss


def run(name: str, seed: int, steps: int, width: int, sparsity: float, data: Path) -> Json:
    """One run from start to end."""
    images = Data(data)
    x, y = images.train
    setting = Setting(
        lambda: build_network("resnet18", 1, 10, width, x.shape[-1], seed),
        lambda model: torch.optim.SGD(
            model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
        ),
        KEPT_DENSE,
        sparsity,
        steps,
    )
    model, report = train(
        name,
        setting,
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, RATE, total_steps=steps, pct_start=0.15
        ),
        batches(x, y, seed),
    )
    return {**report, "seed": seed, "width": width, "test_accuracy": accuracy(model, *images.test)}


def cost_of(request: Json) -> Json:
    """Times or peaks of steps on random images, with Adam."""
    before = resident()
    shape = request["batch"], 1, request["size"], request["size"]
    x, y = torch.randn(shape), torch.randint(10, (shape[0],))
    setting = Setting(
        lambda: build_network("resnet18", 1, 10, request["width"], request["size"], 0),
        lambda model: torch.optim.Adam(model.parameters(), lr=1e-4),
        KEPT_DENSE,
        request["sparsity"],
        10_000,
    )

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    if request["task"] == "time":
        return time_steps(setting, loss, request["repeats"])
    return peak_of(request["name"], setting, loss, before, steps=4)


def child(request: Json, save: Callable[[Json], None]) -> Json:
    """What a process of its own does: one run, or one measurement."""
    if "task" in request:
        return cost_of(request)
    return run(**{**request, "data": Path(request["data"])})


@app.command("train")
def train_all(
    algorithm: Annotated[list[str] | None, typer.Option(help="which; default: all")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="which; default: 0, 1, 2")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps of each run")] = 800,
    width: WidthOption = 16,
    sparsity: SparsityOption = 0.95,
    threads: Annotated[int, typer.Option(help="of each run")] = 1,
    data: Annotated[Path | None, typer.Option(help="folder of the idx files")] = None,
    out: OutOption = RESULTS,
) -> None:
    """Train; runs that have a result file are skipped."""
    known = (*FASHION, "masks")
    for name in algorithm or ():
        if name not in known:
            raise typer.BadParameter(f"{name}: choose from {', '.join(known)}")
    folder = data or fashion_mnist()
    for one_seed in seed or (0, 1, 2):
        for name in algorithm or FASHION:
            file = out / f"fashion-{name}-{one_seed}.json"
            if file.exists():
                continue
            request = {"name": name, "seed": one_seed, "steps": steps, "width": width}
            request |= {"sparsity": sparsity, "data": str(folder.resolve())}
            result = child_of("learning", request, threads)
            write_json(file, result)
            print(f"{name} seed {one_seed}: {result['test_accuracy']:.4f}", flush=True)


@app.command()
def cost(
    width: WidthOption = 64,
    size: Annotated[int, typer.Option(help="pixels of an image's side")] = 28,
    batch: Annotated[int, typer.Option(help="images of a step")] = 64,
    repeats: Annotated[int, typer.Option(help="timed steps of each kind")] = 3,
    sparsity: SparsityOption = 0.95,
    threads: CountsOption = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory, too")] = True,
    out: OutOption = RESULTS,
) -> None:
    """Whole steps with Adam: dense, masks over dense, Static, RigL; times, state, peak memory."""
    request = {"network": "ResNet-18", "width": width, "size": size, "batch": batch}
    request |= {"sparsity": sparsity, "repeats": repeats}
    measure_cost("learning", request, threads, memory, out / f"cost-resnet-{width}-{size}.json")


app.command()(report)


if __name__ == "__main__":
    app()
