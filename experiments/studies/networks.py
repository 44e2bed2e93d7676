"""Networks whose memory and steps are looked at, and what one input of each looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from elasticzo.models import VGG11, LeNet5, PointNet, ResNet20

NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet5": (LeNet5, (1, 28, 28)),
    "resnet20": (lambda: ResNet20(channels=1), (1, 28, 28)),
    "vgg11": (VGG11, (3, 32, 32)),
    "pointnet": (PointNet, (3, 1024)),
}
INT8_NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "lenet5": LeNet5,
    "pointnet": lambda: PointNet(batch_norm=False),
}
STATE_TENSORS = {"sgd": 0, "momentum": 1, "adam": 2}
# Last layers that backpropagation trains, by method.
TAILS: dict[str, int | str] = {"full-zo": 0, "cls2": 1, "cls1": 2, "full-bp": "all"}
