"""Every configuration that ships, from all modules of this room that have `configs(target)`."""

from __future__ import annotations

from importlib import import_module

from experiments.static.config import Config

TARGETS = ("cuda-80", "cuda-90", "cuda-100", "hip-gfx942")
MODULES = (
    "kernels",
    "conv2d",
    "norms",
    "int8",
    "int8_products",
)  # of experiments.static; a test finds a module that is missing here


def configs(target: str) -> list[Config]:
    """All configurations for a target, in a fixed order.

    Raises: ValueError where two have one name, or a problem lacks what a prediction needs.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {TARGETS}, got {target!r}")
    found: dict[str, Config] = {}
    for module in MODULES:
        for config in import_module(f"experiments.static.{module}").configs(target):
            if config.name in found:
                raise ValueError(f"two configurations are named {config.name} for {target}")
            missing = {"bytes", "programs"} - {*config.problem}
            if config.problem and missing:
                raise ValueError(f"the problem of {config.name} lacks {', '.join(sorted(missing))}")
            found[config.name] = config
    return list(found.values())


__all__ = ["MODULES", "TARGETS", "configs"]
