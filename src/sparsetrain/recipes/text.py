"""Fine-tune a transformer encoder, pruned, on a text classification set.

A classifier of one linear layer sits on the mean of the encoder's last hidden states. The word
embeddings stay frozen unless asked otherwise. All linear layers of the encoder are pruned with
gradual magnitude pruning, made sparse, and trained on their nonzeros alone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsetrain.recipes.engine import Batch
from sparsetrain.recipes.errors import InputError
from sparsetrain.recipes.launch import Recipe, launch, resolve_steps, save_json, save_weights
from sparsetrain.recipes.options import RunOptions
from sparsetrain.recipes.progress import Progress
from sparsetrain.recipes.text_data import Corpus, read_corpus, stratified_split


@dataclass(frozen=True, kw_only=True)
class TextOptions(RunOptions):
    """Options of `sparsetrain train text`; the command line's help describes each."""

    model: Path
    seq_length: int = 128
    dropout: float = 0.0
    train_embeddings: bool = False

    shares: ClassVar[tuple[str, ...]] = ("sparsity", "dropout")
    counts: ClassVar[tuple[str, ...]] = (*RunOptions.counts, "seq_length")

    def check(self) -> None:
        """Raise InputError, naming the option, if a value is out of range."""
        super().check()
        if not (self.model / "config.json").is_file():
            raise InputError(
                f"model: {self.model} is not a model folder (no config.json in it); "
                "give a folder written by save_pretrained"
            )


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

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
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


def run(options: TextOptions, progress: Progress) -> dict[str, Any]:
    """Run the whole recipe; returns the report, which is also in `out`/report.json.

    Raises InputError before anything is written if an option, the data or the model is no good.
    """
    options.check()
    corpus = read_corpus(options.data)
    tokenizer = load_tokenizer(options)
    task = make_task(options, corpus, tokenizer)
    options = resolve_steps(options, task.train_size)

    def build() -> nn.Module:
        return build_model(options, len(corpus.classes))

    def save(folder: Path, model: nn.Module) -> None:
        tokenizer.save_pretrained(folder)
        encoder: Any = model.encoder
        encoder.config.save_pretrained(folder)
        save_json(corpus.classes, folder / "classes.json")
        save_weights(model, folder / "model.safetensors")

    documents = len(corpus.texts)
    recipe = Recipe(
        options,
        task,
        build,
        encoder_layers,
        optimizer="adamw",
        trained=True,
        identity={"data contents": corpus.fingerprint()},
        facts=_facts(corpus, task),
        name=options.model.name,
        summary=f"{documents} documents in {len(corpus.classes)} classes ({corpus.duplicates} "
        f"exact duplicates dropped), {task.train_size} to train on, "
        f"{documents - task.train_size} to test on",
        save=save,
    )
    return launch(recipe, progress)


def _facts(corpus: Corpus, task: TextTask) -> dict[str, Any]:
    return {
        "classes": corpus.classes,
        "documents": len(corpus.texts),
        "duplicates_dropped": corpus.duplicates,
        "conflicts_dropped": corpus.conflicts,
        "train_documents": task.train_size,
    }
