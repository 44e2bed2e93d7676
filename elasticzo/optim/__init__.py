"""Optimisers: a step that is the same for all, a rule each; and the tail's."""

from collections.abc import Callable

from elasticzo.optim.adam import ZOAdam
from elasticzo.optim.head import HeadOptimizer
from elasticzo.optim.sgd import ZOSGD
from elasticzo.optim.sign import ZOSign

# By rule: what a log is replayed with, and what the contract tests run over.
OPTIMIZERS: dict[str, Callable[..., HeadOptimizer]] = {
    "sgd": ZOSGD,
    "momentum": ZOSGD,
    "adam": ZOAdam,
    "sign": ZOSign,
}

__all__ = ["OPTIMIZERS", "ZOSGD", "HeadOptimizer", "ZOAdam", "ZOSign"]
