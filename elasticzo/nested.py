"""Loading the state of a module that has a wrapper inside it.

A wrapper's state has the keys of its model, without `module.` in front. torch loads a module and
then, with longer and longer prefixes, its children; here it finds the model's in place of it.
"""

from __future__ import annotations

from typing import Any

from torch import nn


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


def load_inside(
    wrapper: nn.Module, state: Any, prefix: str, metadata: Any, strict: bool, *lists: Any
) -> None:
    """The wrapper's `_load_from_state_dict`, which torch calls inside a module around it.

    The wrapper itself has hooks, and no key: all of them are its model's.
    """
    nn.Module._load_from_state_dict(wrapper, state, prefix, metadata, False, *lists)
    model = wrapper.get_submodule("module")
    model._load_from_state_dict(state, prefix, metadata, strict, *lists)
    wrapper._modules = ModelInstead(wrapper)


def loaded(wrapper: nn.Module, incompatible_keys: Any) -> None:
    """What a wrapper does when torch has loaded it: the hooks that its model has for that."""
    model = wrapper.get_submodule("module")
    for hook in model._load_state_dict_post_hooks.values():
        hook(model, incompatible_keys)


__all__ = ["load_inside", "loaded"]
