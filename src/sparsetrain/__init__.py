"""Sparse layers and sparse training for PyTorch on CPUs."""

from importlib import metadata as _metadata

from sparsetrain import nn
from sparsetrain.conv_ops import sparse_conv
from sparsetrain.memory import empty_cache, keep_memory
from sparsetrain.nn._state import load_state_dict
from sparsetrain.nn.conv1d import to_conv1d, to_linear
from sparsetrain.nn.convert import sparsify, to_dense, to_sparse
from sparsetrain.ops import sparse_linear
from sparsetrain.pattern import SparsePattern
from sparsetrain.sparsify import schedules, scores
from sparsetrain.sparsify.algorithms import ACDC, GMP, MEST, SET, RigL, Static, TopKAST
from sparsetrain.sparsify.base import Sparsifier
from sparsetrain.tune import Plans, load_plans, tune

try:
    __version__ = _metadata.version("sparsetrain")
except _metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "ACDC",
    "GMP",
    "MEST",
    "SET",
    "Plans",
    "RigL",
    "SparsePattern",
    "Sparsifier",
    "Static",
    "TopKAST",
    "__version__",
    "empty_cache",
    "keep_memory",
    "load_plans",
    "load_state_dict",
    "nn",
    "schedules",
    "scores",
    "sparse_conv",
    "sparse_linear",
    "sparsify",
    "to_conv1d",
    "to_dense",
    "to_linear",
    "to_sparse",
    "tune",
]
