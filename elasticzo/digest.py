"""Digests of values: the same for the same types, shapes and bytes, wherever they live."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def digest(value: Any) -> str:
    """SHA-256 of a tensor, string, number or None, or of a container of those, in hex."""
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[Any]:
    """The bytes of a value, each led by its type, shape or length."""
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {list(value.shape)};".encode()
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
    elif isinstance(value, dict):
        yield f"dict {len(value)};".encode()
        for key, item in value.items():
            yield f"{key!r}:".encode()
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        yield f"list {len(value)};".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield f"{value!r};".encode()
