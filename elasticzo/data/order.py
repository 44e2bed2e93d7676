"""Orders of samples that a seed decides: of an epoch, and of a split."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zo_kernels import sample


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """A permutation of `0 .. n - 1`, so that a run can go on in the middle of an epoch.

    The samples are sorted by the words of the counter noise of purpose "data"; equal words (one
    pair in four thousand million) keep their order.

    Args:
        n: number of samples, at least 1.
        seed: of the run, in [0, 2^63).
        epoch: counted from 0, in [0, 2^32).
    Returns:
        `[n]` int64 on the CPU.
    Determinism: the same on every device and backend.
    Raises:
        ValueError: an argument out of range.

    >>> epoch_order(5, seed=0, epoch=0).sort().values.tolist()
    [0, 1, 2, 3, 4]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    check_key(seed, epoch=epoch)
    key = torch.tensor([seed, epoch], dtype=torch.int64, device="cpu")
    words = sample([n], key, tensor=0, noise="bits", purpose="data")
    return words.argsort(stable=True)


def check_key(seed: int, **place: int) -> None:
    """Raise ValueError for a seed, or a step or epoch by its name, that the counter noise cannot
    have: it would take another one's numbers."""
    for name, value, bits in (("seed", seed, 63), *((k, v, 32) for k, v in place.items())):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise ValueError(f"{name} must be an integer in [0, 2^{bits}), got {value!r}")


def shuffled(n: int, seed: int) -> np.ndarray:
    """0 to n - 1 in an order the seed decides, [n] int64: for splits, the same for ever."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    # Raw bits: numpy promises them for ever, its and torch's permutations may change.
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")
