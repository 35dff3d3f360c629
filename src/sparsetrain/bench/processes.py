"""A process of its own for every thread count, and the files that results lie in."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from sparsetrain.bench.timing import Json

SHAPES = Path(__file__).resolve().parent / "shapes"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_child(module: str, request: Json, threads: int) -> Json:
    """`module.child(request, save)` in a new process, its thread count fixed before it starts.

    OpenMP reads OMP_NUM_THREADS once, when it is loaded. The child may `save` an unfinished result
    now and then: it counts when the user interrupts. Raises RuntimeError if the child failed; what
    it says on standard error is shown as it comes.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, result = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        env = dict(os.environ, **{name: str(threads) for name in _THREAD_VARIABLES})
        command = [
            sys.executable,
            "-m",
            "sparsetrain.bench.processes",
            module,
            str(asked),
            str(result),
        ]
        try:
            code = subprocess.run(command, env=env, check=False).returncode
        except KeyboardInterrupt:  # what is measured so far is kept
            code = 0
        if code != 0 or not result.exists():
            raise RuntimeError(
                f"the measuring process for {threads} thread(s) ended with exit code {code}"
            )
        return read_json(result)


def read_json(path: Path) -> Json:
    """A result file. Raises ValueError, with the file's name, where it is not one."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a JSON object, the result of `sparsetrain bench`")
    return loaded


def write_json(path: Path, data: Json) -> None:
    """Writes atomically: a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """As write_json, for any text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def load_toml(path: Path) -> Json:
    """A shapes file. Python 3.10 has no tomllib; there the `tomli` package is needed."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        shapes: Json = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--shapes {path}: not a readable TOML file: {error}") from error
    return shapes


# Variables of the environment that change what is measured: part of the command where set.
SETTINGS = (
    "SPARSETRAIN_ISA",
    "SPARSETRAIN_CACHE_MIB",
    "THP_MEM_ALLOC_ENABLE",
    "OMP_WAIT_POLICY",
)


def command_line() -> str:
    """This run's command, without the machine's folders."""
    settings = "".join(
        f"{name}={shlex.quote(os.environ[name])} " for name in SETTINGS if os.environ.get(name)
    )
    program = Path(sys.argv[0])
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    script = program.suffix == ".py" and program.name != "__main__.py"
    head = f"python benchmarks/{program.name}" if script else "sparsetrain"
    return f"{settings}{head} {shlex.join(words)}"


def both_commands(earlier: str, now: str) -> str:
    """The commands that one result file came from, one a line, none twice."""
    return "\n".join(dict.fromkeys([*earlier.split("\n"), now]))


def _end_with_parent() -> None:
    """On Linux: left behind by a killed parent, this process would slow what comes next."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _keep_memory() -> None:
    """For every contestant alike: they share the process."""
    import sparsetrain

    if not sparsetrain.keep_memory():
        raise RuntimeError("--keep-memory: this C library cannot be told to (glibc can)")


def main() -> None:
    """The child: python -m sparsetrain.bench.processes MODULE REQUEST RESULT.

    A request with "keep_memory" has it set before anything is measured.
    """
    _end_with_parent()
    module, asked, result = sys.argv[1:]
    child = importlib.import_module(module).child
    request = read_json(Path(asked))
    if request.get("keep_memory"):
        _keep_memory()

    def save(data: Json) -> None:
        write_json(Path(result), data)

    save(child(request, save))


if __name__ == "__main__":
    main()
