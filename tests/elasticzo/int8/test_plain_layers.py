"""Layers that do more than their type says: no conversion loses it without a word."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from elasticzo.int8 import ElasticZOInt8


def net() -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(
        inner, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3, bias=False), nn.Identity()
    )


def at(model: nn.Module, place: str) -> Any:
    return model.get_submodule(place)


def replace_weight(m: nn.Module) -> None:
    weight = m.weight
    del m.weight
    m.weight = weight * 2  # a tensor, as a network of networks sets it


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "weight_norm": weight_norm,
    "parametrized": parametrizations.weight_norm,
    "spectral_norm": spectral_norm,
    "assigned": replace_weight,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("place", ["0.0", "3"])
@pytest.mark.parametrize("change", COMPUTED.values(), ids=COMPUTED)
def test_weights_that_are_computed(change: Callable[[nn.Module], Any], place: str) -> None:
    model = net()
    change(at(model, place))
    with pytest.raises(ValueError, match=f"the weight of '{place}' .* must be a parameter"):
        ElasticZOInt8(model, tail=1)


def test_a_pruned_norm_and_what_pruning_leaves() -> None:
    model = net()
    prune.l1_unstructured(at(model, "0.1"), "weight", 0.5)
    with pytest.raises(ValueError, match=r"the weight of '0.1' \(BatchNorm2d\)"):
        ElasticZOInt8(model, tail=1)
    prune.remove(at(model, "0.1"), "weight")
    prune.l1_unstructured(at(model, "3"), "weight", 0.5)
    prune.remove(at(model, "3"), "weight")
    converted = ElasticZOInt8(model, tail=1)
    zero = at(model, "3").weight == 0
    assert zero.any() and not converted.state_dict()["3.weight"][zero].any()


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hooks": lambda m: m.register_forward_hook(lambda m, i, o: -o),
    "forward pre hooks": lambda m: m.register_forward_pre_hook(lambda m, i: (-i[0],)),
    "backward hooks": lambda m: m.register_full_backward_hook(lambda m, i, o: None),
    "backward pre hooks": lambda m: m.register_full_backward_pre_hook(lambda m, o: None),
}


@pytest.mark.parametrize("place", ["", "0", "0.0", "0.1", "1", "2", "4"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(kind: str, place: str) -> None:
    model = net()
    handle = HOOKS[kind](at(model, place))
    with pytest.raises(ValueError, match=f"'{place or 'the model'}' .* has {kind}, which an"):
        ElasticZOInt8(model, tail=1)
    handle.remove()
    ElasticZOInt8(model, tail=1)


@pytest.mark.parametrize("place", ["", "0", "0.0", "0.2", "3"])
def test_a_forward_of_the_instance(place: str) -> None:
    model = net()
    module = at(model, place)
    before = module.forward
    module.forward = lambda x: -before(x)
    with pytest.raises(ValueError, match="has another forward than its class came with"):
        ElasticZOInt8(model, tail=1)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Sequential, nn.ReLU])
def test_a_forward_of_the_class(
    kind: type[nn.Module], wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kind.forward

    def patched(self: Any, x: Any) -> Any:
        return -before(self, x)

    monkeypatch.setattr(kind, "forward", wraps(before)(patched) if wrapped else patched)
    with pytest.raises(ValueError, match=rf"\({kind.__name__}\) has another forward than its"):
        ElasticZOInt8(net(), tail=1)


class Backwards(nn.Sequential):
    def __iter__(self) -> Any:
        return reversed(self._modules.values())


def test_a_chain_in_another_order() -> None:
    with pytest.raises(TypeError, match="'the model' is a Backwards; an int8 network takes"):
        ElasticZOInt8(Backwards(nn.ReLU(), nn.Linear(2, 2, bias=False)), tail=1)


def test_a_tail_that_is_frozen() -> None:
    model = net()
    at(model, "3").weight.requires_grad_(False)
    with pytest.raises(ValueError, match="tail=1 has no weight that may be trained: all of them"):
        ElasticZOInt8(model, tail=1)
    names = [n for n, _ in ElasticZOInt8(model, tail=0).named_head_parameters()]
    assert names == ["0.0.weight"]


def test_weights_over_one_memory() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = nn.Parameter(first.weight.data)
    assert torch.equal(first.weight, second.weight)
    with pytest.raises(ValueError, match="'1' shares a weight with '0'"):
        ElasticZOInt8(nn.Sequential(first, second), tail=1)


def test_weights_without_values() -> None:
    torch.utils._device._device_constructors.cache_clear()  # filled while another test patched
    with torch.device("meta"):
        model = net()
    with pytest.raises(ValueError, match=r"the weight of '0.0' \(Conv2d\) is on 'meta' and has no"):
        ElasticZOInt8(model, tail=1)
