"""`ZOSGD`: the zeroth-order step, a `torch.optim.Optimizer` over the head."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elasticzo.deferred import Deferred
from elasticzo.groups import check_groups, check_member, check_rates, complete_groups
from elasticzo.losses import check_losses, projected_gradients
from elasticzo.settings import check_long, check_saved
from elasticzo.state import address
from elasticzo.trajectory import TrajectoryLog
from elasticzo.wrapper import ElasticZO
from zo_kernels import update_


@dataclass(frozen=True)
class Targets:
    """What `update_` works on: parameters, and for each its index, group and scale.

    `still` lists (place in `params`, row): padding rows of embeddings, which stay as they are.
    """

    params: list[Tensor]
    tensors: list[int]
    groups: list[int]
    scales: list[float]
    still: list[tuple[int, int]]

    def pick(self, places: set[int]) -> Targets:
        """Some of them, in their order."""
        kept = sorted(places)
        return Targets(
            [self.params[i] for i in kept],
            [self.tensors[i] for i in kept],
            [self.groups[i] for i in kept],
            [self.scales[i] for i in kept],
            [(kept.index(i), row) for i, row in self.still if i in places],
        )


def _update_now(
    model: ElasticZO, targets: Targets, coeff: Tensor, rates: Tensor, decays: Tensor, skip: Tensor
) -> None:
    """One launch; rows that stay are put back."""
    still = [targets.params[i][row] for i, row in targets.still]
    values = [row.clone() for row in still]
    update_(
        *(targets.params, model._key, coeff, rates, decays, skip),
        tensors=targets.tensors,
        groups=targets.groups,
        scales=targets.scales,
        noise=model.noise,
        backend=model.backend,
    )
    for row, value in zip(still, values, strict=True):
        row.copy_(value)


_REPLACED = (
    "head parameter {!r} is not the one this ZOSGD was built on: it was replaced; build ZOSGD "
    "after loading or assigning parameters"
)


_COARSE = (
    "the losses are {}: what L+ and L- differ by may be less than one rounding of them; compute "
    "them in float32, as by pair_losses(loss, outputs.float(), ...)"
)


class ZOSGD(torch.optim.Optimizer):
    """Stochastic gradient descent along the projected gradients of the head.

    `w -= lr * (sum_q clip(g_q, +-clip) / Q * s z_q + weight_decay * w)`, with
    `g_q = (L+_q - L-_q) / (2 eps)`. One launch, one read and one write of every weight; nothing
    waits for the device.

    Args:
        model: the `ElasticZO` whose head it trains.
        lr: learning rate; a number, or a 0-d tensor that a schedule changes in place.
        groups: torch-style dictionaries {"params": [...], "lr": ..., "weight_decay": ...} over head
            parameters; the rest of the head gets the defaults.
        clip: bound on |g_q|, in loss per unit of z; None is unbounded.
        weight_decay: of the defaults.
        defer: leave the update to the next training forward, which reads and writes the weights
            once for both; bit-equal. `eval()`, `state_dict()` and `head_parameters()` of the model
            apply it first; before reading or writing weights any other way, call `model.flush()`.
    Raises: ValueError, TypeError that name what was expected and what came.
    Source: arXiv:2501.04287 (w -= lr g z).
    """

    def __init__(
        self,
        model: ElasticZO,
        lr: float | Tensor,
        groups: Sequence[dict[str, Any]] | None = None,
        clip: float | None = None,
        weight_decay: float = 0.0,
        defer: bool = False,
    ) -> None:
        if not isinstance(model, ElasticZO):
            raise TypeError(f"model must be an ElasticZO, got {type(model).__name__}")
        if clip is not None and not clip > 0.0:
            raise ValueError(f"clip must be > 0 or None, got {clip}")
        self.model = model
        self.clip = clip
        self.defer = defer
        self._log: TrajectoryLog | None = None
        self._last_read_skips = 0
        self._warned = False  # of losses that are too coarse
        self._cached: tuple[Any, Targets] | None = None
        self._parts: tuple[Targets, Targets, Targets] | None = None
        self._settings: dict[str, tuple[Tensor, list[Any]]] = {}
        super().__init__(complete_groups(model, groups), {"lr": lr, "weight_decay": weight_decay})
        check_rates(self.param_groups)
        self._known = {id(p) for group in self.param_groups for p in group["params"]}
        device = model._key.device
        self._skips = torch.zeros((), dtype=torch.int64, device=device)
        self.projected_gradient = torch.zeros(model.queries, dtype=torch.float64, device=device)

    # ---- the step

    @torch.no_grad()
    def step(self, losses: Any = None) -> None:  # type: ignore[override]
        """Update the head from the losses of the halves, and go on to the next `z`.

        Losses that are not finite skip the step: weights, and buffers since the last step, are
        bit-identical to before; `skipped` counts it.

        Args:
            losses: `[2Q]` scalars of any origin; the mean over micro-batches where there were more.
        Raises: RuntimeError without a forward since the last step, or when a parameter was replaced
            or moved since; ValueError for another number of losses.
        """
        model = self.model
        losses = self._take(losses)
        self._check_ready()
        found = (~torch.isfinite(losses).all()).to(torch.float32)
        if model._gated:
            found = torch.maximum(found, model._found)
        rates, decays = self._rates()
        if model.cut.everything:
            self.projected_gradient.zero_()
        else:
            self._update(losses, rates, decays, found)
        if model._before is not None and model._moving:
            model._before.restore_where(found != 0)
        if self._log is not None:
            self._log.record(model._key[1], found, rates, decays, losses)
        self._skips = self._skips.to(found.device)  # the model may have moved
        self._skips += found.to(torch.int64)
        model._last_found.copy_(found)
        model._stepped = True
        model._key.add_(model._next)
        model._forget_forwards()

    def _update(self, losses: Tensor, rates: Tensor, decays: Tensor, found: Tensor) -> None:
        model = self.model
        g = projected_gradients(losses, model._eps)
        self.projected_gradient = g
        coeff = (g if self.clip is None else g.clamp(-self.clip, self.clip)) / model.queries
        targets = self._targets()
        if self.defer:
            targets, later = self._split(targets)
            self._waiting(later).put(model._key, coeff, rates, decays, found)
        if targets.params:
            _update_now(model, targets, coeff, rates, decays, found)

    def _split(self, targets: Targets) -> tuple[Targets, Targets]:
        """Targets to update now (embeddings with a row that stays) and those that can wait."""
        if self._parts is None or self._parts[0] is not targets:
            now = {i for i, _ in targets.still}
            self._parts = (
                targets,
                targets.pick(now),
                targets.pick({*range(len(targets.params))} - now),
            )
        return self._parts[1], self._parts[2]

    def _waiting(self, targets: Targets) -> Deferred:
        """Where the update waits; made anew when the targets changed."""
        model, there = self.model, self.model._deferred
        if there is None or there.targets is not targets:
            model.flush()
            groups = len(self.param_groups)
            how = (model._key.device, model.noise, model.backend)
            there = Deferred(targets, model.queries, groups, *how)
            model._deferred = there
        return there

    def _targets(self) -> Targets:
        """Head parameters with their index, group and scale. Those of scale 0 take no part, unless
        weight decay is to shrink them."""
        decays = tuple(float(group["weight_decay"]) for group in self.param_groups)
        members = tuple(tuple(map(id, group["params"])) for group in self.param_groups)
        if self._cached is None or self._cached[0] != (decays, members):
            self._cached = ((decays, members), self._find_targets(decays))
        return self._cached[1]

    def _find_targets(self, decays: tuple[float, ...]) -> Targets:
        group_of = {id(p): i for i, g in enumerate(self.param_groups) for p in g["params"]}
        found = Targets([], [], [], [], [])
        for name, p in self.model._head():
            head = self.model._plan.parameters[name]
            group = group_of.get(id(p))
            if group is None:
                raise RuntimeError(_REPLACED.format(name))
            if head.scale != 0.0 or decays[group] != 0.0:
                if head.still_row is not None:
                    found.still.append((len(found.params), head.still_row))
                found.params.append(p)
                found.tensors.append(head.index)
                found.groups.append(group)
                found.scales.append(head.scale)
        return found

    def _take(self, losses: Any) -> Tensor:
        model = self.model
        if losses is None:
            raise TypeError("zo.step needs the losses of the halves: zo.step(losses)")
        if callable(losses):
            raise TypeError("zo.step takes losses, not a closure")
        if not isinstance(losses, Tensor):
            losses = torch.as_tensor(losses, dtype=torch.float64)
        losses = losses.detach()
        if not losses.is_floating_point():
            losses = losses.to(torch.float64)
        check_losses(losses, model.halves)
        if losses.dtype.itemsize < 4 and not (self._warned or model.cut.everything):
            self._warned = True
            warnings.warn(_COARSE.format(losses.dtype), stacklevel=5)  # torch wraps `step` twice
        on_device: Tensor = losses.to(model._key.device, non_blocking=True)
        return on_device

    def _check_ready(self) -> None:
        model = self.model
        if model._micro_batches == 0:
            raise RuntimeError(
                "zo.step without a training forward since the last step: call model(x) in train() "
                "first"
            )
        for (name, p), seen in zip(model._head(), model._seen, strict=True):
            if id(p) not in self._known:
                raise RuntimeError(_REPLACED.format(name))
            if (id(p), address(p)) != seen:
                raise RuntimeError(
                    f"head parameter {name!r} was replaced or moved between the forward and "
                    "zo.step: the losses belong to other weights"
                )

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Learning rates and weight decays of the groups: `[G]` float64 on the device."""
        return self._on_device("lr"), self._on_device("weight_decay")

    def _on_device(self, name: str) -> Tensor:
        """A setting of all groups as one device tensor, written again only when one changed."""
        values = [group[name] for group in self.param_groups]
        kept, kept_values = self._settings.get(name, (None, None))
        if any(isinstance(v, Tensor) for v in values):
            # Tensors are read on the device at every step: a schedule moves them in place.
            device = self.model._key.device
            wide = [torch.as_tensor(v, dtype=torch.float64, device=device) for v in values]
            return torch.stack(wide)
        if kept is None or kept.device != self.model._key.device:
            kept = torch.tensor(values, dtype=torch.float64, device=self.model._key.device)
        elif kept_values != values:
            for i, value in enumerate(values):
                kept[i].fill_(value)  # a launch with the number in it: nothing is copied, or waits
        self._settings[name] = (kept, values)
        return kept

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch builds the groups by it; parameters outside of the head are refused."""
        params = check_member("param_group", param_group, self.model)
        super().add_param_group({**param_group, "params": params})

    # ---- what happened

    @property
    def skipped(self) -> int:
        """Steps skipped for losses that were not finite. Reads the device; warns of new ones."""
        count = int(self._skips)
        if count > self._last_read_skips:
            warnings.warn(
                f"{count - self._last_read_skips} zeroth-order step(s) were skipped: a loss was "
                "NaN or infinite",
                stacklevel=2,
            )
        self._last_read_skips = count
        return count

    def attach(self, log: TrajectoryLog | None) -> None:
        """Write every step from now on to a trajectory log (None detaches)."""
        self._log = log

    # ---- state

    def _run(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        model = self.model
        return {
            "eps": model.eps,
            "noise": model.noise,
            "queries": model.queries,
            "clip": self.clip,
            "scale": {name: head.scale for name, head in model._plan.parameters.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """torch's state, and under "zo" what the next step depends on: seed, step, settings."""
        model = self.model
        model.flush()
        state = super().state_dict()
        here = {"seed": model.seed, "step": model.step_index, "skipped": int(self._skips)}
        state["zo"] = here | self._run()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run: the noise goes on where it stood.

        Raises: ValueError where an entry is missing, unknown or out of range, or where the groups,
            eps, noise, queries, clip or scale are not those of the saved run; nothing is loaded
            then.
        """
        check_saved("ZOSGD", state_dict, ("state", "param_groups", "zo"), {"state": {}}, more=True)
        saved, model = state_dict["zo"], self.model
        check_saved(
            "ZOSGD under 'zo'", saved, ("seed", "step", "skipped", *self._run()), self._run()
        )
        for name in ("seed", "step", "skipped"):
            check_long(name, saved[name])
        check_groups(state_dict["param_groups"])
        model = self.model
        model.flush()
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        model._seed = saved["seed"]
        model._key.copy_(torch.tensor([model.seed, saved["step"]], dtype=torch.int64))
        self._skips.fill_(saved["skipped"])
        self._last_read_skips = saved["skipped"]
        model._forget_forwards()

    def __getstate__(self) -> dict[str, Any]:
        # A copy writes no log, and finds its own parameters; a scheduler's patch of `step` stays.
        left: dict[str, Any] = {"_log": None, "_cached": None, "_parts": None, "_known": set()}
        return {k: v for k, v in self.__dict__.items() if k != "step"} | left

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = {id(p) for group in self.param_groups for p in group["params"]}


__all__ = ["ZOSGD"]
