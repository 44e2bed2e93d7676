"""A small convolutional network for 32x32 images, with or without BatchNorm."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from elasticzo.models.first_weights import kaiming_

WIDTHS = (32, 64, 64)


class SmallCNN(nn.Sequential):
    """Three 3x3 convolutions, each with ReLU and 2x2 max-pooling, then one linear layer.

    The modules are called conv1 to conv3, bn1 to bn3, fc.

    Args:
        classes: of the output.
        channels: of the input.
        batch_norm: whether BatchNorm follows each convolution.
    Shapes: `[B, channels, 32, 32]` -> `[B, classes]`.
    Initialisation: Kaiming normal (fan in, ReLU), zero biases, BatchNorm 1 and 0.
    """

    def __init__(self, classes: int = 10, channels: int = 3, batch_norm: bool = False) -> None:
        layers: dict[str, nn.Module] = {}
        for i, (inner, outer) in enumerate(zip((channels, *WIDTHS), WIDTHS, strict=False), start=1):
            layers[f"conv{i}"] = nn.Conv2d(inner, outer, 3, padding=1)
            if batch_norm:
                layers[f"bn{i}"] = nn.BatchNorm2d(outer)
            layers[f"relu{i}"], layers[f"pool{i}"] = nn.ReLU(), nn.MaxPool2d(2)
        layers["flat"] = nn.Flatten()
        layers["fc"] = nn.Linear(WIDTHS[-1] * 4 * 4, classes)
        super().__init__(OrderedDict(layers))
        kaiming_(self)
