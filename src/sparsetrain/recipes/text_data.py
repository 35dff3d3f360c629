"""Reading a text classification set: a folder of .txt files per class, or a CSV file."""

from __future__ import annotations

import csv
import hashlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsetrain.recipes.errors import InputError

CSV_COLUMNS = ("text", "label")


@dataclass(frozen=True)
class Corpus:
    """Documents and their classes, duplicates already dropped.

    texts: one string per document; labels: index into `classes` per document; duplicates: how many
    exact copies were dropped; conflicts: how many documents were dropped because the same text
    stands under two classes.
    """

    texts: list[str]
    labels: list[int]
    classes: list[str]
    duplicates: int
    conflicts: int

    def fingerprint(self) -> str:
        """Hash of texts and labels: a resumed run must see the data that it started with."""
        digest = hashlib.sha256()
        for text, label in zip(self.texts, self.labels, strict=True):
            digest.update(f"{label}:{len(text)}:".encode())
            digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def read_corpus(path: Path) -> Corpus:
    """Read `path`, a folder of class folders of .txt files or a CSV with columns text, label.

    Raises InputError, naming the file or the line, for anything that cannot be used: a missing or
    unreadable path, an empty document, fewer than two classes, a class with fewer than two
    different documents (one has to go into each side of the split).
    """
    if not path.exists():
        raise InputError(f"data: {path} does not exist; give a folder of class folders or a CSV")
    rows = list(_read_folder(path) if path.is_dir() else _read_csv(path))
    first: dict[str, str] = {}
    conflicting: set[str] = set()
    for text, label in rows:
        if first.setdefault(text, label) != label:
            conflicting.add(text)
    kept = [(text, label) for text, label in first.items() if text not in conflicting]
    conflicts = sum(text in conflicting for text, _ in rows)
    counts = Counter(label for _, label in kept)
    classes = sorted({label for _, label in rows})
    if len(classes) < 2:
        raise InputError(f"data: {path} has one class ({classes[0]!r}); training needs at least 2")
    for name in classes:
        if counts[name] < 2:
            raise InputError(
                f"data: class {name!r} in {path} has {counts[name]} different document(s); "
                "at least 2 are needed, one to train on and one to test on"
            )
    index = {name: i for i, name in enumerate(classes)}
    return Corpus(
        texts=[text for text, _ in kept],
        labels=[index[label] for _, label in kept],
        classes=classes,
        duplicates=len(rows) - len(kept) - conflicts,
        conflicts=conflicts,
    )


def stratified_split(
    labels: list[int], test_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of the training and of the test documents, `test_fraction` of every class.

    Each class has at least one document on either side. Both lists are sorted; the choice depends
    on `labels` and `seed` alone.
    """
    rng = random.Random(seed)
    test: list[int] = []
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        rng.shuffle(members)
        count = min(max(1, round(test_fraction * len(members))), len(members) - 1)
        test += members[:count]
    held_out = set(test)
    return [i for i in range(len(labels)) if i not in held_out], sorted(test)


def _decode(raw: bytes, name: str) -> str:
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            break
        return text
    raise InputError(f"data: {name} is not text (neither UTF-8 nor Windows-1252)")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"data: cannot read {path}: {error.strerror or error}") from error


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "_")))
    except OSError as error:
        raise InputError(f"data: cannot read {folder}: {error.strerror or error}") from error


def _read_folder(root: Path) -> Iterator[tuple[str, str]]:
    folders = [p for p in _listing(root) if p.is_dir()]
    if not folders:
        raise InputError(f"data: {root} has no class folders; expected {root}/<class>/*.txt")
    for folder in folders:
        files = [p for p in _listing(folder) if p.suffix == ".txt"]
        if not files:
            raise InputError(f"data: class folder {folder} has no .txt file")
        for file in files:
            text = _decode(_read_bytes(file), str(file)).strip()
            if not text:
                raise InputError(f"data: {file} is empty; remove it or fill it")
            yield text, folder.name


def _read_csv(path: Path) -> Iterator[tuple[str, str]]:
    content = _decode(_read_bytes(path), str(path))
    if not content.strip():
        raise InputError(f"data: {path} is empty; expected a CSV with columns text,label")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(content.splitlines(keepends=True), strict=True)
    try:
        names = reader.fieldnames or []
        missing = [name for name in CSV_COLUMNS if name not in names]
        if missing:
            raise InputError(
                f"data: {path} has no column {missing[0]!r}; its first line names {list(names)}, "
                "expected text,label"
            )
        empty = True
        for row in reader:
            text, label = ((row[name] or "").strip() for name in CSV_COLUMNS)
            if not text or not label or None in row:
                what = "too many fields" if None in row else "an empty text or label"
                raise InputError(f"data: {path}, line {reader.line_num}: {what}")
            empty = False
            yield text, label
    except csv.Error as error:
        raise InputError(f"data: {path}, line {reader.line_num}: {error}") from error
    if empty:
        raise InputError(f"data: {path} has a header and no rows")
