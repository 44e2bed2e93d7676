"""Training steps of LeNet-5 that are compared, and what shows that they are right."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.int8 import ElasticZOInt8, Int8Tensor, Int8ZO, quantize
from elasticzo.models import LeNet5
from experiments.studies.networks import TAILS
from zo_kernels import perturbed_weights

EPS, LR = 1e-2, 1e-6
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PAIRINGS = ("stacked", "sequential")


def images(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, 28, 28, generator=generator)
    return x, torch.randint(10, (batch,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return LeNet5()


class Fp32Step:
    """A step of the float method; its losses."""

    def __init__(self, method: str, memory_format: torch.memory_format, pairing: str) -> None:
        net = network().to(memory_format=memory_format)  # type: ignore[call-overload]
        self.model = ElasticZO(net, TAILS[method], eps=EPS, pairing=pairing).train()
        self.zo = ZOSGD(self.model, lr=LR)
        self.tail = self.model.tail_optimizer(torch.optim.SGD, lr=LR) if TAILS[method] else None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        losses: Tensor = pair_losses(F.cross_entropy, self.model(x), y)
        self.model.backward(losses)
        if self.tail is not None:
            self.tail.step()
            self.tail.zero_grad()
        self.zo.step(losses)
        return losses


class Int8Step:
    """A step of the integer method; its losses."""

    def __init__(self, method: str, pairing: str, backend: str = "auto") -> None:
        given: dict[str, Any] = {"pairing": pairing, "backend": backend}
        self.model = ElasticZOInt8(network(), TAILS[method], **given).train()
        self.zo, self.tail = Int8ZO(self.model, b_zo=1), self.model.tail_optimizer(b_bp=3)

    def __call__(self, x: Int8Tensor, y: Tensor) -> Tensor:
        logits = self.model(x)
        losses = self.model.losses(logits, y)
        self.model.backward(logits, y, "mean")  # of both halves, as in floats
        self.tail.step()
        self.zo.step(losses)
        return losses


class TorchStep:
    """Backpropagation without this library."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        self.net = network().to(memory_format=memory_format)  # type: ignore[call-overload]
        self.sgd = torch.optim.SGD(self.net.parameters(), lr=LR)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(self.net(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.sgd.step()
        self.sgd.zero_grad()
        return loss


def float64_losses(step: Fp32Step, x: Tensor, y: Tensor) -> Tensor:
    """Of the next step, from its own perturbed weights."""
    model = step.model
    key = torch.tensor([model.seed, model.step_index])
    head = set(model.cut.head_parameters)
    found = []
    for half in range(1 if model.cut.everything else 2):
        weights = {}
        for tensor, (name, p) in enumerate(model.module.named_parameters()):
            halves = p.detach()[None].expand(2, *p.shape)
            if name in head:
                eps = torch.tensor(EPS, dtype=torch.float64)
                halves = perturbed_weights(p.detach(), key, eps, tensor=tensor)
            weights[name] = halves[half].double()
        logits = torch.func.functional_call(model.module, weights, x.double())
        found.append(F.cross_entropy(logits, y))
    return torch.stack(found)


def verify(method: str, memory_format: torch.memory_format, pairing: str) -> None:
    """Refuse to time what is wrong: FP32's losses against float64's, INT8's weights after two steps
    against those of the reference, bit for bit."""
    x, y = images(8, 100)
    step = Fp32Step(method, memory_format, pairing)
    want = float64_losses(step, x, y)
    found = step(x.to(memory_format=memory_format), y).detach().double()
    if not torch.allclose(found, want, rtol=1e-5, atol=0.0):
        raise SystemExit(f"{method}: FP32 losses are {found.tolist()}, float64's {want.tolist()}")
    states = []
    for backend in ("auto", "reference"):
        run = Int8Step(method, pairing, backend)
        for seed in range(2):
            x, y = images(8, seed)
            run(quantize(x), y)
        states.append(run.model.state_dict())
    if not all(torch.equal(w, states[1][name]) for name, w in states[0].items()):
        raise SystemExit(f"{method}: INT8 weights differ from the reference's")
