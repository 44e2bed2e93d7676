"""`njit` with a cache that may be missing, full or damaged: then a function is compiled anew.

numba stops at import where it finds no place for its cache, and unpickles whatever a cache file
holds, machine code included. Here every file ends with a digest, and one without it is not read.
"""
# mypy: disable-error-code="no-untyped-call,misc"

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

_SIZE = hashlib.sha256().digest_size


def njit(cache: bool = False, **how: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=cache, **how)`."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**how)(function)
        if cache:
            with _told():
                dispatcher._cache = _Cache(dispatcher.py_func)
        return dispatcher

    return compiled


@contextmanager
def _told() -> Iterator[None]:
    """Without a place for the cache there is none."""
    try:
        yield
    except RuntimeError as error:  # numba's word for a folder that cannot be written
        if "no locator" not in str(error):
            raise
        _warn()


@lru_cache(maxsize=1)
def _warn() -> None:
    """Once a process."""
    warnings.warn(_NO_PLACE, RuntimeWarning, stacklevel=1)


_NO_PLACE = (
    "numba has no folder that it can write its cache to: kernels are compiled anew by every "
    "process (NUMBA_CACHE_DIR names a folder)"
)


class _File(IndexDataCacheFile):
    """Index and data files that end with a digest of what is before it."""

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        with super()._open_for_write(filepath) as file:
            content = io.BytesIO()
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())

    def _load_index(self) -> Any:
        return super()._load_index() if _whole(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        if not _whole(self._data_path(name)):
            raise OSError(f"{self._data_path(name)} is damaged")  # for numba it is not there
        return super()._load_data(name)


def _whole(path: str) -> bool:
    try:
        content = Path(path).read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_SIZE]).digest() == content[-_SIZE:]


class _Cache(FunctionCache):
    """Of one function; where it cannot be written (a full disk), it is not."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file.__class__ = _File

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)
