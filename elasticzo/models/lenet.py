"""LeNet-5 as the paper's memory figures imply it: 107,786 parameters (our reading)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LeNet5(nn.Module):
    """Two 5x5 convolutions (padding 2, ReLU, 2x2 max-pooling), then 784-120-84-classes.

    Args:
        classes: of the output.
        channels: of the input.
    Shapes: `[B, channels, 28, 28]` -> `[B, classes]`.
    Initialisation: Kaiming normal (fan in, ReLU), zero biases. With PyTorch's default, full ZO
    stays at chance for epochs.
    """

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5, padding=2)
        self.fc1 = nn.Linear(16 * 7 * 7, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))  # type: ignore[no-any-return]


__all__ = ["LeNet5"]
