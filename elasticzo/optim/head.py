"""Optimisers of the head: a `torch.optim.Optimizer` over it, for any rule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elasticzo.directions import Move, apply_, rows_stay
from elasticzo.head import Target
from elasticzo.losses import as_losses, check_losses
from elasticzo.module import ZOModule
from elasticzo.optim.groups import (
    check_groups,
    check_member,
    check_rates,
    check_state,
    complete_groups,
)
from elasticzo.optim.header import describe_head, first_weights
from elasticzo.optim.numbers import DeviceNumbers, reach
from elasticzo.optim.step import Log, Step
from elasticzo.overlap import check_apart
from elasticzo.session import REPLACED, Pending
from elasticzo.settings import check_saved
from zo_kernels import RULES

FORMAT = "elasticzo-trajectory-2"
_COARSE = (
    "the losses are {}: what L+ and L- differ by may be less than one rounding of them; compute "
    "them in float32, as by pair_losses(loss, outputs.float(), ...)"
)


class HeadOptimizer(Step, torch.optim.Optimizer):  # type: ignore[misc]  # of `step`
    """`w <- rule(w, sum_q clip(g_q, +-clip) / Q * s z_q + weight_decay * w)` on the head.

    One launch, one read and one write of every weight and of what the rule keeps for it; nothing
    waits for the device. `state[p]` is as torch's optimisers keep it.

    Attributes:
        rule: one of `zo_kernels.RULES`. A subclass names it, and says what its numbers are.
    """

    rule = "sgd"

    def __init__(
        self,
        model: ZOModule,
        defaults: dict[str, Any],
        groups: Sequence[dict[str, Any]] | None,
        clip: float | None,
        defer: bool,
    ) -> None:
        if not isinstance(model, ZOModule) or model.integer:
            raise TypeError(f"model must be an ElasticZO, got {type(model).__name__}")
        if clip is not None and not clip > 0.0:
            raise ValueError(f"clip must be > 0 or None, got {clip}")
        if clip is not None and model.estimator.feedback is not None:
            raise ValueError(f"clip bounds g, which learnt feedback does not have: got {clip}")
        self.model, self.clip, self.defer = model, clip, defer
        self.log: Log | None = None
        self._last_read_skips = 0
        self._warned = False  # of losses that are too coarse
        self._cached: tuple[Any, list[Target]] | None = None
        self._parts: tuple[list[Target], list[int], list[int], list[Target]] | None = None
        self._few: tuple[list[Target], list[int], list[Target]] | None = None
        self._on = DeviceNumbers()
        self._entries = tuple(defaults)  # of a group; torch adds to `defaults` when it loads
        super().__init__(complete_groups(model, groups, defaults), defaults)
        self._check_numbers(self.param_groups)
        self._known = {id(p) for group in self.param_groups for p in group["params"]}
        check_apart(model.get_submodule("module"), model.head.named())  # assigned since, maybe
        model.session.skips.zero_()
        shape, device = model.queries, model.session.device
        self.projected_gradient = torch.zeros(shape, dtype=torch.float64, device=device)

    # ---- the rule

    def numbers(self, group: dict[str, Any]) -> list[float]:
        """The numbers of a group that the rule reads, besides lr and weight_decay."""
        return []

    def take_numbers(self, group: dict[str, Any], numbers: Sequence[float]) -> None:
        """Set them, as a log has them."""

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for numbers of a group that the rule cannot have."""

    def settings(self, targets: Sequence[Target], found: Tensor) -> Tensor | None:
        """The rule's numbers, `[T, n]` float64, a row a target."""
        if not RULES[self.rule].settings:
            return None
        groups = self._numbers()
        return torch.stack([groups[t.group] for t in targets])

    def _numbers(self) -> Tensor:
        """Of all groups, `[G, n]`."""
        flat = [number for group in self.param_groups for number in self.numbers(group)]
        return self._on_device("numbers", flat).view(len(self.param_groups), -1)

    def state_of(self, p: Tensor) -> tuple[Tensor, ...]:
        """What the rule keeps for a weight, made when it is first asked for."""
        names = RULES[self.rule].state
        if not names:
            return ()
        state = self.state[p]
        for name in names:  # a weight may have moved since
            there = name in state
            state[name] = state[name].to(p) if there else torch.zeros_like(p)
        return tuple(state[name] for name in names)

    # ---- the update

    @torch.no_grad()
    def update_from(self, losses: Tensor, found: Tensor) -> None:
        """The update of a step alone, from the losses of its points: what a replay does."""
        estimator = self.model.estimator
        if not self.model.cut.everything:
            g = estimator.project(losses, self.model.session.eps)
            self._update(estimator.coefficients(g, self.clip), found)

    def _update(self, a: Tensor, found: Tensor) -> None:
        model, targets = self.model, self._targets()
        if not targets:  # an empty head, or scale 0 everywhere
            return
        rates, decays = self.rates()
        settings = self.settings(targets, found)
        mean = a if a.dim() == 1 else a.mean(1)
        move = Move(model.session.key, mean, rates, decays, found, self.rule, settings)
        places = self._dense(targets)
        if len(places) < len(targets):
            self._learn(targets, places, move, a, found)
            if self._few is None or self._few[0] is not targets or self._few[1] != places:
                self._few = (targets, places, [targets[i] for i in places])
            targets, move = self._few[2], move.of(places)
        if self.defer:
            targets, move = self._wait(targets, move)
        if targets:
            model.estimator.direction.update_(targets, move, model.backend)

    def _dense(self, targets: Sequence[Target]) -> list[int]:
        """Places of those that are learnt by noise of their own elements."""
        kinds = self.model.head.kinds
        return [i for i, t in enumerate(targets) if kinds[t.head.name].name == "weight"]

    def _learn(
        self, targets: list[Target], dense: list[int], move: Move, a: Tensor, found: Tensor
    ) -> None:
        """Update the others, each as soon as its estimate is there; those that nothing was
        learnt of meet their weight decay alone."""
        left = {t.head.name: (i, t) for i, t in enumerate(targets) if i not in set(dense)}

        def take(name: str, u: Tensor | None) -> None:
            if name not in left:
                return
            i, t = left.pop(name)
            wide = torch.promote_types(t.w.dtype, torch.float32)
            u = torch.zeros_like(t.w, dtype=wide) if u is None else u.to(wide)
            with rows_stay([t]):
                apply_(t, u, move.of([i]), self.model.backend)

        self.model.learn(a, found, take)
        for name in list(left):
            take(name, None)

    def _wait(self, targets: list[Target], move: Move) -> tuple[list[Target], Move]:
        """Leave the update to the next forward; what cannot wait (embeddings with a row that
        stays) is returned."""
        if self._parts is None or self._parts[0] is not targets:
            now = [i for i, t in enumerate(targets) if t.head.still_row is not None]
            later = [i for i, t in enumerate(targets) if t.head.still_row is None]
            self._parts = (targets, now, later, [targets[i] for i in later])
        _, now, later, waiting = self._parts
        session, delayed = self.model.session, move.of(later)
        if session.pending is None or session.pending.targets is not waiting:
            session.flush()
            direction = self.model.estimator.direction
            session.pending = Pending(waiting, direction, delayed, self.model.backend)
        session.pending.put(delayed)
        return [targets[i] for i in now], move.of(now)

    def _targets(self) -> list[Target]:
        """Head parameters with their group. Those of scale 0 take no part, unless weight decay is
        to shrink them."""
        decays = tuple(float(group["weight_decay"]) for group in self.param_groups)
        members = tuple(tuple(map(id, group["params"])) for group in self.param_groups)
        if self._cached is None or self._cached[0] != (decays, members) or not self._current():
            self._cached = ((decays, members), self._find_targets(decays))
        return self._cached[1]

    def _current(self) -> bool:
        """Whether the state of the targets is what stands in `state`: it is a user's to change."""
        names = RULES[self.rule].state
        return not names or all(
            s is self.state[t.w].get(name) and s.dtype == t.w.dtype
            for t in (self._cached[1] if self._cached else ())
            for name, s in zip(names, t.state, strict=True)
        )

    def _find_targets(self, decays: tuple[float, ...]) -> list[Target]:
        return [
            Target(p, head, group, self.state_of(p))
            for (head, p), group in zip(self.model.head, self._groups(), strict=True)
            if head.scale != 0.0 or decays[group] != 0.0
        ]

    def _groups(self) -> list[int]:
        """The place of the group of each weight of the head."""
        group_of = {id(p): i for i, g in enumerate(self.param_groups) for p in g["params"]}
        for head, p in self.model.head:
            if id(p) not in group_of:
                raise RuntimeError(REPLACED.format(head.name))
        return [group_of[id(p)] for _, p in self.model.head]

    def _take(self, losses: Any) -> Tensor:
        model = self.model
        losses = as_losses(losses)
        check_losses(losses, model.halves, model.session.samples if model.reduction else None)
        if losses.dtype.itemsize < 4 and not (self._warned or model.cut.everything):
            self._warned = True
            warnings.warn(_COARSE.format(losses.dtype), stacklevel=5)  # torch wraps `step` twice
        on_device: Tensor = losses.to(model.session.device, non_blocking=True)
        return on_device

    def _not_finite(self, losses: Tensor, a: Tensor | None = None) -> Tensor:
        """Besides the losses: the largest steps they come to, and rates that live on the device."""
        if a is None:
            return self.model.session.not_finite(losses)
        scale = max((one.scale for one in self.model.head.parameters.values()), default=1.0)
        more = reach(a, *self.rates(), self.param_groups, scale, self.rule)
        return self.model.session.not_finite(losses, *more)

    def _check_ready(self) -> None:
        self.model.check_held()
        self.model.session.check_ready(self.model.head, self._known)

    def rates(self) -> tuple[Tensor, Tensor]:
        """Learning rates and weight decays of the groups: `[G]` float64 on the device."""
        names = ("lr", "weight_decay")
        lr, decay = (self._on_device(n, [g[n] for g in self.param_groups]) for n in names)
        return lr, decay

    def _on_device(self, name: str, values: list[Any]) -> Tensor:
        return self._on.of(name, values, self.model.session.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch builds the groups by it; parameters outside of the head are refused."""
        params = check_member("param_group", param_group, self.model)
        if self.log is not None:
            raise RuntimeError("a log is attached, which has the groups it began with: detach it")
        super().add_param_group({**param_group, "params": params})
        self._check_numbers(self.param_groups[-1:])

    def _check_numbers(self, groups: Sequence[dict[str, Any]]) -> None:
        check_rates(groups)
        for group in groups:
            self.check_group(group)

    # ---- what happened

    @property
    def skipped(self) -> int:
        """Steps skipped for what was not finite. Reads the device; warns of new ones."""
        count = int(self.model.session.skips)
        if count > self._last_read_skips:
            warnings.warn(
                f"{count - self._last_read_skips} zeroth-order step(s) were skipped: a loss, or "
                "the step that it leads to, was NaN or infinite",
                stacklevel=2,
            )
        self._last_read_skips = count
        return count

    def header(self) -> dict[str, Any]:
        """All that a replay depends on."""
        model = self.model
        model.flush()
        head = zip(describe_head(model.head), self._groups(), strict=True)
        return {
            "format": FORMAT,
            "seed": model.seed,
            "start": model.step_index,
            **self._run(),
            **self._directions(model.head.settled()),
            "head": [one | {"group": group} for one, group in head],
            "first_weights": first_weights(model.head),
            "backend": model.backend,
            **self._fresh(),
        }

    def _fresh(self) -> dict[str, bool]:
        """Whether what the rule keeps is zero, where it keeps something. Reads the device."""
        if not RULES[self.rule].state:
            return {}
        kept = [t for state in self.state.values() for t in state.values()]
        return {"fresh": not any(bool(t.any()) for t in kept)}

    def fields(self) -> dict[str, type]:
        kinds = {"step": int, "lr": float, "weight_decay": float, "losses": float, "skipped": int}
        return kinds | ({"numbers": float} if RULES[self.rule].settings else {})

    def entry(self, step: Tensor, found: Tensor, losses: Tensor) -> dict[str, Any]:
        lr, decay = self.rates()
        of_step = {"step": step, "lr": lr, "weight_decay": decay}
        of_step |= {"losses": losses, "skipped": found}
        return of_step | (
            {"numbers": self._numbers().flatten()} if RULES[self.rule].settings else {}
        )

    # ---- state

    def _run(self) -> dict[str, Any]:
        """What must be the same when a run goes on: of the step as it is, and of one that is not
        the paper's, its estimator and rule."""
        model, estimator = self.model, self.model.estimator
        found = {
            "eps": model.session.scale,
            "noise": estimator.noise,
            "queries": model.queries,
            "clip": self.clip,
        }
        if estimator.name != "spsa":
            found["estimator"] = estimator.describe()
        if self.rule != "sgd":
            found["rule"] = self.rule
        return found

    def _fixed(self) -> dict[str, Any]:
        head = self.model.head
        scales = {name: one.scale for name, one in head.parameters.items()}
        return self._run() | {"scale": scales} | self._directions(head.asked())

    def _directions(self, kinds: Mapping[str, str]) -> dict[str, Any]:
        """By whose noise weights are learnt, where that is not their own elements'."""
        others = {name: kind for name, kind in kinds.items() if kind != "weight"}
        if not others:
            return {}
        samples = self.model.estimator.samples
        return {"directions": {"kinds": others, "noise": samples.noise, "group": samples.group}}

    def state_dict(self) -> dict[str, Any]:
        """torch's state, and under "zo" what the next step depends on: seed, step, settings."""
        model = self.model
        model.flush()
        state = super().state_dict()
        here = {"seed": model.seed, "step": model.step_index, **model.session.saved()}
        state["zo"] = here | self._fixed()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run: the noise goes on where it stood.

        Raises: ValueError where an entry is missing, unknown or out of range, or where the groups,
            eps, noise, queries, clip or scale are not those of the saved run; nothing is loaded
            then.
        """
        of, model = type(self).__name__, self.model
        fixed: dict[str, Any] = {} if RULES[self.rule].state else {"state": {}}
        check_saved(of, state_dict, ("state", "param_groups", "zo"), fixed, more=True)
        saved, now = state_dict["zo"], self._fixed()
        numbers = ("seed", "step", *model.session.saved())
        check_saved(f"{of} under 'zo'", saved, (*numbers, *now), now)
        model.session.check(saved)
        check_groups(of, state_dict["param_groups"], self._entries)
        self._check_numbers(state_dict["param_groups"])
        kept = (RULES[self.rule].state, self.counted)
        check_state(of, state_dict["state"], self.param_groups, *kept)
        model.flush()
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "zo"})
        for state in self.state.values():  # torch may share the tensors of what was given
            state |= {k: v.to(model.session.device, copy=True) for k, v in state.items()}
        self._cached = None
        model.go_to(saved["seed"], saved["step"])
        model.session.load(saved)
        self._last_read_skips = saved["skipped"]

    counted: tuple[str, ...] = ()  # what `state_of` keeps besides

    def __getstate__(self) -> dict[str, Any]:
        # A copy writes no log, and finds its own parameters; a scheduler's patch of `step` stays.
        left: dict[str, Any] = {
            "log": None,
            "_cached": None,
            "_parts": None,
            "_few": None,
            "_known": set(),
        }
        return {k: v for k, v in self.__dict__.items() if k != "step"} | left

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = {id(p) for group in self.param_groups for p in group["params"]}
