"""The learner of precision int8: `experiments.train.learner.Learner`'s interface, in integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.cut import resolve_cut
from elasticzo.int8 import ElasticZOInt8, Int8TrajectoryLog, Int8ZO
from experiments.train.config import TrainConfig
from experiments.train.inputs import Samples, int8_inputs
from experiments.train.resolve import build_model, last_layer, library_tail


def build_int8_network(config: TrainConfig) -> ElasticZOInt8:
    """The int8 network of a resolved configuration, from float weights that its seed decides."""
    torch.manual_seed(config.seed)
    assert config.tail is not None and config.r_max is not None and config.p_zero is not None
    assert config.logit_shift is not None and config.fraction_bits is not None
    net = build_model(config)
    with torch.no_grad():
        last_layer(net).weight.mul_(2.0**-config.logit_shift)
    tail = library_tail(config.tail)
    if config.method.startswith("frozen-"):
        frozen = resolve_cut(net, tail).head_parameters
        for name, p in net.named_parameters():
            if name in frozen:
                p.requires_grad_(False)
        tail = "all"  # one pass: there is nothing to perturb
    return ElasticZOInt8(
        net.to(config.device),
        tail,
        r_max=config.r_max[0],
        p_zero=config.p_zero[0],
        queries=config.queries,
        seed=config.seed,
        fraction_bits=config.fraction_bits,
        loss=config.loss or "integer",
        backend=config.backend,
        pairing=config.pairing,
        scale=config.scale,
    )


class Int8Learner:
    """What an integer run learns with.

    Args:
        config: resolved, of precision int8.
        data: of `load_data`.
    """

    def __init__(self, config: TrainConfig, data: Samples) -> None:
        assert config.epochs is not None and config.b_zo is not None and config.b_bp is not None
        self.config = config
        self.inputs = int8_inputs(config, data)
        self.device = torch.device(config.device)
        self.model = build_int8_network(config)
        self.zo = Int8ZO(self.model, b_zo=config.b_zo[0])
        self.tail = self.model.tail_optimizer(b_bp=config.b_bp[0])
        self.steps_per_epoch = self.inputs.steps_per_epoch
        self.steps = self.steps_per_epoch * config.epochs
        self.step_index = 0
        dtype = torch.int64 if config.loss == "integer" else torch.float64
        self._losses = torch.zeros(self.model.halves, dtype=dtype, device=self.device)
        self._sum = torch.zeros_like(self._losses)  # since the last line of the log
        self._zeros = torch.zeros((), dtype=torch.int64, device=self.device)  # signs of 0
        self._count = 0

    # ---- the step

    def step(self) -> None:
        """One batch: head and tail move, in integers; nothing waits for the device."""
        self._set_bits()
        x, y = self.inputs.train(self.step_index)
        logits = self.model(x)
        losses = self.model.losses(logits, y)
        self.model.backward(logits, y, self.config.tail_source or "plus")
        self.tail.step()
        self.zo.step(losses)
        self._losses = losses
        self._sum += losses
        self._zeros += (self.zo.signs == 0).sum()
        self._count += 1
        self.step_index += 1

    def rates(self) -> tuple[float, float]:
        """Bits of the updates of head and tail: what plays the learning rates."""
        assert self.config.b_zo is not None and self.config.b_bp is not None
        return float(self._now(self.config.b_zo)), float(self._now(self.config.b_bp))

    def _now(self, values: Sequence[Any]) -> Any:
        """The value of a schedule at the present step; each serves an equal part of the run."""
        return values[min(self.step_index * len(values) // self.steps, len(values) - 1)]

    def _set_bits(self) -> None:
        c = self.config
        assert c.r_max and c.p_zero and c.b_zo and c.b_bp
        self.model.set_noise(self._now(c.r_max), self._now(c.p_zero))
        self.zo.b_zo, self.tail.b_bp = self._now(c.b_zo), self._now(c.b_bp)

    # ---- what came of it

    def _nats(self, losses: Tensor) -> Tensor:
        """Mean losses of a sample in nats, float64: for people."""
        unit = math.log(2.0) / 2**self.model.fraction_bits if self.config.loss == "integer" else 1.0
        return losses.double() * (unit / self.config.batch_size)

    @property
    def losses(self) -> Tensor:
        """Of the last step."""
        return self._nats(self._losses)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Accuracy in % and mean loss (in float64, of the int8 logits) on the test set."""
        self.model.eval()
        right, loss = 0, 0.0
        for x, y in self.inputs.tests():
            logits = self.model(x)
            right += int((logits.q.argmax(1) == y).sum())
            loss += float(nn.functional.cross_entropy(logits.dequantize(), y, reduction="sum"))
        self.model.train()
        return 100.0 * right / len(self.inputs.test_y), loss / len(self.inputs.test_y)

    def read(self) -> dict[str, Any]:
        """Loss since the last call, the last losses and signs. Reads the device."""
        mean = float(self._nats(self._sum).mean()) / self._count if self._count else None
        zeros = int(self._zeros)
        self._sum.zero_()
        self._zeros.zero_()
        self._count = 0
        return {
            "loss": mean,
            "losses": self.losses.tolist(),
            "projected_gradient": self.zo.signs.tolist(),
            "zero_signs": zeros if not self.model.cut.everything else 0,
            "skipped": self.skipped,
        }

    @property
    def skipped(self) -> int:
        """Integers are always finite."""
        return 0

    def trajectory(self, path: Path) -> Int8TrajectoryLog:
        """The log of this run, begun or gone on with."""
        return Int8TrajectoryLog(path, self.zo, resume=True)

    def probe(self) -> None:
        """One training forward that changes nothing: what a model refuses, it refuses now."""
        self.model(self.inputs.train(self.step_index)[0])
        self.model.forget_forwards()

    # ---- state

    def state(self) -> dict[str, Any]:
        """All that the next step depends on; schedules and data order follow from the step."""
        epoch, place = divmod(self.step_index, self.steps_per_epoch)
        return {
            "step": self.step_index,
            "epoch": epoch,
            "place": place,
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "zo": self.zo.state_dict(),
            "tail": self.tail.state_dict(),
            "losses": self._losses.clone(),
            "sum": self._sum.clone(),
            "zeros": self._zeros.clone(),
            "count": self._count,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same configuration."""
        self.model.load_state_dict(state["model"])
        self.zo.load_state_dict(state["zo"])
        self.tail.load_state_dict(state["tail"])
        self._losses = state["losses"].to(self.device)
        self._sum.copy_(state["sum"])
        self._zeros.copy_(state["zeros"])
        self._count = int(state["count"])
        self.step_index = int(state["step"])


__all__ = ["Int8Learner", "build_int8_network"]
