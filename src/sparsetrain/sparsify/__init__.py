"""How to choose which weights stay: scores per weight, and nonzeros per layer."""

from sparsetrain.sparsify.criteria import CRITERIA, keep_top, magnitude, random
from sparsetrain.sparsify.distributions import DISTRIBUTIONS, erk, uniform

__all__ = ["CRITERIA", "DISTRIBUTIONS", "erk", "keep_top", "magnitude", "random", "uniform"]
