"""The int8 counterpart of a float network: converted once, on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.buffers import address
from elasticzo.int8.layers import Block, Int8Layer, Pool, Two
from elasticzo.int8.plain import check_plain
from elasticzo.int8.tensor import quantize_weight
from elasticzo.models.points import MaxPoints

WEIGHTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LARGE_SHARE = 0.25
KNOWN = (*WEIGHTS, *NORMS, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Identity, MaxPoints)


class Int8Network:
    """A chain of blocks; `tree` has its layers under the names of the float model's modules.

    Args:
        model: nested `nn.Sequential` of Linear, Conv1d, Conv2d, BatchNorm (folded into the layer
            before it), ReLU, MaxPool2d, Flatten, Identity and MaxPoints. Only read.
        drop_biases: leave biases that are not zero out, also those that folding makes.
    Raises: TypeError that names an unsupported module; ValueError for settings or biases that
        have no int8 counterpart, and for what `check_plain` refuses.
    Warns: UserWarning that names the layers whose dropped biases have a root mean square above a
        quarter of the standard deviation of the layer's outputs. So large a shift of a ReLU's
        input turns up to a tenth of it on or off (a quarter of 0.4, the density of a normal at its
        mode). That deviation is what a BatchNorm's statistics say of its outputs; without one, the
        norm of a weight row: what independent inputs of mean square 1 make.
    """

    def __init__(self, model: nn.Module, drop_biases: bool = False) -> None:
        self.tree = nn.Module()
        self.before: list[Pool | str] = []  # what precedes the first weight
        self.blocks: list[Block] = []
        dropped: dict[str, float] = {}
        if not isinstance(drop_biases, bool):
            raise TypeError(f"drop_biases must be True or False, got {drop_biases!r}")
        leaves = list(_leaves(model))
        for place, (name, module) in enumerate(leaves):
            if isinstance(module, WEIGHTS):
                behind = leaves[place + 1][1] if place + 1 < len(leaves) else None
                norm = behind if isinstance(behind, NORMS) else None
                weight, bias = _folded(module, norm)
                if bias is not None and bool(bias.any()) and not drop_biases:
                    raise ValueError(
                        f"{name!r} has a bias, or a BatchNorm that makes one; int8 layers have "
                        "none: drop_biases=True leaves it out"
                    )
                dropped[name] = _share(weight, bias, norm)
                layer = Int8Layer(
                    quantize_weight(weight), len(self.blocks), *_geometry(name, module)
                )
                _put(self.tree, name, layer)
                self.blocks.append(Block(name, layer))
            elif isinstance(module, NORMS):
                if place == 0 or not isinstance(leaves[place - 1][1], WEIGHTS):
                    raise ValueError(
                        f"{name!r} ({type(module).__name__}) must follow a weight layer"
                    )
            else:
                self._follow(name, module)
        if not self.blocks:
            raise ValueError("the model has no Linear, Conv1d or Conv2d")
        self.layers = {block.name: block.layer for block in self.blocks}
        _warn_of(dropped)

    def _follow(self, name: str, module: nn.Module) -> None:
        """A module without weights, behind the last block."""
        block = self.blocks[-1] if self.blocks else None
        stage = _stage(name, module)
        if stage is None:
            return
        if block is None:
            self.before.append(stage)
        elif isinstance(stage, Pool):
            if block.flatten:
                raise ValueError(f"{name!r} ({type(module).__name__}) must come before Flatten")
            block.pools.append(stage)
        elif stage == "relu":
            block.relu = True
        else:
            block.flatten = True


def _is_chain(module: nn.Module) -> bool:
    """Whether it runs its children one after the other, and nothing else."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and type(module).__iter__ is nn.Sequential.__iter__
    )


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that compute, in their order of execution."""
    seen: set[int] = set()
    owners: dict[int, str] = {}

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        check_plain(name, module)
        if _is_chain(module):
            for child, inner in module._modules.items():
                assert inner is not None
                yield from walk(inner, f"{name}.{child}" if name else child)
            return
        if type(module) not in KNOWN:
            known = ", ".join(kind.__name__ for kind in KNOWN)
            raise TypeError(
                f"{name or 'the model'!r} is a {type(module).__name__}; an int8 network takes "
                f"nn.Sequential of {known}"
            )
        if id(module) in seen and any(True for _ in module.parameters()):
            raise ValueError(f"{name!r} is used twice: its weight would have two places")
        seen.add(id(module))
        for weight in module.parameters():
            owner = owners.setdefault(address(weight) or id(weight), name)
            if owner != name:
                raise ValueError(f"{name!r} shares a weight with {owner!r}: int8 layers share none")
        yield name, module

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    yield from walk(model, "")


def _put(root: nn.Module, name: str, layer: Int8Layer) -> None:
    """Register a layer under a dotted name."""
    *parents, last = (name or "layer").split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        inner = root._modules[parent]
        assert inner is not None
        root = inner
    root.add_module(last, layer)


def _folded(module: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float64 with the BatchNorm behind them multiplied in."""
    assert isinstance(module, WEIGHTS)
    weight = module.weight.detach().to("cpu", torch.float64)
    bias = None if module.bias is None else module.bias.detach().to("cpu", torch.float64)
    if norm is None:
        return weight, bias
    assert isinstance(norm, NORMS)
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm without running statistics cannot be folded")
    mean, var = (t.to("cpu", torch.float64) for t in (norm.running_mean, norm.running_var))
    gamma, beta = torch.ones_like(mean), torch.zeros_like(mean)
    if norm.affine:
        gamma, beta = (p.detach().to("cpu", torch.float64) for p in (norm.weight, norm.bias))
    fresh = not bool(mean.any()) and bool((var == 1).all())  # never trained: nothing but eps
    factor = gamma if fresh else gamma / torch.sqrt(var + norm.eps)
    bias = (torch.zeros_like(mean) if bias is None else bias) - mean
    return weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), bias * factor + beta


def _share(weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> float:
    """Root mean square of folded biases over that of the outputs' standard deviations."""
    if bias is None or not bool(bias.any()):
        return 0.0
    if norm is None:
        power = weight.flatten(1).square().sum(1)
    else:
        assert isinstance(norm, NORMS) and norm.running_var is not None
        var = norm.running_var.to("cpu", torch.float64)
        power = var / (var + norm.eps)
        if norm.affine:
            power = power * norm.weight.detach().to("cpu", torch.float64).square()
    share = bias.square().mean() / power.mean()  # infinite of a layer without outputs
    return float(share.sqrt())


def _warn_of(shares: dict[str, float]) -> None:
    large = [f"{name!r} ({share:.2f})" for name, share in shares.items() if share > LARGE_SHARE]
    if large:
        warnings.warn(
            f"dropping the biases (a folded BatchNorm's are among them) of {', '.join(large)} "
            f"shifts these layers' outputs by more than {LARGE_SHARE} of their standard deviation: "
            "expect other results than the float model's until the integer network is trained",
            stacklevel=4,
        )


def _geometry(name: str, module: nn.Module) -> tuple[Two, ...]:
    """Stride, padding and dilation of a convolution, (height, width)."""
    if isinstance(module, nn.Linear):
        return ()
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(
            f"{name!r} must have groups=1, padding_mode='zeros' and padding in numbers, got "
            f"groups={module.groups}, padding_mode={module.padding_mode!r}, "
            f"padding={module.padding!r}"
        )
    fill = {"stride": 1, "padding": 0, "dilation": 1}  # of the height of a Conv1d
    pairs = []
    for field, default in fill.items():
        values = tuple(int(v) for v in getattr(module, field))
        pairs.append((default, values[0]) if len(values) == 1 else (values[0], values[1]))
    return tuple(pairs)


def _pair(value: Any) -> Two:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _stage(name: str, module: nn.Module) -> Pool | str | None:
    if isinstance(module, nn.Identity):
        return None
    if isinstance(module, nn.ReLU):
        return "relu"
    if isinstance(module, MaxPoints):
        return Pool()
    if isinstance(module, nn.Flatten):
        if (module.start_dim, module.end_dim) != (1, -1):
            raise ValueError(f"{name!r} must flatten all but the batch (start_dim=1, end_dim=-1)")
        return "flatten"
    assert isinstance(module, nn.MaxPool2d)
    padding, dilation = _pair(module.padding), _pair(module.dilation)
    if padding != (0, 0) or dilation != (1, 1) or module.ceil_mode or module.return_indices:
        raise ValueError(
            f"{name!r} must be a MaxPool2d with padding=0, dilation=1, without ceil_mode and "
            "return_indices"
        )
    stride = module.kernel_size if module.stride is None else module.stride
    return Pool(_pair(module.kernel_size), _pair(stride))
