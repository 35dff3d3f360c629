"""The `sparsetrain` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
except ImportError as error:  # pragma: no cover - depends on the installation
    raise SystemExit(
        "the sparsetrain command needs extra packages: pip install 'sparsetrain[cli]'"
    ) from error

from sparsetrain._cli_bench import bench
from sparsetrain._cli_tune import HELP as TUNE_HELP
from sparsetrain._cli_tune import tune_command

if TYPE_CHECKING:
    from sparsetrain.recipes.progress import Progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train PyTorch models with sparse weights on CPUs, on the nonzeros alone.",
)
train = typer.Typer(no_args_is_help=True, help="Complete training recipes.")
app.add_typer(train, name="train")
app.add_typer(bench, name="bench")
app.command("tune", help=TUNE_HELP)(tune_command)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]

# Options that the training recipes share.
Out = Annotated[Path, typer.Option(help="Folder for checkpoint, model, report and plot.")]
Sparsity = Annotated[float, typer.Option(help="Share of weights removed, in [0, 1).")]
Distribution = Annotated[
    str,
    typer.Option(
        help="uniform: every layer alike; erk: small layers denser; global: ranked together."
    ),
]
ALGORITHM = (
    "static: prune first, then train what is left. gmp: start dense, prune while training. "
    "rigl, set, mest, topkast: exchange weights while training. acdc: dense and sparse in turn."
)
Algorithm = Annotated[str, typer.Option(help=ALGORITHM)]
TopologySchedule = Annotated[
    str,
    typer.Option(
        "--schedule",
        help="When the pattern changes (default: as published), for example "
        "cubic:every=25,start=90,stop=1100 or cosine:drop_fraction=0.3,every=100,stop=7500.",
    ),
]
PruneSteps = Annotated[
    int, typer.Option(help="static: steps of gradual pruning before it; 0 prunes at once.")
]
WeightDecay = Annotated[float, typer.Option(help="Weight decay.")]
TestFraction = Annotated[float, typer.Option(help="Share of the data to test on.")]
Seed = Annotated[int, typer.Option(help="Seeds the split, the batches and all that is random.")]
EvaluateEvery = Annotated[int, typer.Option(help="Steps between two evaluations.")]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between two checkpoints.")]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Train a dense twin beside it: masked alike for static, else never pruned.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the last checkpoint in --out, if any.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")]
Retime = Annotated[
    bool,
    typer.Option("--retime", help="Time steps of the finished run in --out again; train nothing."),
]
Threads = Annotated[int | None, typer.Option(help="Threads (default: what PyTorch chooses).")]
KeepMemory = Annotated[
    bool,
    typer.Option(help="Keep freed memory for the next step: faster, and 10-35 % more of it."),
]

TEXT_HELP = """
Fine-tune a pruned transformer encoder on text classification, sparse (and dense beside it).

Examples:

[bold]sparsetrain train text --model MiniLM --data bbc --out runs/bbc --compare[/bold]

[bold]sparsetrain train text --model MiniLM --data reviews.csv --out runs/r --sparsity 0.95 \
--epochs 3[/bold]

[bold]sparsetrain train text --model MiniLM --data bbc --out runs/bbc --compare --resume[/bold]
"""

IMAGE_HELP = """
Train a convolutional network on images, sparse (and dense beside it).

From scratch it starts dense and is pruned while it trains; with --model the weights are pruned
first (already sparse ones keep their zeros) and then fine-tuned.

Examples:

[bold]sparsetrain train image --data fashion-mnist --out runs/f --width 16 --epochs 2 \
--compare[/bold]

[bold]sparsetrain train image --data photos --size 64 --network vgg16 --model vgg16_bn.pth \
--sparsity 0.95 --out runs/photos[/bold]

[bold]sparsetrain train image --data photos --size 64 --out runs/photos --skip-bad \
--resume[/bold]
"""


INFO_HELP = """
Show the kernels in use, the CPU, caches, threads and versions.

Examples:

[bold]sparsetrain info[/bold]

[bold]SPARSETRAIN_ISA=avx2 sparsetrain info --json[/bold]
"""


def fail(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


@app.command(help=INFO_HELP)
def info(as_json: Json = False) -> None:
    """Print what a bug report needs (its help is INFO_HELP)."""
    try:
        from sparsetrain._native import info as native_info

        facts = native_info()
    except (ImportError, ValueError) as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<16}{_one_line(value)}")


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)


@train.command("text", help=TEXT_HELP)
def train_text(
    model: Annotated[Path, typer.Option(help="Model folder (config.json, weights, tokenizer).")],
    data: Annotated[
        Path,
        typer.Option(help="Folder with one folder of .txt files per class, or a CSV: text,label."),
    ],
    out: Out,
    sparsity: Sparsity = 0.9,
    distribution: Distribution = "uniform",
    algorithm: Algorithm = "static",
    schedule: TopologySchedule = "",
    steps: Annotated[int, typer.Option(help="Steps of training, after pruning.")] = 150,
    epochs: Annotated[float | None, typer.Option(help="Epochs, instead of --steps.")] = None,
    prune_steps: PruneSteps = 100,
    batch: Annotated[int, typer.Option(help="Documents per step.")] = 16,
    seq_length: Annotated[int, typer.Option(help="Tokens per document, cut or padded.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate (AdamW).")] = 4e-4,
    weight_decay: WeightDecay = 0.01,
    dropout: Annotated[float, typer.Option(help="Every dropout rate of the encoder.")] = 0.0,
    test_fraction: TestFraction = 0.25,
    seed: Seed = 0,
    evaluate_every: EvaluateEvery = 50,
    checkpoint_every: CheckpointEvery = 50,
    train_embeddings: Annotated[
        bool, typer.Option("--train-embeddings", help="Train the word embeddings as well.")
    ] = False,
    compare: Compare = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    retime: Retime = False,
    threads: Threads = None,
    keep_memory: KeepMemory = True,
    title: Annotated[
        str, typer.Option(help="Title of table and plot (default: the model folder).")
    ] = "",
    as_json: Json = False,
) -> None:
    """Run the text recipe (its help is TEXT_HELP)."""
    values = {name: value for name, value in locals().items() if name != "as_json"}
    _need("rich", "matplotlib", "safetensors", "transformers")
    from sparsetrain.recipes import text

    _run(lambda progress: text.run(text.TextOptions(**values), progress), out, as_json)


@train.command("image", help=IMAGE_HELP)
def train_image(
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with one folder of images per class, or with idx files (gz too)."
        ),
    ],
    out: Out,
    model: Annotated[
        Path | None, typer.Option(help="Weights to start from (a state_dict of torch.save).")
    ] = None,
    network: Annotated[
        str, typer.Option(help="resnet18, or vgg16: the VGG16-BN trunk with a linear classifier.")
    ] = "resnet18",
    width: Annotated[
        int | None,
        typer.Option(help="Channels of the first convolution (default: 64, or as in --model)."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Resize every image to so many pixels square.")
    ] = None,
    flip: Annotated[
        bool, typer.Option("--flip", help="Mirror training images left to right at random.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out files that cannot be decoded.")
    ] = False,
    sparsity: Sparsity = 0.9,
    distribution: Distribution = "uniform",
    algorithm: Annotated[
        str | None, typer.Option(help=f"{ALGORITHM} Default: gmp, with --model static.")
    ] = None,
    schedule: TopologySchedule = "",
    steps: Annotated[int, typer.Option(help="Steps of training, after pruning.")] = 150,
    epochs: Annotated[float | None, typer.Option(help="Epochs, instead of --steps.")] = None,
    prune_steps: PruneSteps = 100,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 64,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of SGD (default: 0.05, with --model 0.01)."),
    ] = None,
    weight_decay: WeightDecay = 5e-4,
    test_fraction: TestFraction = 0.25,
    seed: Seed = 0,
    evaluate_every: EvaluateEvery = 50,
    checkpoint_every: CheckpointEvery = 50,
    compare: Compare = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    retime: Retime = False,
    threads: Threads = None,
    keep_memory: KeepMemory = True,
    title: Annotated[
        str, typer.Option(help="Title of table and plot (default: the network).")
    ] = "",
    as_json: Json = False,
) -> None:
    """Run the image recipe (its help is IMAGE_HELP)."""
    values = {name: value for name, value in locals().items() if name != "as_json"}
    _need("rich", "matplotlib", "safetensors", "PIL")
    from sparsetrain.recipes import image

    _run(
        lambda progress: image.run(image.ImageOptions.with_defaults(**values), progress),
        out,
        as_json,
    )


def _run(recipe: Callable[[Progress], dict[str, Any]], out: Path, as_json: bool) -> None:
    """Run a recipe; print its report as a table, or as JSON."""
    from sparsetrain.recipes import report
    from sparsetrain.recipes.errors import InputError
    from sparsetrain.recipes.progress import Progress

    try:
        result = recipe(Progress())
    except InputError as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(result, default=str))
        return
    report.print_table(result)
    typer.echo(f"written to {out}: report.json, accuracy.png, model/")


def _need(*packages: str) -> None:
    """Name the extra to install when an optional package is missing."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        fail(f"{', '.join(missing)} not installed; run: pip install 'sparsetrain[recipes]'")


def main() -> None:
    """Entry point of the `sparsetrain` script."""
    app()


if __name__ == "__main__":
    main()
