"""Augmentation of point clouds: a pure function of (seed, step, place in the batch).

`p -> turn(p) + shift + jitter`: a turn about the vertical axis and a shift a cloud, jitter a point.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from elasticzo.data.order import check_key
from zo_kernels import sample

# Of the stream "data"; the order of an epoch is tensor 0.
CLOUD, POINT = 1, 2
LEVELS = 1 << 16  # a random number is one of so many, so that a table of them serves every device


def augment_clouds(
    x: Tensor,
    *,
    seed: int,
    step: int,
    up: int,
    degrees: float = 45.0,
    shift: float = 0.1,
    jitter: float = 0.01,
    clip: float = 0.05,
    backend: str = "auto",
) -> Tensor:
    """Turn, shift and jitter each cloud of a batch.

    Args:
        x: `[B, P, 3]` float32, contiguous or not; not changed.
        seed: of the run, in [0, 2^63).
        step: of the run, in [0, 2^32): a run that goes on sees what it would have seen.
        up: the vertical axis, 0, 1 or 2.
        degrees: turns are uniform in +-degrees, >= 0.
        shift: of each coordinate of a cloud, uniform in +-shift, >= 0, in units of x.
        jitter: standard deviation of a normal added to each coordinate, >= 0, in units of x.
        clip: bound on that normal, >= 0.
        backend: "auto", "triton", "numba" or "reference", of the noise.
    Returns: `[B, P, 3]` float32.
    Determinism: the same bits on every device and backend: integers of the counter noise look up
        tables that are made on the CPU, and every sum and product is rounded by itself.
    Source: Qi et al. 2017 (jitter 0.01 clipped at 0.05); turns and shifts are our reading.
    """
    if x.dtype != torch.float32 or x.dim() != 3 or x.shape[2] != 3:
        raise ValueError(f"x must be float32 [B, P, 3], got {x.dtype} {list(x.shape)}")
    if up not in (0, 1, 2):
        raise ValueError(f"up must be an axis, 0, 1 or 2, got {up!r}")
    settings = {"degrees": degrees, "shift": shift, "jitter": jitter, "clip": clip}
    for name, value in settings.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be in [0, inf), got {value}")
    check_key(seed, step=step)
    batch, points, _ = x.shape
    device = x.device
    key = torch.tensor([seed, step], dtype=torch.int64, device=device)
    turns, normals = _turns(degrees, device), _normals(jitter, clip, device)

    own = sample([batch, 4], key, tensor=CLOUD, noise="bits", purpose="data", backend=backend)
    own = own >> 16  # [B, 4]: turn, shifts
    cosine, sine = turns[own[:, :1]].unbind(-1)  # [B, 1] each
    moved = (own[:, 1:].float() + 0.5) * (2.0 * shift / LEVELS) - shift  # [B, 3]
    pairs = (3 * points + 1) // 2  # a word makes two
    words = sample([batch, pairs], key, tensor=POINT, noise="bits", purpose="data", backend=backend)
    halves = torch.stack([words & (LEVELS - 1), words >> 16], -1)
    noise = normals[halves].flatten(1)[:, : 3 * points].reshape(batch, points, 3)

    a, b = (axis for axis in (0, 1, 2) if axis != up)
    out = x.clone()
    out[..., a] = x[..., a] * cosine - x[..., b] * sine
    out[..., b] = x[..., a] * sine + x[..., b] * cosine
    out += moved.unsqueeze(1)
    out += noise
    return out


@lru_cache(maxsize=8)
def _turns(degrees: float, device: torch.device) -> Tensor:
    """`[65536, 2]`: cosine and sine of angles that divide +-degrees evenly."""
    share = (torch.arange(LEVELS, dtype=torch.float64, device="cpu") + 0.5) / LEVELS
    angle = torch.deg2rad((2.0 * share - 1.0) * degrees)
    return torch.stack([angle.cos(), angle.sin()], -1).float().to(device)


@lru_cache(maxsize=8)
def _normals(deviation: float, clip: float, device: torch.device) -> Tensor:
    """`[65536]`: quantiles of the normal distribution in the middle of equal shares."""
    share = (torch.arange(LEVELS, dtype=torch.float64, device="cpu") + 0.5) / LEVELS
    quantiles: Tensor = deviation * torch.special.ndtri(share)
    return quantiles.clamp(-clip, clip).float().to(device)
