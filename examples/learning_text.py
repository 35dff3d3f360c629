"""How well a small GPT learns when it is sparse: characters of the King James Bible.

    apt-get install bible-kjv-text                    # the text; or --data FILE, any text
    python examples/learning_text.py train            # all runs; resumes
    python examples/learning_text.py train --run RigL-90
    python examples/learning_text.py cost             # steps and bytes beside masks over dense
    python examples/learning_text.py report           # tables and plots of what there is

The network is GPT-NeoX of `transformers`, built from a configuration: GPT-2's layers there are
modules of their own (Conv1D) rather than torch.nn.Linear. All linear layers but the last are made
sparse. The runs: dense; Static, RigL and GMP at 80 and 90 %; and "small-80", "small-90", dense
networks that are narrower and have as many parameters in all as the sparse ones. All see the same
batches for equally many steps; validation is on the last tenth of the text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _data import king_james
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
from _learning_report import TEXT, OutOption, report
from torch import Tensor, nn

from sparsetrain.bench.memory import resident
from sparsetrain.bench.processes import write_json

KEPT_DENSE = ["embed_out"]
HEADS, CONTEXT = 4, 128
BATCH, RATE = 8, 4e-3

app = typer.Typer(help=__doc__, add_completion=False, rich_markup_mode=None)
WidthOption = Annotated[int, typer.Option(help="of the network; a multiple of 8")]
LayersOption = Annotated[int, typer.Option(help="blocks of attention and MLP")]


class Corpus:
    """The text as indices into its alphabet; the last tenth is for validation."""

    def __init__(self, text: str) -> None:
        letters = sorted(set(text))
        index = {letter: place for place, letter in enumerate(letters)}
        every = torch.tensor([index[letter] for letter in text])
        self.letters = len(letters)
        self.train, self.held_out = every.split([len(every) * 9 // 10, -(-len(every) // 10)])

    def windows(self, count: int) -> Tensor:
        """(count, CONTEXT + 1), spread evenly over the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - CONTEXT - 1, count).long()
        return self.held_out[starts[:, None] + torch.arange(CONTEXT + 1)]


def network(letters: int, width: int, layers: int, inner: int = 0, seed: int = 0) -> nn.Module:
    """A GPT-NeoX for characters. inner: width inside of the MLPs; 0 for 4 * width."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=letters,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=inner or 4 * width,
        max_position_embeddings=CONTEXT,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: nn.Module = GPTNeoXForCausalLM(config)
    return model


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per character. windows: (batch, CONTEXT + 1)."""
    logits = model(windows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validation(model: nn.Module, windows: Tensor) -> float:
    model.eval()
    total = sum(float(loss_of(model, part)) * len(part) for part in windows.split(64))
    model.train()
    return total / len(windows)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)


def parameters(width: int, inner: int, layers: int, letters: int) -> int:
    """How many numbers a network learns (biases and layer norms included)."""
    attention = 4 * width * width + 4 * width
    mlp = 2 * width * inner + inner + width
    return layers * (attention + mlp + 4 * width) + 2 * width + 2 * letters * width


def kept(width: int, layers: int, letters: int, sparsity: float) -> int:
    """The same of the sparse network."""
    weights = layers * 12 * width * width
    return parameters(width, 4 * width, layers, letters) - round(weights * sparsity)


def smaller(width: int, layers: int, letters: int, sparsity: float) -> tuple[int, int]:
    """Width and inner width of the dense network with as many parameters as the sparse one.

    Of all widths that the heads divide, the one whose inner width is closest to 4 times it.
    """
    goal = kept(width, layers, letters, sparsity)
    found = []
    for narrow in range(2 * HEADS, width, 2 * HEADS):
        rest = goal - parameters(narrow, 0, layers, letters)
        inner = round(rest / (layers * (2 * narrow + 1)))
        if inner > 0:
            found.append((abs(inner / narrow - 4), narrow, inner))
    return min(found)[1:]


def setting_for(
    run: str, letters: int, width: int, layers: int, steps: int, seed: int
) -> tuple[str, Setting]:
    """The contestant's name and setting; run: NAME or NAME-PERCENT."""
    name, _, percent = run.partition("-")
    sparsity = int(percent or 90) / 100
    inner = 0
    if name == "small":
        name = "dense"
        width, inner = smaller(width, layers, letters, sparsity)

    def build() -> nn.Module:
        return network(letters, width, layers, inner, seed)

    return name, Setting(build, adam, KEPT_DENSE, sparsity, steps, rescale=True)


def train_one(run: str, text: str, width: int, layers: int, steps: int, seed: int) -> Json:
    """One run from start to end."""
    corpus = Corpus(text)
    name, setting = setting_for(run, corpus.letters, width, layers, steps, seed)
    order = torch.Generator().manual_seed(seed)
    few = corpus.windows(64)

    def loss(model: nn.Module) -> Tensor:
        starts = torch.randint(len(corpus.train) - CONTEXT, (BATCH, 1), generator=order)
        return loss_of(model, corpus.train[starts + torch.arange(CONTEXT + 1)])

    model, report = train(
        name,
        setting,
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
        ),
        loss,
        lambda model: validation(model, few),
    )
    config: Any = model.config
    facts = {"run": run, "seed": seed, "width": config.hidden_size, "layers": layers}
    facts["inner"] = config.intermediate_size
    facts["validation_loss"] = round(validation(model, corpus.windows(512)), 5)
    return {**report, **facts}


def cost_of(request: Json) -> Json:
    """Times or peaks of steps on random characters."""
    windows = torch.randint(request["letters"], (request["batch"], CONTEXT + 1))
    sizes = request["letters"], request["width"], request["layers"]
    _, setting = setting_for(f"Static-{request['percent']}", *sizes, 10_000, 0)

    def loss(model: nn.Module) -> Tensor:
        return loss_of(model, windows)

    if request["task"] == "time":
        return time_steps(setting, loss, request["repeats"])
    network(8, 8, 1)  # libraries, so that no contestant pays for them
    before = resident()
    return peak_of(request["name"], setting, loss, before, steps=4)


def child(request: Json, save: Callable[[Json], None]) -> Json:
    """What a process of its own does: one run, or one measurement."""
    if "task" in request:
        return cost_of(request)
    text = Path(request.pop("data")).read_text(encoding="utf-8")
    return train_one(text=text, **request)


@app.command("train")
def train_all(
    run: Annotated[list[str] | None, typer.Option(help="which; default: all")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps of each run")] = 500,
    width: WidthOption = 192,
    layers: LayersOption = 3,
    seed: Annotated[int, typer.Option(help="of initialisation and batches")] = 0,
    threads: Annotated[int, typer.Option(help="of each run")] = 1,
    data: Annotated[Path | None, typer.Option(help="a text file")] = None,
    out: OutOption = RESULTS,
) -> None:
    """Train; runs that have a result file are skipped."""
    known = (*TEXT, "masks-80", "masks-90")
    for name in run or ():
        if name not in known:
            raise typer.BadParameter(f"{name}: choose from {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        file = data or Path(folder) / "text"
        if data is None:
            file.write_text(king_james(), encoding="utf-8")
        for name in run or TEXT:
            result = out / f"text-{name}-{seed}.json"
            if result.exists():
                continue
            request = {"run": name, "data": str(file.resolve()), "width": width, "layers": layers}
            made = child_of("learning_text", {**request, "steps": steps, "seed": seed}, threads)
            write_json(result, made)
            print(f"{name}: validation loss {made['validation_loss']:.4f}", flush=True)


@app.command()
def cost(
    width: WidthOption = 192,
    layers: LayersOption = 3,
    batch: Annotated[int, typer.Option(help="windows of 128 characters in a step")] = 16,
    percent: Annotated[int, typer.Option(help="sparsity in per cent")] = 90,
    repeats: Annotated[int, typer.Option(help="timed steps of each kind")] = 8,
    threads: CountsOption = None,
    memory: Annotated[bool, typer.Option(help="measure peak memory, too")] = True,
    out: OutOption = RESULTS,
) -> None:
    """Whole steps with AdamW: dense, masks over dense, Static, RigL; times, state, peak memory."""
    request = {"network": "GPT-NeoX", "width": width, "layers": layers, "batch": batch}
    request |= {"percent": percent, "letters": 64, "repeats": repeats}
    measure_cost("learning_text", request, threads, memory, out / f"cost-gpt-{width}-{layers}.json")


app.command()(report)


if __name__ == "__main__":
    app()
