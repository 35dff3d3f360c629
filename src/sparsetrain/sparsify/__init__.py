"""How a model becomes and stays sparse, by four separate choices.

Which weights stay (criteria), how many each layer gets (distributions), when something changes and
how much (schedules), and what the change is (base, algorithms; public as `sparsetrain.RigL` etc.).
"""

from sparsetrain.sparsify import schedules
from sparsetrain.sparsify.criteria import CRITERIA, keep_top, magnitude, random
from sparsetrain.sparsify.distributions import DISTRIBUTIONS, erk, uniform

__all__ = [
    "CRITERIA",
    "DISTRIBUTIONS",
    "erk",
    "keep_top",
    "magnitude",
    "random",
    "schedules",
    "uniform",
]
