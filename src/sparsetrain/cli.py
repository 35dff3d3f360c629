"""The `sparsetrain` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
except ImportError as error:  # pragma: no cover - depends on the installation
    raise SystemExit(
        "the sparsetrain command needs extra packages: pip install 'sparsetrain[cli]'"
    ) from error

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train PyTorch models with sparse weights on CPUs, on the nonzeros alone.",
)
train = typer.Typer(no_args_is_help=True, help="Complete training recipes.")
app.add_typer(train, name="train")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]

TEXT_HELP = """
Fine-tune a pruned transformer encoder on text classification, sparse (and dense beside it).

Examples:

[bold]sparsetrain train text --model MiniLM --data bbc --out runs/bbc --compare[/bold]

[bold]sparsetrain train text --model MiniLM --data reviews.csv --out runs/r --sparsity 0.95 \
--epochs 3[/bold]

[bold]sparsetrain train text --model MiniLM --data bbc --out runs/bbc --compare --resume[/bold]
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
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, model, report and plot.")],
    sparsity: Annotated[float, typer.Option(help="Share of weights removed, in [0, 1).")] = 0.9,
    distribution: Annotated[
        str,
        typer.Option(
            help="uniform: every layer alike; erk: small layers denser; global: ranked together."
        ),
    ] = "uniform",
    steps: Annotated[int, typer.Option(help="Fine-tuning steps after pruning.")] = 150,
    epochs: Annotated[
        float | None, typer.Option(help="Fine-tuning epochs, instead of --steps.")
    ] = None,
    prune_steps: Annotated[
        int, typer.Option(help="Steps of gradual pruning before it; 0 prunes at once.")
    ] = 100,
    batch: Annotated[int, typer.Option(help="Documents per step.")] = 16,
    seq_length: Annotated[int, typer.Option(help="Tokens per document, cut or padded.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate (AdamW).")] = 4e-4,
    weight_decay: Annotated[float, typer.Option(help="Weight decay (AdamW).")] = 0.01,
    dropout: Annotated[float, typer.Option(help="Every dropout rate of the encoder.")] = 0.0,
    test_fraction: Annotated[float, typer.Option(help="Share of documents to test on.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Seeds the split, the batches and the dropout.")] = 0,
    evaluate_every: Annotated[int, typer.Option(help="Steps between two evaluations.")] = 50,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 50,
    train_embeddings: Annotated[
        bool, typer.Option("--train-embeddings", help="Train the word embeddings as well.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train the dense, masked twin beside it.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in --out, if any.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in --out.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="Threads (default: what PyTorch chooses).")
    ] = None,
    title: Annotated[
        str, typer.Option(help="Title of table and plot (default: the model folder).")
    ] = "",
    as_json: Json = False,
) -> None:
    """Run the text recipe (its help is TEXT_HELP)."""
    values = {name: value for name, value in locals().items() if name != "as_json"}
    _need("rich", "matplotlib", "safetensors", "transformers")
    from sparsetrain.recipes import report, text
    from sparsetrain.recipes.errors import InputError
    from sparsetrain.recipes.progress import Progress

    try:
        result = text.run(text.TextOptions(**values), Progress())
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
