"""What the step is timed on: networks, plain inference of them, the MeZO-style loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo.models import VGG11, LeNet5, ResNet20
from elasticzo.models.resnet import BasicBlock

NAMES = ("lenet5", "mlp", "vgg", "residual")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Subject:
    """A network, and what its inputs look like.

    Attributes:
        size: of one input. channels_last: memory format of weights and images on a GPU.
    """

    name: str
    what: str
    build: Callable[[], nn.Module]
    size: tuple[int, ...]
    classes: int
    channels_last: bool = False

    def make(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The same initial weights at every call."""
        torch.manual_seed(0)
        with device:
            net = self.build().to(dtype)
        if self.channels_last and device.type == "cuda":
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return net

    def inputs(
        self, batch: int, device: torch.device, dtype: torch.dtype, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Random images or rows, random classes."""
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(batch, *self.size, generator=generator, device=device).to(dtype)
        y = torch.randint(self.classes, (batch,), generator=generator, device=device)
        return self.formatted(x), y

    def formatted(self, x: Tensor) -> Tensor:
        """In the memory format in which it is timed."""
        if self.channels_last and x.device.type == "cuda":
            return x.contiguous(memory_format=torch.channels_last)
        return x


def mlp(width: int, depth: int) -> nn.Sequential:
    """`depth` square linear layers, a ReLU behind each but the last."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(width, width), *([nn.ReLU()] if i < depth - 1 else [])]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(*layers)


def small_lenet() -> nn.Sequential:
    """The kinds of layers of `LeNet5`."""
    conv = nn.Conv2d(1, 2, 5, padding=2)
    return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 10))


def small_vgg() -> nn.Sequential:
    """The kinds of layers of `VGG11`."""
    stages = VGG11(width=2).features[:6]
    return nn.Sequential(stages, nn.Flatten(), nn.Linear(4 * 2 * 2, 10))


def small_residual() -> nn.Sequential:
    """The kinds of layers of `ResNet20`."""
    return nn.Sequential(BasicBlock(3, 3, 2), nn.Flatten(), nn.Linear(3 * 2 * 2, 10))


def subjects(reduced: bool) -> dict[str, Subject]:
    """The networks by name; reduced, each is as small as it can be."""
    if reduced:
        found = [
            Subject("lenet5", "one stage like LeNet-5's", small_lenet, (1, 8, 8), 10),
            Subject("mlp", "MLP 16x2", lambda: mlp(16, 2), (16,), 16),
            Subject("vgg", "two stages of VGG-11", small_vgg, (3, 8, 8), 10, True),
            Subject("residual", "a residual block", small_residual, (3, 4, 4), 10, True),
        ]
    else:
        found = [
            Subject("lenet5", "LeNet-5", LeNet5, (1, 28, 28), 10),
            Subject("mlp", "MLP 4096x4", lambda: mlp(4096, 4), (4096,), 4096),
            Subject("vgg", "VGG-11, width 64", VGG11, (3, 32, 32), 10, True),
            Subject(
                "residual", "ResNet-20, width 2", lambda: ResNet20(width=2), (3, 32, 32), 10, True
            ),
        ]
    return {one.name: one for one in found}


def products(net: nn.Module) -> list[nn.Module]:
    """The layers that multiply matrices, each of which rounds."""
    return [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def weight_scale(net: nn.Module) -> float:
    """Root mean square of the weights of these layers, averaged over layers."""
    sizes = [float(m.weight.detach().double().square().mean().sqrt()) for m in products(net)]  # type: ignore[operator]
    return sum(sizes) / len(sizes)


class MeZOLoop:
    """The published loop (Malladi et al. 2023, algorithm 1) in our own words: perturb in place by
    +eps, -2 eps, +eps from a re-seeded generator, then the update from the same seed.

    Args:
        captured: for a CUDA graph, which can neither seed a generator nor read the loss on the
            host: four generators in one state each give a walk its noise, and `g` stays a tensor.
    """

    def __init__(self, net: nn.Module, eps: float, lr: float, captured: bool = False) -> None:
        self.net, self.eps, self.lr, self.captured = net, eps, lr, captured
        self.params = list(net.parameters())
        for p in self.params:
            p.requires_grad_(False)
        device = self.params[0].device
        self.generators = [torch.Generator(device).manual_seed(0) for _ in range(4)]
        self.seed = 0

    def _walk(self, place: int, scale: float | Tensor) -> None:
        generator = self.generators[place]
        if not self.captured:
            generator.manual_seed(self.seed)
        for p in self.params:
            z = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
            if isinstance(scale, Tensor):
                p.add_(z * scale.to(p.dtype))
            else:
                p.add_(z, alpha=scale)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; the loss of the + half."""
        self.seed += 1
        self._walk(0, self.eps)
        plus = F.cross_entropy(self.net(x), y)
        self._walk(1, -2 * self.eps)
        minus = F.cross_entropy(self.net(x), y)
        self._walk(2, self.eps)
        g = (plus - minus) / (2 * self.eps)
        self._walk(3, -self.lr * g if self.captured else -self.lr * float(g))
        return plus
