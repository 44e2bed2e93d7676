"""First weights of the networks here."""

from __future__ import annotations

from torch import nn


def kaiming_(net: nn.Module) -> None:
    """Kaiming normal (fan in, ReLU) and zero biases, layer by layer: with PyTorch's default Full
    ZO stays at chance for epochs."""
    for module in net.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
