"""Layers whose weights are sparse, and their conversion from and to dense ones."""

from sparsetrain.nn._base import SparseLayer
from sparsetrain.nn.conv import SparseConv1d, SparseConv2d, SparseConv3d
from sparsetrain.nn.conv1d import to_conv1d, to_linear
from sparsetrain.nn.convert import sparsify, to_dense, to_sparse
from sparsetrain.nn.linear import SparseLinear

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseLayer",
    "SparseLinear",
    "sparsify",
    "to_conv1d",
    "to_dense",
    "to_linear",
    "to_sparse",
]
