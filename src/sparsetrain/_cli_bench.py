"""`sparsetrain bench`: the commands of the benchmark suite, which is sparsetrain.bench."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure layers, models and memory against dense and other libraries, in turn.",
)

Threads = Annotated[
    str, typer.Option(help="Thread counts, with commas; each runs in a process of its own.")
]
Sparsity = Annotated[str, typer.Option(help="Only these sparsities, with commas: 0.8,0.95.")]
Shapes = Annotated[Path | None, typer.Option(help="TOML file with what to measure, and targets.")]
Set = Annotated[str, typer.Option("--set", help="Layers to measure: linear, conv or models.")]
LayerNames = Annotated[
    str,
    typer.Option(
        help="Only layers whose name has one of these parts, with commas (and no space behind "
        "them: that is a comma of a name)."
    ),
]
Peers = Annotated[
    bool, typer.Option("--peers", help="torch.sparse, sparseprop and sparselab beside it.")
]
Tuned = Annotated[bool, typer.Option("--tuned", help="The tuned layer or model beside it.")]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer layers, sparsities and rounds.")]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Seconds of timing per layer or model (all sparsities); for layers up to three times "
        "as much where noise would decide about a requirement, or it is missed."
    ),
]
Out = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the results into this PNG file.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep what the --json file holds; measure the rest.")
]
KeepMemory = Annotated[
    bool, typer.Option("--keep-memory", help="sparsetrain.keep_memory() before it, for all.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 if a floor is missed.")]

LAYERS_HELP = """
Time forward + backward of single layers, against dense and against other libraries.

Every contestant is compared with the masked dense layer in float64 before it is timed.

Examples:

[bold]sparsetrain bench layers --set conv --quick[/bold]

[bold]sparsetrain bench layers --set linear --peers --json linear.json --plot linear.png[/bold]

[bold]sparsetrain bench layers --set models --batches 32 --time-limit 500 --json models.json \
--resume[/bold]
"""
MODELS_HELP = """
Time whole training steps (forward, loss, backward, SGD) of networks, and profile them.

Examples:

[bold]sparsetrain bench models --models resnet18 --threads 1 --quick[/bold]

[bold]sparsetrain bench models --peers --json models.json --resume[/bold]
"""
MEMORY_HELP = """
Measure resident bytes per nonzero, what backward keeps, and the peak of a training step.

Examples:

[bold]sparsetrain bench memory --quick[/bold]

[bold]sparsetrain bench memory --peers --json memory.json[/bold]
"""
CEILINGS_HELP = """
Measure what this CPU gives at most: multiply-adds from registers, L1, L2, L3 and memory.

A sparse product loads once per multiply-add, so the L1 line is its roofline. With --sparsity,
--shapes or --layers, also what the kernels of those layers reach of it. Needs g++ (or CXX).

Examples:

[bold]sparsetrain bench ceilings --quick[/bold]

[bold]sparsetrain bench ceilings --threads 1,2,4 --json ceilings.json[/bold]

[bold]sparsetrain bench ceilings --set conv --layers 3x3 --sparsity 0.9[/bold]
"""
THREADS_HELP = """
Measure time on one thread over time on several, in turn in one process.

Examples:

[bold]sparsetrain bench threads --quick[/bold]

[bold]sparsetrain bench threads --set conv --layers 3x3 --sparsity 0.9,0.95 --peers[/bold]
"""
COMPARE_HELP = """
Compare two results of the same benchmark: speeds over dense, with their noise.

Exits with 1 where a layer became slower by more than the noise (at least 3 %), or wrong.

Examples:

[bold]sparsetrain bench compare before.json after.json[/bold]

[bold]sparsetrain bench compare before.json after.json --json[/bold]
"""
REPORT_HELP = """
Write tables and plots of a folder of results: docs/performance.md, or one HTML page.

The part of the file between its two hand-written marks is kept.

Examples:

[bold]sparsetrain bench report[/bold]

[bold]sparsetrain bench report --results runs/bench --output runs/performance.md[/bold]

[bold]sparsetrain bench report --html performance.html[/bold]
"""


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def numbers(option: str, text: str, kind: type, low: float, high: float) -> tuple[Any, ...]:
    """`0.8,0.95` -> (0.8, 0.95); exits with 2 and a reason for anything else."""
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        try:
            value = kind(word)
        except ValueError:
            _fail(f"{option}: got {word!r}, takes numbers with commas between them")
        if not low <= value < high:
            _fail(f"{option}: got {word}, must be in [{low:g}, {high:g})")
        found.append(value)
    return tuple(found)


def parts_of_names(text: str) -> tuple[str, ...]:
    """`fc,3x3 64->64, 56x56` -> two parts: names of layers have commas, a space behind each."""
    return tuple(filter(None, (part.strip() for part in re.split(r",(?! )", text))))


def _finish(data: Any, report: str, strict: bool, wrong: list[str]) -> None:
    """Prints the report; exit code 1 where a result is wrong, or a floor missed with --strict."""
    typer.echo(report)
    for line in wrong:
        typer.echo(f"WRONG: {line}", err=True)
    missed = [v for v in data.get("verdicts", ()) if v["verdict"] == "MISSED"]
    if wrong or (strict and missed):
        raise typer.Exit(1)


def _run(function: Any, options: Any) -> Any:
    """Calls a benchmark; what the user got wrong becomes one line."""
    try:
        return function(options)
    except (ValueError, ImportError, RuntimeError) as error:
        _fail(str(error))


@bench.command("layers", help=LAYERS_HELP)
def layers(
    set_: Set = "linear",
    shapes: Shapes = None,
    layers: LayerNames = "",
    batches: Annotated[str, typer.Option(help="Only these batches, with commas.")] = "",
    sparsity: Sparsity = "",
    threads: Threads = "1,2",
    peers: Peers = False,
    tuned: Tuned = False,
    quick: Quick = False,
    budget: Budget = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Start no further layer after so many seconds.")
    ] = None,
    json_file: Out = None,
    plot: Plot = None,
    resume: Resume = False,
    keep_memory: KeepMemory = False,
    strict: Strict = False,
) -> None:
    """Time single layers (its help is LAYERS_HELP)."""
    from sparsetrain.bench import layers as benchmark
    from sparsetrain.bench.layer_tables import layer_report
    from sparsetrain.bench.verdicts import wrong_results

    options = benchmark.Options(
        set=set_,
        shapes=shapes,
        layers=parts_of_names(layers),
        batches=numbers("--batches", batches, int, 1, 1e9),
        sparsities=numbers("--sparsity", sparsity, float, 0, 1),
        threads=numbers("--threads", threads, int, 1, 1025),
        peers=peers,
        tuned=tuned,
        quick=quick,
        budget_s=budget,
        time_limit_s=time_limit,
        json=json_file,
        resume=resume,
        keep_memory=keep_memory,
    )
    data = _run(benchmark.run, options)
    if plot:
        from sparsetrain.bench.plots import plot_speedup  # matplotlib only where it is asked for

        plot_speedup(data, plot)
    _finish(data, layer_report(data), strict, wrong_results(data))


@bench.command("models", help=MODELS_HELP)
def models(
    models: Annotated[
        str, typer.Option(help="Only these: resnet18, resnet50, vgg16, minilm, bert.")
    ] = "",
    shapes: Shapes = None,
    sparsity: Sparsity = "",
    threads: Threads = "1,2",
    peers: Peers = False,
    tuned: Tuned = False,
    quick: Quick = False,
    budget: Budget = None,
    json_file: Out = None,
    resume: Resume = False,
    keep_memory: KeepMemory = False,
    strict: Strict = False,
) -> None:
    """Time whole training steps (its help is MODELS_HELP)."""
    from sparsetrain.bench import models as benchmark
    from sparsetrain.bench.model_tables import model_report
    from sparsetrain.bench.verdicts import wrong_results

    options = benchmark.Options(
        models=parts_of_names(models),
        shapes=shapes,
        sparsities=numbers("--sparsity", sparsity, float, 0.5, 1),
        threads=numbers("--threads", threads, int, 1, 1025),
        peers=peers,
        tuned=tuned,
        quick=quick,
        budget_s=budget,
        json=json_file,
        resume=resume,
        keep_memory=keep_memory,
    )
    data = _run(benchmark.run, options)
    _finish(data, model_report(data), strict, wrong_results(data))


@bench.command("memory", help=MEMORY_HELP)
def memory(
    shapes: Shapes = None,
    sparsity: Sparsity = "",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the measured processes.")] = 1,
    peers: Annotated[
        bool, typer.Option("--peers", help="Peaks of sparseprop and sparselab beside it.")
    ] = False,
    quick: Quick = False,
    json_file: Out = None,
) -> None:
    """Measure memory (its help is MEMORY_HELP)."""
    from sparsetrain.bench import memory as benchmark
    from sparsetrain.bench.memory_tables import memory_missed, memory_report

    wanted = numbers("--sparsity", sparsity, float, 0, 1)
    options = benchmark.Options(
        shapes=shapes,
        sparsities=wanted,
        threads=threads,
        peers=peers,
        quick=quick,
        json=json_file,
    )
    data = _run(benchmark.run, options)
    typer.echo(memory_report(data))
    if memory_missed(data):
        raise typer.Exit(1)


@bench.command("report", help=REPORT_HELP)
def report(
    results: Annotated[
        Path, typer.Option(help="Folder with linear.json, conv.json, models.json, ...")
    ] = Path("benchmarks/results"),
    output: Annotated[Path, typer.Option(help="The Markdown file to write.")] = Path(
        "docs/performance.md"
    ),
    html: Annotated[
        Path | None, typer.Option(help="Write one HTML file with everything in it, instead.")
    ] = None,
) -> None:
    """Write the report (its help is REPORT_HELP)."""
    from sparsetrain.bench import report as document

    write = document.write_page if html else document.write
    _run(lambda target: write(results, target), html or output)
    typer.echo(f"written: {html or output}")


@bench.command("ceilings", help=CEILINGS_HELP)
def ceilings(
    set_: Set = "linear",
    shapes: Shapes = None,
    layers: LayerNames = "",
    sparsity: Sparsity = "",
    threads: Threads = "1,2",
    peers: Annotated[
        bool, typer.Option("--peers", help="The dense library's product beside them.")
    ] = False,
    quick: Quick = False,
    json_file: Out = None,
) -> None:
    """Measure the ceilings (its help is CEILINGS_HELP)."""
    from sparsetrain.bench import machine_bench
    from sparsetrain.bench.layers import Options

    counts = numbers("--threads", threads, int, 1, 257)
    kernels = None
    if shapes or layers or sparsity:
        kernels = Options(
            set=set_,
            shapes=shapes,
            layers=parts_of_names(layers),
            sparsities=numbers("--sparsity", sparsity, float, 0, 1),
            threads=counts,
            quick=quick,
            kernels=True,
        )
    rounds = 5 if quick else 40
    data = _run(lambda _: machine_bench.run(counts, rounds, json_file, peers, kernels), None)
    typer.echo(machine_bench.ceilings_report(data))


@bench.command("threads", help=THREADS_HELP)
def threads_(
    set_: Set = "linear",
    shapes: Shapes = None,
    layers: LayerNames = "",
    sparsity: Sparsity = "0.9",
    threads: Threads = "2",
    peers: Peers = False,
    quick: Quick = False,
    budget: Budget = None,
    json_file: Out = None,
) -> None:
    """Measure the gain of threads (its help is THREADS_HELP)."""
    from sparsetrain.bench import layers as benchmark
    from sparsetrain.bench.layer_tables import scaling_report
    from sparsetrain.bench.verdicts import wrong_results

    options = benchmark.Options(
        set=set_,
        shapes=shapes,
        layers=parts_of_names(layers),
        sparsities=numbers("--sparsity", sparsity, float, 0, 1),
        threads=numbers("--threads", threads, int, 2, 1025),
        peers=peers,
        quick=quick,
        budget_s=budget,
        json=json_file,
        scaling_only=True,
    )
    data = _run(benchmark.run, options)
    _finish(data, scaling_report(data), False, wrong_results(data))


@bench.command("compare", help=COMPARE_HELP)
def compare(
    old: Annotated[Path, typer.Argument(help="Result of `bench layers` or `bench models`.")],
    new: Annotated[Path, typer.Argument(help="The same, measured later.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two results (its help is COMPARE_HELP)."""
    import json

    from sparsetrain.bench import compare as comparison
    from sparsetrain.bench.processes import read_json

    result = _run(lambda _: comparison.compare(read_json(old), read_json(new)), None)
    typer.echo(json.dumps(result) if as_json else comparison.compare_report(result))
    if comparison.regressed(result):
        raise typer.Exit(1)
