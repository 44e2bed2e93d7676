"""Checkpoints: a state written whole or not at all, and read without running any of its code.

A file is what `torch.save` writes of `{"format", "version", "digest", "state"}`; the digest is of
the state's bytes, so that a damaged file is noticed wherever the damage is.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

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
        state: dictionaries, lists and tuples of dense tensors (any device), strings, numbers and
            None; what is derived from one of those types is written as that type.
    Raises:
        TypeError: names the entry that is of another type.
        OSError: the file cannot be written (a full disk, say); the old one is as it was.
    """
    path = Path(path)
    state = _on_cpu(state, "state")
    content = {"format": FORMAT, "version": VERSION, "digest": digest(state), "state": state}
    with whole(path) as temporary, temporary.open("wb") as file:
        writer = _Writer(file)
        try:
            torch.save(content, cast(IO[bytes], writer))
        except RuntimeError:  # torch's writer says that its own count is wrong
            raise (writer.error or OSError(f"{path}: cannot be written")) from None


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
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {_reason(error)}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of elasticzo: expected format {FORMAT!r}")
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise ValueError(
            f"{path}: expected checkpoint version {VERSION}, got {content.get('version')!r}"
        )
    state = content.get("state")
    if not isinstance(state, dict) or digest(state) != content.get("digest"):
        raise ValueError(f"{path} is damaged: its content does not match its digest")
    return state


class _Writer(io.RawIOBase):
    """A file whose error is kept: torch loses it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _reason(error: Exception) -> str:
    """What was wrong, without torch's advice to read the file unprotected."""
    if not isinstance(error, UnpicklingError):
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__} {lines[0] if lines else ''}".rstrip()
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    asked = f"it asks for {found[1]}" if found else "it is none of torch.save"
    return f"{asked}; nothing but tensors, numbers and text is read, and nothing was run"


def _on_cpu(value: Any, name: str) -> Any:
    """A copy with every tensor on the CPU, and every value and container of a plain type: what is
    derived from one would be written, and refused when it is read."""
    if isinstance(value, Tensor):
        return _dense(value, name)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise TypeError(f"keys of {name} must be strings or integers, got {key!r}")
        return {_plain(k): _on_cpu(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_on_cpu(v, f"{name}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if not isinstance(value, SCALARS):
        raise TypeError(
            f"{name} must be a tensor, a string, a number, None or a container of those, "
            f"got {type(value).__name__}"
        )
    return _plain(value)


def _plain(value: Any) -> Any:
    """numpy's float64 and str_, torch's version, members of an enumeration: as their base."""
    if value is None or isinstance(value, bool):
        return value
    base = next(kind for kind in (str, int, float) if isinstance(value, kind))
    return base.__str__(value) if base is str else base(value)


def _dense(t: Tensor, name: str) -> Tensor:
    """On the CPU, with no more memory than its elements: of a view, torch would write all that it
    looks into."""
    if t.layout is not torch.strided or t.is_meta or t.is_quantized or t.is_nested:
        kind = "meta" if t.is_meta else "quantized" if t.is_quantized else str(t.layout)
        raise TypeError(f"{name} must be a dense tensor with values, got one of {kind}")
    t = t.detach().cpu().resolve_conj().resolve_neg()
    whole = t.untyped_storage().nbytes() == t.numel() * t.element_size()
    return t if whole else t.clone()
