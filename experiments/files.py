"""Text and JSON in files; what is written is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from elasticzo.files import whole


def check_folder(name: str, path: Path) -> None:
    """Raise ValueError where there can be no folder `path`."""
    if path == Path():
        raise ValueError(f"{name} must name a folder, got {str(path)!r}")
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(f"{name} must be a folder, got {path}: {place} is a broken link")
        if place.exists():
            if not place.is_dir():
                raise ValueError(f"{name} must be a folder, got {path}: {place} is a file")
            return


def check_file(name: str, path: Path) -> None:
    """Raise ValueError where there can be no file `path`."""
    if path == Path() or path.is_dir():
        raise ValueError(f"{name} must name a file, got {str(path)!r}")
    if path.parent != Path():
        check_folder(f"the folder of {name}", path.parent)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """What is not finite becomes null."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Raises: ValueError that names a damaged file."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def write_checked(path: Path, value: dict[str, Any]) -> None:
    """With a digest of it: `read_checked` notices whatever is changed."""
    value = json.loads(json.dumps(finite(value)))
    write_json(path, {**value, "digest": _digest(value)})


def read_checked(path: Path, way_out: str) -> dict[str, Any]:
    """What `write_checked` wrote.

    Args:
        way_out: what a person does about a damaged file.
    Raises: ValueError that names the file and the way out.
    """
    try:
        value = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {way_out}") from error
    digest = value.pop("digest", None)
    if digest != _digest(value):
        why = "does not match its digest" if digest else "has no digest, it is old or damaged"
        raise ValueError(f"{path} {why}: {way_out}")
    return value


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
