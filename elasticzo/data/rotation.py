"""Images turned about their centre."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4096  # images at a time: their grid of float64 places stays small


def rotate_images(x: Tensor, degrees: float) -> Tensor:
    """Every image rotated by the same angle, bilinear, in its own frame; outside is black (0).

    By torch's `grid_sample`: no further dependency, and one call for thousands of images (scipy's
    `rotate` goes plane by plane). In float64, values rounded to the nearest, halves up.

    Args:
        x: `[N, C, H, W]` uint8, N > 0, any device; H and W may differ.
        degrees: counter-clockwise, as `torch.rot90` turns `dims=(2, 3)`; finite.
    Returns:
        `[N, C, H, W]` uint8, a new tensor on the same device.
    Raises:
        TypeError: `x` is not uint8.
        ValueError: `x` has another number of dimensions, or the angle is not finite.

    >>> rotate_images(torch.tensor([[[[0, 9], [0, 0]]]], dtype=torch.uint8), 90.0).tolist()
    [[[[9, 0], [0, 0]]]]
    """
    if x.dtype != torch.uint8:
        raise TypeError(f"x must be uint8, got {x.dtype}")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must have shape [N, C, H, W], N > 0, got {list(x.shape)}")
    if not math.isfinite(degrees):
        raise ValueError(f"degrees must be finite, got {degrees}")
    height, width = x.shape[2:]
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    # Where a pixel of the result comes from, in coordinates that run from -1 to 1 on both axes.
    back = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    theta = torch.tensor([back], dtype=torch.float64, device=x.device)
    turned = []
    for part in torch.split(x, CHUNK):
        grid = F.affine_grid(theta.expand(len(part), 2, 3), list(part.shape), align_corners=False)
        values = F.grid_sample(part.double(), grid, align_corners=False)
        # What is a half up to the last bits goes up, on every machine.
        turned.append((values + (0.5 + 1e-6)).floor().clamp(0, 255).to(torch.uint8))
    return torch.cat(turned)
