"""Which family computes which product of a linear layer.

A pure function of plain numbers. It compares two estimates, each linear in what the work consists
of, whose coefficients were fitted to measurements. With B samples, I inputs, O outputs, N nonzeros,
L elements per vector, V = ceil(B / L) vectors of samples and T = ceil(V / 4) tiles:

    native     start + products N V + visits N T + sums R T + activations B (I + O) + gathered N
    dense      start + products I O B / L + weight I O + activations B (I + O)
               (a matrix by a vector: single I O for products and weight)
               and, unless every weight is a nonzero, panels + converted I O

R is O, or I for grad_input. Everything but the start and the panels is divided among the threads.
`gathered` is what a nonzero costs whatever the batch: in grad_input, to transpose its value. For
float32 and up to eight samples the native family has a second way (csrc/kernels/few-inl.h), which
it takes where it is faster; its work is (bits + samples B) I O.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from sparsetrain import _native
from sparsetrain._planner import DIRECTIONS, Choice, Direction

__all__ = ["LinearProblem", "choose", "costs", "explain"]


class LinearProblem(NamedTuple):
    """One layer on one input."""

    batch: int
    in_features: int
    out_features: int
    nnz: int
    dtype: torch.dtype
    threads: int = 1
    deterministic: bool = False

    @property
    def weights(self) -> int:
        """Number of weights of the dense layer."""
        return self.in_features * self.out_features


class _Native(NamedTuple):  # nanoseconds per unit, see above
    start: float
    products: float
    visits: float
    sums: float
    activations: float
    gathered: float


class _Dense(NamedTuple):
    start: float
    products: float
    weight: float
    single: float  # a weight, products and all, for a batch of 1
    converted: float
    activations: float
    panels: float


class _Costs(NamedTuple):
    """Of one kind of CPU."""

    native: dict[Direction, _Native]
    few: dict[Direction, tuple[float, float]]  # bits, samples
    dense: dict[Direction, _Dense]
    native_share: float  # of each further thread: the part that counts
    dense_share: float


_FEW_SAMPLES = 8
# Fitted to six layers, 64 -> 64 to 3072 -> 768, at batches 1 to 2048, sparsities 0 to 99 %, one
# thread, of a CPU with AVX2 (Zen 3), so that the faster one is chosen: to within 0.3 % of the time
# (geometric mean). Products and visits are a few cycles for a whole vector, so they hold for wider
# ones (Zen 5 with AVX-512: no layer of a batch of 32 slower than dense by more than 10 %): what
# changes with the instruction set is L.
_WHOLE = _Costs(
    {
        "forward": _Native(15500, 0.022, 0.93, 4.4, 0.47, 0),
        "grad_input": _Native(17800, 0.21, 0.08, 2.5, 0.54, 1.6),
        "grad_values": _Native(19000, 0.007, 1.33, 0.6, 0.55, 0),
    },
    {"forward": (0.115, 0.024), "grad_input": (0.11, 0.024), "grad_values": (0.155, 0.023)},
    {
        "forward": _Dense(27300, 0.222, 0.61, 0.64, 0, 0.5, 0),
        "grad_input": _Dense(15200, 0.219, 0.38, 0.41, 0.12, 0.26, 9000),
        "grad_values": _Dense(38600, 0.211, 0.12, 0.15, 0.52, 0.81, 0),
    },
    0.9,
    0.5,
)
# The same fit for AVX-512 on 256-bit units (Zen 4), with one and two threads: its choices cost
# 0.35 %; of 993 layers on batches none is slower than dense by more than 10 %.
_HALVES = _Costs(
    {
        "forward": _Native(5800, 0.39, 0.02, 7.9, 0.027, 0.085),
        "grad_input": _Native(5900, 0.36, 0, 3.4, 0.072, 1.1),
        "grad_values": _Native(7200, 0.31, 0.35, 2.0, 0.19, 0.23),
    },
    {"forward": (0.049, 0.024), "grad_input": (0.06, 0.019), "grad_values": (0.061, 0.029)},
    {
        "forward": _Dense(8100, 0.35, 0.14, 0.079, 0.16, 0, 2200),
        "grad_input": _Dense(6700, 0.32, 0.15, 0.082, 0.16, 0, 1500),
        "grad_values": _Dense(12000, 0.34, 0.19, 0.095, 0.15, 0.046, 1300),
    },
    0.7,
    0.45,
)
# And for AVX-512 on whole units (Zen 5), with one and two threads: 0.1 %; of 1017 layers on batches
# one, which holds all its weights, is slower than dense by more than 10 %.
_WIDE = _Costs(
    {
        "forward": _Native(2800, 0.16, 0, 5.2, 0.092, 0.16),
        "grad_input": _Native(2900, 0.1, 0.32, 2.1, 0.081, 0.45),
        "grad_values": _Native(3600, 0.13, 0.18, 5.2, 0.092, 0.19),
    },
    {"forward": (0.043, 0.012), "grad_input": (0.047, 0.0088), "grad_values": (0.048, 0.015)},
    {
        "forward": _Dense(3800, 0.29, 0.1, 0.059, 0.1, 0.039, 530),
        "grad_input": _Dense(3000, 0.29, 0.1, 0.054, 0.097, 0.021, 620),
        "grad_values": _Dense(5100, 0.28, 0.087, 0.062, 0.092, 0.093, 720),
    },
    0.63,
    0.46,
)
# And for AVX-512 on Intel's cores (family 6, model 207), with one thread: 0.5 %; of 489 layers on
# batches none, and with two threads on one core 6 of 486 are slower than dense by more than 10 %.
_INTEL = _Costs(
    {
        "forward": _Native(8000, 0.19, 0.95, 27, 0, 0),
        "grad_input": _Native(7900, 0.2, 0.83, 0, 0.21, 1.3),
        "grad_values": _Native(9800, 0.2, 1.3, 21, 0.061, 0.52),
    },
    {"forward": (0.24, 0.038), "grad_input": (0.26, 0.02), "grad_values": (0.3, 0.028)},
    {
        "forward": _Dense(12000, 0.32, 0.22, 0.21, 0.27, 0.039, 0),
        "grad_input": _Dense(7800, 0.29, 0.15, 0.2, 0.2, 0.017, 2500),
        "grad_values": _Dense(16000, 0.28, 0.23, 0.28, 0.2, 0.085, 0),
    },
    0.86,
    0.63,
)
_KINDS = {"whole": _WHOLE, "halves": _HALVES, "wide": _WIDE, "intel": _INTEL}
# Transposing a large matrix that has all its weights: rows lie so that they displace each other.
_FAR_APART = 2.5
_FAR_WEIGHTS = 400_000
# Of the library's product with the CPU's own bfloat16 instructions, in float32's time.
_OWN_BFLOAT16 = 0.4
_lanes = _native.vector_lanes
_cpu_kind = functools.cache(_native.cpu_kind)


@functools.cache
def _library_has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def costs(
    direction: Direction, problem: LinearProblem, kind: _Costs | None = None
) -> dict[str, float]:
    """Estimated nanoseconds by family, for this kind of CPU unless another is given."""
    batch, inputs, outputs, nnz, dtype, threads, _ = problem
    lanes, widest = _lanes()
    if dtype is torch.float64:
        lanes, widest = max(lanes // 2, 1), max(widest // 2, 1)
    vectors = -(-batch // lanes)
    tiles = -(-vectors // 4)
    moved = batch * (inputs + outputs)
    sums = inputs if direction == "grad_input" else outputs
    kind = kind or _KINDS[_cpu_kind()]
    n, d = kind.native[direction], kind.dense[direction]
    full = nnz == problem.weights
    apart = full and nnz > _FAR_WEIGHTS and direction == "grad_input"
    gathered = n.gathered * (_FAR_APART if apart else 1)
    work = n.products * nnz * vectors + n.visits * nnz * tiles + gathered * nnz
    work += n.sums * sums * tiles + n.activations * moved
    if batch <= _FEW_SAMPLES and lanes >= 8 and dtype is torch.float32:
        bits, samples = kind.few[direction]
        work = min(work, (bits + samples * batch) * problem.weights)
    native = n.start + work / (1 + kind.native_share * (threads - 1))
    product = d.products * problem.weights * batch / widest
    if dtype is torch.bfloat16 and _library_has_bfloat16():
        product *= _OWN_BFLOAT16
    product = d.single * problem.weights if batch == 1 else product + d.weight * problem.weights
    work = product + d.activations * moved + (0 if full else d.converted) * problem.weights
    dense = d.start + (0 if full else d.panels) + work / (1 + kind.dense_share * (threads - 1))
    return {"native": native, "dense": dense}


def choose(direction: Direction, problem: LinearProblem) -> Choice:
    """The implementation for one product; the first line that applies counts.

    | when                                                          | family |
    |---------------------------------------------------------------|--------|
    | torch.use_deterministic_algorithms(True)                      | native |
    | both gradients, with one start less, are estimated faster     | native |
    | the estimate for dense is below that for native               | dense  |
    | otherwise                                                     | native |

    On the CPU with AVX2, for float32 and one thread, that is dense up to these
    sparsities in % (forward / grad_input / grad_values; -: never):

    | layer       | batch 1 to 8  | batch 32      | batch 128     | batch 2048    |
    |-------------|---------------|---------------|---------------|---------------|
    | 64 -> 64    | -             | -             | -             | 11 / 30 / 13  |
    | 384 -> 384  | -             | - / 40 / 0    | - / 25 / 20   | 12 / 12 / 33  |
    | 384 -> 1536 | -             | - / 44 / 0    | - / 25 / 23   | 12 / 9 / 35   |
    | 768 -> 3072 | - / - / 0     | - / 45 / 0    | - / 25 / 24   | 12 / 8 / 36   |
    | 3072 -> 768 | - / - / 0     | - / 45 / 0    | - / 25 / 24   | 11 / 8 / 36   |

    The native kernels alone give the same bits for any number of threads.
    """
    if problem.deterministic:
        return Choice("native", "deterministic algorithms are asked for")
    estimates = costs(direction, problem)
    native, dense = estimates["native"], estimates["dense"]
    if dense < native:
        if direction != "forward" and _both_in_one_call(problem):
            return Choice("native", "in one call with the other gradient")
        return Choice("dense", f"estimated {native / dense:.2f} times as fast as native")
    return Choice("native", f"estimated {dense / native:.2f} times as fast as dense")


def _both_in_one_call(problem: LinearProblem) -> bool:
    """Whether the native family, which computes both gradients in one call, is faster for the two
    of them together than for one or none."""
    x, values = costs("grad_input", problem), costs("grad_values", problem)
    start = _KINDS[_cpu_kind()].native["grad_input"].start
    apart = min(x.values()) + min(values.values())
    return x["native"] + values["native"] - start < apart


def explain(problem: LinearProblem) -> str:
    """What is chosen for each product, and why: one line each."""
    batch, inputs, outputs, nnz, dtype, threads, _ = problem
    density = nnz / problem.weights if problem.weights else 0.0
    lines = [
        f"({batch}, {inputs}) -> ({batch}, {outputs}), {nnz} of {problem.weights} weights "
        f"({density:.1%}), {dtype}, {threads} threads"
    ]
    for direction in DIRECTIONS:
        choice = choose(direction, problem)
        lines.append(f"{direction:12} {choice.family:9} {choice.reason}")
    return "\n".join(lines)
