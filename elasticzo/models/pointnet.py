"""PointNet without its transformation networks: 819,624 parameters at 40 classes (our reading)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from elasticzo.models.first_weights import kaiming_
from elasticzo.models.points import MaxPoints

POINT_CHANNELS = (64, 64, 64, 128, 1024)
CLOUD_FEATURES = (512, 256)


class PointNet(nn.Sequential):
    """Five 1x1 convolutions over the points, their maximum, then 1024-512-256-classes.

    Every layer but the last is followed by BatchNorm and ReLU. The modules are called conv1 to
    conv5, bn1 to bn7, fc1 to fc3.

    Args:
        classes: of the output.
        batch_norm: False leaves BatchNorm out (815,400 parameters), as integers need it.
    Shapes: `[B, 3, points]` float -> `[B, classes]`.
    Initialisation: Kaiming normal (fan in, ReLU), zero biases, BatchNorm 1 and 0.
    Source: Qi et al. 2017 (arXiv:1612.00593), without T-Nets and dropout.
    """

    def __init__(self, classes: int = 40, batch_norm: bool = True) -> None:
        layers: dict[str, nn.Module] = {}
        inner = 3
        for i, outer in enumerate(POINT_CHANNELS, start=1):
            layers[f"conv{i}"] = nn.Conv1d(inner, outer, 1)
            if batch_norm:
                layers[f"bn{i}"] = nn.BatchNorm1d(outer)
            layers[f"relu{i}"] = nn.ReLU()
            inner = outer
        layers["max"] = MaxPoints()
        places = len(POINT_CHANNELS)
        for i, outer in enumerate(CLOUD_FEATURES, start=1):
            layers[f"fc{i}"] = nn.Linear(inner, outer)
            if batch_norm:
                layers[f"bn{places + i}"] = nn.BatchNorm1d(outer)
            layers[f"relu{places + i}"] = nn.ReLU()
            inner = outer
        layers["fc3"] = nn.Linear(inner, classes)
        super().__init__(OrderedDict(layers))
        kaiming_(self)
