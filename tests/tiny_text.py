"""A tiny random BERT with a tiny tokenizer, and a tiny text set that it can learn."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = {
    "animals": ["cat", "dog", "cow", "hen", "fox", "owl", "bee", "ant"],
    "colours": ["red", "blue", "green", "pink", "grey", "black", "white", "brown"],
    "numbers": ["one", "two", "three", "four", "five", "six", "seven", "eight"],
}
COMMON = ["the", "a", "of", "in", "on", "and", "is", "with"]


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write config, weights and tokenizer of a two-layer BERT of width 32 into `folder`."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = special + COMMON + [word for words in WORDS.values() for word in words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) pairs, `count` different ones per class."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    for label, words in WORDS.items():
        before = len(rows)
        while len(rows) < before + count:
            text = " ".join(rng.choices(words, k=3) + rng.choices(COMMON, k=5))
            rows[text] = label
    return list(rows.items())


def save_tiny_texts(folder: Path, count: int = 20) -> Path:
    """Write `count` documents per class as folder/<class>/<number>.txt."""
    for number, (text, label) in enumerate(sentences(count)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number:03}.txt").write_text(text + "\n")
    return folder
