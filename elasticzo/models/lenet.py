"""LeNet-5 as the paper's memory figures imply it: 107,786 parameters (our reading)."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from elasticzo.models.first_weights import kaiming_


class LeNet5(nn.Sequential):
    """Two 5x5 convolutions (padding 2, ReLU, 2x2 max-pooling), then 784-120-84-classes.

    Args:
        classes: of the output.
        channels: of the input.
    Shapes: `[B, channels, 28, 28]` -> `[B, classes]`.
    Initialisation: Kaiming normal (fan in, ReLU), zero biases. With PyTorch's default, full ZO
    stays at chance for epochs.
    """

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        layers: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(channels, 6, 5, padding=2),
            "relu1": nn.ReLU(),
            "pool1": nn.MaxPool2d(2),
            "conv2": nn.Conv2d(6, 16, 5, padding=2),
            "relu2": nn.ReLU(),
            "pool2": nn.MaxPool2d(2),
            "flat": nn.Flatten(),
            "fc1": nn.Linear(16 * 7 * 7, 120),
            "relu3": nn.ReLU(),
            "fc2": nn.Linear(120, 84),
            "relu4": nn.ReLU(),
            "fc3": nn.Linear(84, classes),
        }
        super().__init__(OrderedDict(layers))
        kaiming_(self)
