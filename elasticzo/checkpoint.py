"""Checkpoints: a state written whole or not at all, and read without running any of its code.

A file is what `torch.save` writes of `{"format", "version", "digest", "state"}`; the digest is of
the state's bytes, so that a damaged file is noticed wherever the damage is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elasticzo.digest import digest
from elasticzo.files import whole

FORMAT = "elasticzo-checkpoint"
VERSION = 1
SCALARS = (str, int, float, bool, type(None))


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write a state; whoever reads `path` sees the old file or the new one, never a part.

    The file is written beside its place, flushed to the disk, and then moved over `path`.

    Args:
        path: of the file; its folder must exist.
        state: dictionaries, lists and tuples of tensors (any device), strings, numbers and None.
    Raises:
        TypeError: names the entry that is of another type.
    """
    path = Path(path)
    state = _on_cpu(state, "state")
    content = {"format": FORMAT, "version": VERSION, "digest": digest(state), "state": state}
    with whole(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a state that `save_checkpoint` wrote; tensors come to the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no checkpoint, or of another version; names the path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zip, pickle and torch raise on foreign or cut-off bytes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of elasticzo: expected format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path}: expected checkpoint version {VERSION}, got {content.get('version')!r}"
        )
    state = content.get("state")
    if not isinstance(state, dict) or digest(state) != content.get("digest"):
        raise ValueError(f"{path} is damaged: its content does not match its digest")
    return state


def _on_cpu(value: Any, name: str) -> Any:
    """A copy with every tensor on the CPU and every container a plain one."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise TypeError(f"keys of {name} must be strings or integers, got {key!r}")
        return {k: _on_cpu(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_on_cpu(v, f"{name}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if not isinstance(value, SCALARS):
        raise TypeError(
            f"{name} must be a tensor, a string, a number, None or a container of those, "
            f"got {type(value).__name__}"
        )
    if isinstance(value, float):
        return float(value)  # numpy's float64 is one, too, and would not be read again
    return value
