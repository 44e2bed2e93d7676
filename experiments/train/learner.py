"""Model, optimisers and data of one run: a step, a test, and the state between two steps."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, pair_losses
from elasticzo.cut import resolve_cut
from elasticzo.data import (
    CLOUD_SETS,
    CloudData,
    load_clouds,
    load_images,
    rotate_images,
    shuffled,
)
from experiments.train.config import TrainConfig
from experiments.train.inputs import Samples, float_inputs
from experiments.train.resolve import build_model, check_sizes, library_tail
from experiments.train.schedules import factor

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
HOLD_OUT_SEED = 0  # every run of every seed keeps the same samples out


@lru_cache(maxsize=4)
def _read(name: str, folder: Path | None, download: bool, rotate: float | None) -> Samples:
    """A few data sets stay in memory: a study reads and turns them once."""
    if name in CLOUD_SETS:
        assert folder is not None
        return load_clouds(name, folder)
    if rotate is None:
        return load_images(name, folder, download)
    data = _read(name, folder, download, None)
    train_x, test_x = rotate_images(data.train_x, rotate), rotate_images(data.test_x, rotate)
    return replace(data, train_x=train_x, test_x=test_x)


def load_data(config: TrainConfig) -> Samples:
    """The data set of a run on its device (images uint8), split as configured."""
    data = _read(config.data, config.data_dir, config.download, config.rotate)
    if config.hold_out:
        data = data.hold_out(config.hold_out, HOLD_OUT_SEED)
    if config.train_images is not None:
        if config.train_images > len(data.train_x):
            raise ValueError(
                f"train_images must be in [1, {len(data.train_x)}], got {config.train_images}"
            )
        data = _first(data, config.train_images)
    check_sizes(config, data)
    parts = ("train_x", "train_y", "test_x", "test_y")
    return replace(data, **{k: getattr(data, k).to(config.device) for k in parts})


def _first(data: Samples, count: int) -> Samples:
    """The first training images; of clouds, whose files may be sorted by class, a fixed pick."""
    keep = torch.arange(count)
    if isinstance(data, CloudData):
        keep = torch.from_numpy(shuffled(len(data.train_x), HOLD_OUT_SEED))[:count]
    return replace(data, train_x=data.train_x[keep], train_y=data.train_y[keep])


def build_network(config: TrainConfig) -> ElasticZO:
    """The wrapped network of a resolved configuration, with weights that its seed decides."""
    torch.manual_seed(config.seed)
    assert config.tail is not None
    assert config.eps is not None and config.noise is not None
    net = build_model(config)
    tail = library_tail(config.tail)
    if config.method.startswith("frozen-"):
        frozen = resolve_cut(net, tail).head_parameters
        for name, p in net.named_parameters():
            if name in frozen:
                p.requires_grad_(False)
        tail = "all"  # one pass: there is nothing to perturb
    return ElasticZO(
        net.to(config.device),
        tail,
        eps=config.eps,
        noise=config.noise,
        queries=config.queries,
        seed=config.seed,
        pairing=config.pairing,
        backend=config.backend,
        scale=config.scale,
    )


class Learner:
    """What a run learns with.

    Args:
        config: resolved.
        data: of `load_data`.
    """

    def __init__(self, config: TrainConfig, data: Samples) -> None:
        assert config.head_lr is not None and config.tail_lr is not None
        assert config.epochs is not None
        self.config = config
        self.inputs = float_inputs(config, data)
        self.device = torch.device(config.device)
        self.model = build_network(config)
        clip = config.clip if config.clip != float("inf") else None
        self.zo = ZOSGD(
            self.model, config.head_lr, clip=clip, weight_decay=config.head_weight_decay
        )
        self.tail = self._tail_optimizer()
        self.steps_per_epoch = self.inputs.steps_per_epoch
        self.steps = self.steps_per_epoch * config.epochs
        self.step_index = 0
        self.losses = torch.zeros(self.model.halves, device=self.device)
        # Sum of the mean losses since the last line of the log, and how many were finite.
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def _tail_optimizer(self) -> torch.optim.Optimizer | None:
        if not any(True for _ in self.model.tail_parameters()):
            return None
        config = self.config
        settings: dict[str, Any] = {"lr": config.tail_lr, "weight_decay": config.tail_weight_decay}
        assert config.tail_optimizer is not None
        if config.tail_optimizer == "sgd":
            settings["momentum"] = config.tail_momentum
        return self.model.tail_optimizer(OPTIMIZERS[config.tail_optimizer], **settings)

    # ---- the step

    def step(self) -> None:
        """One batch: head and tail move, and nothing waits for the device."""
        self._set_rates()
        x, y = self.inputs.train(self.step_index)
        with self._autocast():
            losses = pair_losses(cross_entropy, self.model(x), y)
        self.model.backward(losses, self._tail_source(x, y))
        if self.tail is not None:
            self.tail.step()
            self.tail.zero_grad()
        self.zo.step(self.head_losses(losses))
        self.losses = losses.detach()
        mean = self.losses.mean(dtype=torch.float64)
        finite = torch.isfinite(mean)
        self.sums += torch.stack([torch.where(finite, mean, 0.0), finite.to(torch.float64)])
        self.step_index += 1

    def _tail_source(self, x: Tensor, y: Tensor) -> str | Tensor:
        """What `model.backward` takes; the third pass is left out where it would feed nothing, or
        where the one pass is clean."""
        if self.config.tail_source != "clean":
            return self.config.tail_source or "mean"
        if self.tail is None or self.model.halves == 1:
            return "mean"
        with self._autocast():
            return pair_losses(cross_entropy, self.model.clean_forward(x), y)[0]

    def head_losses(self, losses: Tensor) -> Tensor:
        """What the head's step sees of the losses `[halves]`."""
        return losses

    def rates(self) -> tuple[float, float]:
        """Learning rates of head and tail at the present step."""
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

    def _set_rates(self) -> None:
        head, tail = self.rates()
        for group in self.zo.param_groups:
            group["lr"] = head
        for group in self.tail.param_groups if self.tail is not None else []:
            group["lr"] = tail

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    # ---- what came of it

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Accuracy in % and mean loss on the test set."""
        self.model.eval()
        found = torch.zeros(2, dtype=torch.float64, device=self.device)
        for x, y in self.inputs.tests():
            with self._autocast():
                logits = self.model(x)
                loss = cross_entropy(logits, y, reduction="sum")
            found += torch.stack([(logits.argmax(1) == y).sum(), loss]).double()
        self.model.train()
        right, loss_sum = (found / len(self.inputs.test_y)).tolist()
        return 100.0 * right, loss_sum

    def read(self) -> dict[str, Any]:
        """Loss since the last call, the last losses and projected gradients. Reads the device."""
        total, count = self.sums.tolist()
        self.sums.zero_()
        return {
            "loss": total / count if count else None,
            "losses": self.losses.tolist(),
            "projected_gradient": self.zo.projected_gradient.tolist(),
            "skipped": self.skipped,
        }

    @property
    def skipped(self) -> int:
        """Steps skipped for losses that were not finite; the report says it, not a warning."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.zo.skipped

    def trajectory(self, path: Path) -> TrajectoryLog:
        """The log of this run, begun or gone on with."""
        return TrajectoryLog(path, self.zo, resume=True)

    def probe(self) -> None:
        """One training forward that changes nothing: what a model refuses, it refuses now."""
        state = self.state()
        with self._autocast():
            self.model(self.inputs.train(self.step_index)[0])
        self.load(state)

    # ---- state

    def state(self) -> dict[str, Any]:
        """All that the next step depends on; rates and data order follow from the step."""
        epoch, place = divmod(self.step_index, self.steps_per_epoch)
        return {
            "step": self.step_index,
            "epoch": epoch,
            "place": place,
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "zo": self.zo.state_dict(),
            "tail": self.tail.state_dict() if self.tail is not None else None,
            "losses": self.losses.clone(),
            "sums": self.sums.clone(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same configuration."""
        self.model.load_state_dict(state["model"])
        self.zo.load_state_dict(state["zo"])
        if self.tail is not None:
            self.tail.load_state_dict(state["tail"])
        self.losses = state["losses"].to(self.device)
        self.sums.copy_(state["sums"])
        self.step_index = int(state["step"])


__all__ = ["Learner", "build_network", "load_data"]
