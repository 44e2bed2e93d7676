"""Refusal of wrappers that would shard or synchronise what the pair must see whole."""

from __future__ import annotations

from torch import Tensor, nn

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
SHARDED = ("DTensor", "FlatParameter")


def refuse_wrapped(kind: str, model: nn.Module | None = None) -> None:
    """Raise for a model inside a distributed or compiled wrapper."""
    if model is None or kind in WRAPPERS:
        raise RuntimeError(
            f"ElasticZO does not support {kind} yet: run one process a model, or average the "
            "scalar losses over processes yourself before zo.step"
        )
    if kind == "OptimizedModule":
        raise ValueError("compile the wrapper, not the model: torch.compile(ElasticZO(model, ...))")


def refuse_sharded(name: str, p: Tensor) -> None:
    """Raise for a parameter that was sharded (FSDP) after wrapping."""
    if type(p).__name__ in SHARDED:
        raise RuntimeError(
            f"ElasticZO does not support sharded parameters yet: {name!r} is a {type(p).__name__} "
            "(FSDP); wrap the unsharded model"
        )


__all__ = ["refuse_sharded", "refuse_wrapped"]
