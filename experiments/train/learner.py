"""What a run learns with: model, optimisers and data; a step, a test, the state between two steps.

Floats and integers differ in how a batch is learnt, in what plays the learning rates, and in what
is counted between two lines of the log.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from elasticzo import ElasticZO, TrajectoryLog, pair_losses
from elasticzo.int8 import ElasticZOInt8, Int8Tail, Int8Tensor, Int8TrajectoryLog, Int8ZO
from elasticzo.optim import HeadOptimizer
from experiments.train.config import TrainConfig
from experiments.train.data import Samples
from experiments.train.directions import by_feedback, kinds_of, replay_of
from experiments.train.inputs import Inputs, float_inputs, int8_inputs
from experiments.train.local import LocalNet
from experiments.train.network import build_int8_network, build_network
from experiments.train.optimizers import head_optimizer, tail_optimizer
from experiments.train.schedules import factor


class Learner(ABC):
    """What both arithmetics share.

    Attributes:
        counted: tensors of a step and since the last line of the log, named as a checkpoint has
            them.
    """

    model: ElasticZO | ElasticZOInt8
    zo: HeadOptimizer | Int8ZO
    tail: torch.optim.Optimizer | Int8Tail | None
    counted: dict[str, Tensor]

    def __init__(self, config: TrainConfig, inputs: Inputs[Any]) -> None:
        assert config.epochs is not None
        self.config, self.inputs = config, inputs
        self.device = torch.device(config.device)
        self.steps_per_epoch = inputs.steps_per_epoch
        self.steps = self.steps_per_epoch * config.epochs
        self.step_index = 0

    def step(self) -> None:
        """One batch: head and tail move, and nothing waits for the device."""
        self.follow_schedule()
        self.learn(*self.inputs.train(self.step_index))
        self.step_index += 1

    @abstractmethod
    def follow_schedule(self) -> None:
        """Set what the present step wants of the optimisers."""

    @abstractmethod
    def learn(self, x: Any, y: Tensor) -> None: ...

    @abstractmethod
    def rates(self) -> tuple[float, float]:
        """What head and tail learn with at the present step."""

    def forward(self, x: Any) -> Any:
        """The model on a batch, in the precision of the run."""
        return self.model(x)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Accuracy in % and mean loss on the test set."""
        self.model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        whole = torch.zeros((), dtype=torch.float64, device=self.device)
        for x, y in self.inputs.tests():
            logits, loss = self.test(x, y)
            right += (logits.argmax(1) == y).sum()
            whole += loss
        self.model.train()
        count = len(self.inputs.test_y)
        return self.percent(int(right), count), float(whole) / count

    @abstractmethod
    def test(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the sum of the losses."""

    def percent(self, right: int, count: int) -> float:
        return 100.0 * (right / count)

    @property
    @abstractmethod
    def losses(self) -> Tensor:
        """Of the last step."""

    @abstractmethod
    def read(self) -> dict[str, Any]:
        """Loss since the last call, the last losses and what they said. Reads the device."""

    @property
    def skipped(self) -> int:
        """Steps skipped for losses that were not finite."""
        return 0

    @abstractmethod
    def trajectory(self, path: Path) -> TrajectoryLog | Int8TrajectoryLog | None:
        """The log of this run, begun or gone on with; None where none could be replayed."""

    def kinds(self) -> dict[str, str]:
        """By whose noise each weight is learnt, where that is not its own elements'."""
        return {}

    def replay(self) -> str | None:
        """What rebuilds the head where the log and the first weights alone do not."""
        return None

    def probe(self) -> None:
        """One training forward that changes nothing: what a model refuses, it refuses now."""
        state = self.state()
        self.forward(self.inputs.train(self.step_index)[0])
        self.load(state)

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
            "tail": self.tail.state_dict() if self.tail is not None else None,
            **{name: t.clone() for name, t in self.counted.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same configuration."""
        self.model.load_state_dict(state["model"])
        self.zo.load_state_dict(state["zo"])
        if self.tail is not None:
            self.tail.load_state_dict(state["tail"])
        for name, t in self.counted.items():
            t.copy_(torch.as_tensor(state[name]))
        self.step_index = int(state["step"])


class FloatLearner(Learner):
    """Floats: what is counted is the sum of the mean losses, and how many were finite.

    Args:
        config: resolved, of precision fp32 or bf16.
        data: of `load_data`.
    """

    model: ElasticZO
    zo: HeadOptimizer
    tail: torch.optim.Optimizer | None

    def __init__(self, config: TrainConfig, data: Samples) -> None:
        super().__init__(config, float_inputs(config, data))
        self.model = build_network(config)
        self.zo = head_optimizer(config, self.model)
        self.tail = tail_optimizer(config, self.model)
        self.counted = {
            "losses": torch.zeros(self.model.halves, device=self.device),
            "sums": torch.zeros(2, dtype=torch.float64, device=self.device),
        }

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Any:
        with self._autocast():
            return self.model(x)

    def learn(self, x: Tensor, y: Tensor) -> None:
        with self._autocast():
            given = {"reduction": self.model.reduction}
            losses = pair_losses(cross_entropy, self.model(x), y, **given)
        self.model.backward(losses, self._tail_source(x, y, losses))
        head_first = by_feedback(self.config)  # its noisy pass meets the tail of the clean one
        if head_first:
            self.zo.step(self.head_losses(losses))
        if self.tail is not None:
            self.tail.step()
            self.tail.zero_grad()
        if not head_first:
            self.zo.step(self.head_losses(losses))
        losses = losses.detach()
        self.counted["losses"] = losses if losses.dim() == 1 else losses.mean(1)
        mean = self.losses.mean(dtype=torch.float64)
        finite = torch.isfinite(mean)
        self.counted["sums"] += torch.stack([torch.where(finite, mean, 0.0), finite.double()])

    def _tail_source(self, x: Tensor, y: Tensor, losses: Tensor) -> str | Tensor:
        """What `model.backward` takes; the third pass is left out where it would feed nothing, or
        where the one pass is clean."""
        if isinstance(self.model.module, LocalNet):
            with self._autocast():
                return losses.mean() + self.model.module.local_losses(y)
        if self.config.tail_source != "clean":
            return self.config.tail_source or "mean"
        if self.tail is None or self.model.halves == 1:
            return "mean"
        with self._autocast():
            return pair_losses(cross_entropy, self.model.clean_forward(x), y)[0]

    def head_losses(self, losses: Tensor) -> Tensor:
        """What the head's step sees of the losses `[halves]`, or `[halves, B]` by sample."""
        return losses

    def rates(self) -> tuple[float, float]:
        """Learning rates."""
        c = self.config
        return (
            self._rate(c.head_lr, c.head_schedule, c.head_warmup),
            self._rate(c.tail_lr, c.tail_schedule, c.tail_warmup),
        )

    def _rate(self, lr: float | None, kind: str | None, warmup: float | None) -> float:
        assert lr is not None and kind is not None and warmup is not None
        drop = self.config.step_epochs * self.steps_per_epoch
        steps = int(warmup * self.steps)
        return lr * factor(kind, self.step_index, self.steps, steps, drop, self.config.step_gamma)

    def follow_schedule(self) -> None:
        head, tail = self.rates()
        for group in self.zo.param_groups:
            group["lr"] = head
        for group in self.tail.param_groups if self.tail is not None else []:
            group["lr"] = tail

    def test(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            logits = self.model(x)
            return logits, cross_entropy(logits, y, reduction="sum")

    @property
    def losses(self) -> Tensor:
        return self.counted["losses"]

    def read(self) -> dict[str, Any]:
        total, count = self.counted["sums"].tolist()
        self.counted["sums"].zero_()
        return {
            "loss": total / count if count else None,
            "losses": self.losses.tolist(),
            "projected_gradient": self.zo.projected_gradient.tolist(),
            "skipped": self.skipped,
        }

    @property
    def skipped(self) -> int:
        """The report says it, not a warning."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.zo.skipped

    def kinds(self) -> dict[str, str]:
        return kinds_of(self.model)

    def replay(self) -> str | None:
        return replay_of(self.kinds())

    def trajectory(self, path: Path) -> TrajectoryLog | None:
        if by_feedback(self.config):
            return None
        if self.config.directions == "auto":  # the log says what each layer has
            with self._autocast():
                self.model.settle(self.inputs.train(self.step_index)[0])
        return TrajectoryLog(path, self.zo, resume=True)


class Int8Learner(Learner):
    """Integers: what is counted are the sum of the losses, signs of 0, and steps.

    Args:
        config: resolved, of precision int8.
        data: of `load_data`.
    """

    model: ElasticZOInt8
    zo: Int8ZO
    tail: Int8Tail

    def __init__(self, config: TrainConfig, data: Samples) -> None:
        super().__init__(config, int8_inputs(config, data))
        assert config.b_zo and config.b_bp
        self.model = build_int8_network(config)
        self.zo = Int8ZO(self.model, b_zo=config.b_zo[0])
        self.tail = self.model.tail_optimizer(b_bp=config.b_bp[0])
        dtype = torch.int64 if config.loss == "integer" else torch.float64
        losses = torch.zeros(self.model.halves, dtype=dtype, device=self.device)
        none = torch.zeros((), dtype=torch.int64)
        self.counted = {
            "losses": losses,
            "sum": losses.clone(),
            "zeros": none.to(self.device, copy=True),
            "count": none,
        }

    def learn(self, x: Int8Tensor, y: Tensor) -> None:
        logits = self.model(x)
        losses = self.model.losses(logits, y)
        self.model.backward(logits, y, self.config.tail_source or "plus")
        self.tail.step()
        self.zo.step(losses)
        self.counted["losses"] = losses
        self.counted["sum"] += losses
        self.counted["zeros"] += (self.zo.signs == 0).sum()
        self.counted["count"] += 1

    def rates(self) -> tuple[float, float]:
        """Bits of the updates: what plays the learning rates."""
        assert self.config.b_zo is not None and self.config.b_bp is not None
        return float(self._now(self.config.b_zo)), float(self._now(self.config.b_bp))

    def _now(self, values: Sequence[Any]) -> Any:
        """The value of a schedule at the present step; each serves an equal part of the run."""
        return values[min(self.step_index * len(values) // self.steps, len(values) - 1)]

    def follow_schedule(self) -> None:
        c = self.config
        assert c.r_max and c.p_zero and c.b_zo and c.b_bp
        self.model.set_noise(self._now(c.r_max), self._now(c.p_zero))
        self.zo.b_zo, self.tail.b_bp = self._now(c.b_zo), self._now(c.b_bp)

    def test(self, x: Int8Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Losses in float64, of the int8 logits."""
        logits = self.model(x)
        return logits.q, cross_entropy(logits.dequantize(), y, reduction="sum")

    def percent(self, right: int, count: int) -> float:
        return 100.0 * right / count

    def _nats(self, losses: Tensor) -> Tensor:
        """Mean losses of a sample in nats, float64: for people."""
        unit = math.log(2.0) / 2**self.model.fraction_bits if self.config.loss == "integer" else 1.0
        return losses.double() * (unit / self.config.batch_size)

    @property
    def losses(self) -> Tensor:
        return self._nats(self.counted["losses"])

    def read(self) -> dict[str, Any]:
        whole, zeros, count = (self.counted[name] for name in ("sum", "zeros", "count"))
        found = {
            "loss": float(self._nats(whole).mean()) / int(count) if count else None,
            "losses": self.losses.tolist(),
            "projected_gradient": self.zo.signs.tolist(),
            "zero_signs": int(zeros) if not self.model.cut.everything else 0,
            "skipped": self.skipped,
        }
        for t in (whole, zeros, count):
            t.zero_()
        return found

    def trajectory(self, path: Path) -> Int8TrajectoryLog:
        return Int8TrajectoryLog(path, self.zo, resume=True)


def learner_for(config: TrainConfig, data: Samples) -> Learner:
    """Of the arithmetic of a resolved configuration."""
    return (Int8Learner if config.precision == "int8" else FloatLearner)(config, data)
