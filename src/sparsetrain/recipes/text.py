"""Fine-tune a transformer encoder, pruned, on a text classification set.

A classifier of one linear layer sits on the mean of the encoder's last hidden states. The word
embeddings stay frozen unless asked otherwise. All linear layers of the encoder are pruned with
gradual magnitude pruning, made sparse, and trained on their nonzeros alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.recipes.checkpoint import write_atomically
from sparsetrain.recipes.engine import Batch, Lane, Schedule
from sparsetrain.recipes.errors import InputError
from sparsetrain.recipes.progress import Progress
from sparsetrain.recipes.pruning import RATE
from sparsetrain.recipes.report import build_report, write_json, write_plot
from sparsetrain.recipes.session import CHECKPOINT, Session, Settings
from sparsetrain.recipes.text_data import Corpus, read_corpus, stratified_split

DISTRIBUTIONS = ("uniform", "erk", "global")
RESULTS = ("report.json", "accuracy.png", "model")


@dataclass(frozen=True)
class TextOptions:
    """Options of `sparsetrain train text`; the command line's help describes each."""

    model: Path
    data: Path
    out: Path
    sparsity: float = 0.9
    distribution: str = "uniform"
    steps: int = 150
    epochs: float | None = None
    prune_steps: int = 100
    batch: int = 16
    seq_length: int = 128
    lr: float = 4e-4
    weight_decay: float = 0.01
    dropout: float = 0.0
    test_fraction: float = 0.25
    seed: int = 0
    evaluate_every: int = 50
    checkpoint_every: int = 50
    train_embeddings: bool = False
    compare: bool = False
    resume: bool = False
    overwrite: bool = False
    threads: int | None = None
    title: str = ""

    def check(self) -> None:
        """Raise InputError, naming the option, if a value is out of range."""
        self._check_numbers()
        if self.distribution not in DISTRIBUTIONS:
            raise InputError(
                f"distribution: got {self.distribution!r}, expected {' or '.join(DISTRIBUTIONS)}"
            )
        if not (self.model / "config.json").is_file():
            raise InputError(
                f"model: {self.model} is not a model folder (no config.json in it); "
                "give a folder written by save_pretrained"
            )
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"out: {self.out} is a file, expected a folder")
        taken = [name for name in (CHECKPOINT, *RESULTS) if (self.out / name).exists()]
        if taken and not (self.resume or self.overwrite):
            raise InputError(
                f"out: {self.out} holds an earlier run ({taken[0]}); pass --resume to continue it, "
                "--overwrite to start again, or choose another folder"
            )

    def _check_numbers(self) -> None:
        for name in ("sparsity", "dropout"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise InputError(f"{name}: got {value}, expected a number in [0, 1)")
        if not 0.0 < self.test_fraction < 1.0:
            raise InputError(f"test-fraction: got {self.test_fraction}, expected one in (0, 1)")
        for name in ("steps", "batch", "seq_length", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise InputError(f"{option}: got {getattr(self, name)}, expected at least 1")
        if self.prune_steps < 0 or self.seed < 0:
            raise InputError(
                f"prune-steps, seed: got {self.prune_steps}, {self.seed}, expected at least 0"
            )
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads: got {self.threads}, expected at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr: got {self.lr}, expected a positive number")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight-decay: got {self.weight_decay}, expected at least 0")
        if self.epochs is not None and not (math.isfinite(self.epochs) and self.epochs > 0):
            raise InputError(f"epochs: got {self.epochs}, expected a positive number")


class TextClassifier(nn.Module):
    """Encoder, mean over the tokens, one linear layer: (batch, length) ids -> (batch, classes)."""

    def __init__(self, encoder: nn.Module, hidden: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (batch, length) -> logits (batch, classes)."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        hidden = output.last_hidden_state
        kept = attention_mask[:, :, None].to(hidden.dtype)
        logits: Tensor = self.head((hidden * kept).sum(1) / kept.sum(1).clamp(min=1.0))
        return logits


def encoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the encoder, by name: all but the classifier."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.")
    }


class TextTask:
    """Token ids of all documents, padded to one length, split into training and test."""

    def __init__(
        self, ids: Tensor, mask: Tensor, labels: Tensor, train: list[int], test: list[int]
    ) -> None:
        """ids, mask (documents, length); labels (documents,); train, test: document numbers."""
        self._ids, self._mask, self._labels = ids, mask, labels
        self._train, self._test = torch.tensor(train), torch.tensor(test)

    @property
    def train_size(self) -> int:
        """Number of training documents."""
        return self._train.numel()

    def _take(self, documents: Tensor) -> Batch:
        inputs = {"input_ids": self._ids[documents], "attention_mask": self._mask[documents]}
        return inputs, self._labels[documents]

    def batch(self, indices: Tensor) -> Batch:
        """Training documents `indices`, as inputs and labels."""
        return self._take(self._train[indices])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy."""
        inputs, labels = batch
        return nn.functional.cross_entropy(model(**inputs), labels)

    def evaluate(self, model: nn.Module) -> float:
        """Share of test documents classified right."""
        right = 0
        for documents in torch.split(self._test, 64):
            inputs, labels = self._take(documents)
            right += int((model(**inputs).argmax(1) == labels).sum())
        return right / self._test.numel()


def _transformers() -> Any:
    """The transformers package: optional, slow to import, without complete types."""
    module: Any = importlib.import_module("transformers")
    module.logging.set_verbosity_error()
    return module


def load_tokenizer(options: TextOptions) -> Any:
    """The model folder's tokenizer; never asks the network."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with _named_model_errors(options.model):
        transformers = _transformers()
        return transformers.AutoTokenizer.from_pretrained(options.model, local_files_only=True)


def build_model(options: TextOptions, classes: int) -> nn.Module:
    """The dense classifier, the same for the same options: head seeded, embeddings frozen."""
    with _named_model_errors(options.model):
        transformers = _transformers()
        config = transformers.AutoConfig.from_pretrained(options.model, local_files_only=True)
        longest = getattr(config, "max_position_embeddings", options.seq_length)
        if options.seq_length > longest:
            raise InputError(
                f"seq-length: got {options.seq_length}, the model takes at most {longest}"
            )
        for name in vars(config):
            if name.endswith(("dropout_prob", "dropout")) and getattr(config, name) is not None:
                setattr(config, name, options.dropout)
        torch.manual_seed(options.seed)
        encoder = transformers.AutoModel.from_pretrained(
            options.model, config=config, local_files_only=True
        ).float()
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    torch.manual_seed(options.seed)
    model = TextClassifier(encoder, config.hidden_size, classes)
    if not options.train_embeddings:
        encoder.get_input_embeddings().weight.requires_grad_(False)
    if not encoder_layers(model):
        raise InputError(f"model: {options.model} has no torch.nn.Linear layer to make sparse")
    return model


@contextlib.contextmanager
def _named_model_errors(folder: Path) -> Iterator[None]:
    """Turn whatever transformers raises on a broken folder into one line."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"{error.name or 'transformers'} is not installed; pip install 'sparsetrain[recipes]'"
        ) from error
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            f"model: cannot load {folder}: {type(error).__name__}: {lines[0]}"
        ) from error


def make_task(options: TextOptions, corpus: Corpus, tokenizer: Any) -> TextTask:
    """Encode all documents, cut or padded to `seq_length` tokens, and split them."""
    train, test = stratified_split(corpus.labels, options.test_fraction, options.seed)
    encoded = tokenizer(
        corpus.texts,
        truncation=True,
        padding="max_length",
        max_length=options.seq_length,
        return_tensors="pt",
    )
    labels = torch.tensor(corpus.labels)
    return TextTask(encoded["input_ids"], encoded["attention_mask"], labels, train, test)


def resolve_steps(options: TextOptions, train_size: int) -> TextOptions:
    """Batch no larger than the training set; `epochs`, if given, turned into steps."""
    batch = min(options.batch, train_size)
    steps = options.steps
    if options.epochs is not None:
        steps = max(1, round(options.epochs * (train_size // batch)))
    return dataclasses.replace(options, batch=batch, steps=steps, epochs=None)


def _settings(options: TextOptions) -> Settings:
    tune = Schedule(
        options.steps, options.batch, options.lr, options.weight_decay, seed=2 * options.seed + 1
    )
    prune = dataclasses.replace(
        tune, steps=options.prune_steps, lr=RATE * tune.lr, seed=2 * options.seed, decay=False
    )
    return Settings(
        prune=prune,
        tune=tune,
        sparsity=options.sparsity,
        distribution=options.distribution,
        compare=options.compare,
        evaluate_every=options.evaluate_every,
        checkpoint_every=options.checkpoint_every,
    )


def _identity(options: TextOptions, corpus: Corpus) -> dict[str, Any]:
    """What must not change between an interrupted run and its continuation."""
    free = {"resume", "overwrite", "out", "threads", "title", "data", "checkpoint_every"}
    values = {k: v for k, v in dataclasses.asdict(options).items() if k not in free}
    model = str(options.model.resolve())
    return {**values, "model": model, "data contents": corpus.fingerprint()}


def run(options: TextOptions, progress: Progress) -> dict[str, Any]:
    """Run the whole recipe; returns the report, which is also in `out`/report.json.

    Raises InputError before anything is written if an option, the data or the model is no good.
    """
    options.check()
    corpus = read_corpus(options.data)
    tokenizer = load_tokenizer(options)
    task = make_task(options, corpus, tokenizer)
    options = resolve_steps(options, task.train_size)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    names = list(encoder_layers(build_model(options, len(corpus.classes))))
    session = Session(
        task,
        lambda: build_model(options, len(corpus.classes)),
        encoder_layers,
        _settings(options),
        _identity(options, corpus),
        options.out,
    )
    if options.resume:
        session.check_resume()
    _make_folder(options.out)
    if options.overwrite:
        _remove_earlier(options.out)
    documents = len(corpus.texts)
    progress.say(
        f"{documents} documents in {len(corpus.classes)} classes ({corpus.duplicates} exact "
        f"duplicates dropped), {task.train_size} to train on, {documents - task.train_size} to "
        f"test on; {len(names)} linear layers to {100 * options.sparsity:g} % sparsity"
    )
    with progress:
        lanes = session.run(options.resume, progress)
    return _write_results(options, corpus, tokenizer, task, lanes, names)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: cannot make {out}: {error.strerror or error}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(f"out: {out} is not writable")


def _remove_earlier(out: Path) -> None:
    for name in (CHECKPOINT, *RESULTS):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _write_results(
    options: TextOptions,
    corpus: Corpus,
    tokenizer: Any,
    task: TextTask,
    lanes: list[Lane],
    names: list[str],
) -> dict[str, Any]:
    title = f"{options.title or options.model.name}, {100 * options.sparsity:g} % sparse"
    run_facts = {
        **{k: v for k, v in dataclasses.asdict(options).items() if k != "title"},
        "title": title,
        "classes": corpus.classes,
        "documents": len(corpus.texts),
        "duplicates_dropped": corpus.duplicates,
        "conflicts_dropped": corpus.conflicts,
        "train_documents": task.train_size,
    }
    report = build_report(lanes, names, run_facts)
    _save_model(options.out / "model", lanes[0].model, tokenizer, corpus.classes)
    write_plot(report, options.out / "accuracy.png")
    write_json(report, options.out / "report.json")
    return report


def _save_model(folder: Path, model: nn.Module, tokenizer: Any, classes: list[str]) -> None:
    """The sparse classifier: weights (values and topology), config, tokenizer, class names."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    encoder: Any = model.encoder
    encoder.config.save_pretrained(folder)
    labels = json.dumps(classes) + "\n"
    write_atomically(folder / "classes.json", lambda file: file.write_text(labels, "utf-8"))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda file: save_file(state, file))
