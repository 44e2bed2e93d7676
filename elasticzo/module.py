"""What both wrappers are, floats and integers: a cut, a head, an estimator, and a session.

The second half is the loading of a module that has a wrapper inside it. A wrapper's state has the
keys of its model, without `module.` in front. torch loads a module and then, with longer and longer
prefixes, its children; here it finds the model's in place of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.cut import Cut
from elasticzo.directions import Direction
from elasticzo.estimator import Estimator
from elasticzo.head import Head
from elasticzo.session import Session
from zo_kernels import resolve_backend


def place_of(model: nn.Module) -> torch.device:
    """Where a model runs: where its weights are, the CPU for those without values ("meta")."""
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if place.type == "meta" else place


class Ties:
    """Parameters that several modules have: they stay one where torch makes one for each."""

    def __init__(self, model: nn.Module) -> None:
        places: dict[int, list[tuple[nn.Module, str, nn.Parameter]]] = {}
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    places.setdefault(id(p), []).append((module, name, p))
        self.places = [slots for slots in places.values() if len(slots) > 1]

    def restore(self) -> None:
        """The last one that came in place of a shared parameter is in all of its places."""
        for slots in self.places:
            now = [module._parameters[name] for module, name, _ in slots]
            new = [p for p, (*_, before) in zip(now, slots, strict=True) if p is not before]
            for module, name, _ in slots if new else ():
                module._parameters[name] = new[-1]


class ZOModule(nn.Module, ABC):
    """A network whose head is trained by zeroth-order optimisation.

    Attributes:
        cut: which modules are head and tail.
        head: the weights of the head, and what belongs to each.
        estimator: where the network is evaluated, and what the losses make of the directions.
        session: where the run stands.
        wanted_backend: as the user wants it; `backend` is the one that runs.
        integer: whether its arithmetic is.
    """

    cut: Cut
    head: Head
    estimator: Estimator
    session: Session
    wanted_backend: str
    integer = False

    @property
    def backend(self) -> str:
        """The backend that runs on the device of the parameters: triton, numba or reference."""
        return resolve_backend(self.wanted_backend, self.session.device)

    @property
    def seed(self) -> int:
        """Seed of the noise."""
        return self.session.seed

    @property
    def step_index(self) -> int:
        """Steps done, skipped ones included. Reads the device."""
        return int(self.session.key[1])

    @property
    def queries(self) -> int:
        """Directions a step, Q."""
        return self.estimator.queries

    @property
    def halves(self) -> int:
        """Losses of a training forward, one a point: 2Q of two-sided estimates, or 1 where there is
        nothing to perturb ("all")."""
        return 1 if self.cut.everything else len(self.estimator.points)

    @property
    def reduction(self) -> str | None:
        """What a step needs of `pair_losses`: "none", the loss of each sample, where weights are
        learnt by noise of samples or nodes; else None, the loss's own."""
        return "none" if self.head.by_sample and not self.cut.everything else None

    def named_head_parameters(self) -> Iterator[tuple[str, Any]]:
        """The head by name, as the last step left it."""
        self.flush()
        return self.head.named()

    def head_parameters(self) -> Iterator[Any]:
        """Parameters that zeroth-order optimisation trains."""
        return (p for _, p in self.named_head_parameters())

    @abstractmethod
    def named_tail_parameters(self) -> Iterator[tuple[str, Any]]:
        """What backpropagation trains, by name."""

    def tail_parameters(self) -> Iterator[Any]:
        """Parameters that backpropagation trains."""
        return (p for _, p in self.named_tail_parameters())

    def flush(self) -> None:
        """Apply an update that waits for the next forward (`ZOSGD(defer=True)`); else nothing."""
        self.session.flush()

    def go_to(self, seed: int, step: int) -> None:
        """Take the noise of another place: a checkpoint's, or a log's end."""
        self.session.go_to(seed, step)
        self.forget_forwards()

    def check_held(self) -> None:
        """Raise RuntimeError where the weights were given back (`unwrap`)."""

    def forget_forwards(self) -> None:
        """What was kept of a forward is not needed any more, or belongs to other weights."""
        self.session.forget()

    def set_direction(self, direction: Direction) -> None:
        """Take other directions from now on.

        Raises: RuntimeError between a forward and its step, which must see the same `z`.
        """
        if self.session.forwards:
            raise RuntimeError(
                "noise (r_max and p_zero of integers) cannot change between a forward and its "
                "step: the update would use another z"
            )
        # Not by an attribute's way: a layer of an integer network may have this name.
        self.__dict__["estimator"] = replace(self.estimator, direction=direction)

    def learn(self, a: Tensor, found: Tensor, take: Callable[[str, Tensor], None]) -> None:
        """Let `take` have the estimate of the gradient of every weight that is not learnt by noise
        of its own elements, by name, each once and as soon as it is there.

        Args:
            a: coefficients of the directions `[Q]`, or of the samples, too, `[Q, B]`.
            found: 1 where the step is skipped.
        """

    def fixed(self) -> dict[str, Any]:
        """Settings of its own that must be the same when a run goes on."""
        return {}

    def end_step(self, found: Tensor | None) -> None:
        """On to the next `z`."""
        self.session.advance(found)

    @abstractmethod
    def replayer(self, header: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
        """What makes a step of a log again, from its record.

        Raises: ValueError where the log is not of this model.
        """

    def moved(self, device: torch.device) -> None:
        """The weights are on another device now: so is all that a step has, and what was settled
        for the old one is settled anew."""
        self.session.to(device)

    def follow(self) -> None:
        """Be where the weights are: others were assigned, maybe elsewhere."""
        if (place := place_of(self)) != self.session.device:
            self.moved(place)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.flush()
        ties = Ties(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        ties.restore()
        # `fn` may change a floating dtype: only the device is taken from it.
        device = fn(self.session.key).device
        self.moved(self.session.device if device.type == "meta" else device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        return self.__dict__


class ModelInstead(dict[str, nn.Module | None]):
    """Children of a wrapper: the first time they are listed, those of its model.

    torch lists them right after `_load_from_state_dict`, before it loads any; from then on the
    wrapper has its own ones again, whatever loading them comes to.
    """

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__(wrapper._modules)
        self.wrapper, self.own = wrapper, wrapper._modules

    def items(self) -> Any:
        self.wrapper._modules = self.own
        model = self.own["module"]
        assert model is not None
        return model._modules.items()


def registry_of(wrapper: nn.Module, name: str) -> dict[str, Any] | None:
    """Where a wrapper's model has a child, parameter or buffer of this name, which the wrapper
    itself has not."""
    own = wrapper.__dict__.get("_modules", {})
    model = own.get("module")
    if model is None or name in own:
        return None
    places = (model._modules, model._parameters, model._buffers)
    return next((place for place in places if name in place), None)


def load_inside(
    wrapper: nn.Module, state: Any, prefix: str, metadata: Any, strict: bool, *lists: Any
) -> None:
    """The wrapper's `_load_from_state_dict`, which torch calls inside a module around it.

    The wrapper itself has hooks, and no key: all of them are its model's.
    """
    nn.Module._load_from_state_dict(wrapper, state, prefix, metadata, False, *lists)
    model = wrapper.get_submodule("module")
    wrapper.__dict__["ties"] = Ties(model)  # until `loaded`
    model._load_from_state_dict(state, prefix, metadata, strict, *lists)
    wrapper._modules = ModelInstead(wrapper)


def loaded(wrapper: nn.Module, incompatible_keys: Any) -> None:
    """What a wrapper does when torch has loaded it: the hooks that its model has for that."""
    model = wrapper.get_submodule("module")
    for hook in model._load_state_dict_post_hooks.values():
        hook(model, incompatible_keys)
    ties: Ties | None = wrapper.__dict__.pop("ties", None)
    if ties is not None:
        ties.restore()
    if isinstance(wrapper, ZOModule):
        wrapper.follow()
