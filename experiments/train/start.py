"""The first weights of a run that starts from another's: fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elasticzo.checkpoint import load_checkpoint
from elasticzo.int8.network import Int8Network
from experiments.train.config import TrainConfig
from experiments.train.folder import CHECKPOINT, CONFIG, RESULT
from experiments.train.network import build_model, last_layer


def first_weights(config: TrainConfig) -> dict[str, Any]:
    """The state of the wrapped model with which `config.start_from` ended.

    Args:
        config: resolved, with `start_from`.
    Returns:
        What `load_state_dict` of the run's model takes. For precision int8 from an fp32 run: the
        trained weights as `Int8Network` converts them; biases are left out.
    Raises:
        FileNotFoundError: the folder, or its checkpoint, is missing.
        ValueError: the run there is not finished, or of another model or precision.
    """
    folder = config.start_from
    assert folder is not None
    saved = _saved(folder)
    source = saved["identity"]
    _check(folder, "model", source, (config.model,))
    wanted = ("int8", "fp32") if config.precision == "int8" else (config.precision,)
    _check(folder, "precision", source, wanted)
    if config.model == "pointnet":
        _check(folder, "data", source, (config.data,))  # as many classes
    if source["precision"] == config.precision:
        _check(folder, "batch_norm", source, (config.batch_norm,))
    state: dict[str, Any] = saved["model"]
    if source["precision"] == config.precision:
        return state
    return _converted(config, source.get("batch_norm"), state)


def _saved(folder: Path) -> dict[str, Any]:
    """With what the run in a folder ended, and what it was."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"start_from must be the folder of a finished run: {folder / CONFIG} is missing"
        )
    if not (folder / RESULT).is_file():
        raise ValueError(f"start_from must be a finished run, got {folder}, which has no {RESULT}")
    return load_checkpoint(folder / CHECKPOINT)


def _check(folder: Path, field: str, source: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    if source.get(field) not in wanted:
        raise ValueError(
            f"start_from must be a run of {field} {' or '.join(map(str, wanted))}, got {folder} of "
            f"{source.get(field)}"
        )


def _converted(
    config: TrainConfig, batch_norm: bool | None, state: dict[str, Any]
) -> dict[str, Any]:
    """int8 weights from the state of a float model."""
    net = build_model(replace(config, batch_norm=batch_norm))
    net.load_state_dict(state)
    assert config.logit_shift is not None
    with torch.no_grad():
        for p in last_layer(net).parameters():
            p.mul_(2.0**-config.logit_shift)
    converted: dict[str, Any] = Int8Network(net, drop_biases=True).tree.state_dict()
    return converted
