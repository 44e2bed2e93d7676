"""A control: every layer learns by backpropagation inside of it, for a classifier of its own.

In front of each layer that multiplies, but the first, what it is about to read is classified by a
linear layer and loses its graph: so no error passes from one layer to the one before, as in learnt
feedback, but each has a loss (and weights) of its own. The last layer has the network's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class LocalNet(nn.Module):
    """A network whose layers have classifiers while it trains; else it is the network.

    Args:
        net: whose layers run one after the other.
        example: an input, which says how many numbers each classifier reads.
    """

    def __init__(self, net: nn.Module, example: Tensor, classes: int) -> None:
        super().__init__()
        self.net = net
        self._ends: list[Tensor] = []
        layers = [m for m in net.modules() if isinstance(m, PRODUCTS)]
        for layer in layers[1:]:
            layer.register_forward_pre_hook(self._end)
        with torch.no_grad():
            self.net.eval()(example)  # no statistics move
        self.net.train()
        widths = [t[0].numel() for t in self._ends]
        self.classifiers = nn.ModuleList(nn.Linear(n, classes) for n in widths)
        self._ends.clear()

    def _end(self, layer: nn.Module, args: Any) -> Any:
        if not self.training:
            return None
        self._ends.append(args[0])
        return (args[0].detach(), *args[1:])

    def forward(self, x: Tensor) -> Tensor:
        self._ends.clear()
        out: Tensor = self.net(x)
        return out

    def local_losses(self, y: Tensor) -> Tensor:
        """Of the last forward: the sum of the mean losses of all classifiers."""
        pairs = zip(self.classifiers, self._ends, strict=True)
        losses = [cross_entropy(classifier(t.flatten(1)), y) for classifier, t in pairs]
        self._ends.clear()
        return torch.stack(losses).sum()
