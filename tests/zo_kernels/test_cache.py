"""numba's cache: no place, a full disk and damaged files cost a compilation, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

numba = pytest.importorskip("numba")
compiled = pytest.importorskip("zo_kernels.cpu.compiled")
njit = compiled.njit

pytestmark = pytest.mark.skipif(numba.config.DISABLE_JIT == 1, reason="needs the compiler")


def triple(x: int) -> int:
    return 3 * x


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    yield tmp_path


def hits(function: Any) -> int:
    """How often a fresh function was read from the cache, which gives the right value."""
    assert function(14) == 42
    return sum(function.stats.cache_hits.values())


def test_a_cached_function_is_read_again(place: Path) -> None:
    assert [hits(njit(cache=True)(triple)) for _ in range(2)] == [0, 1]
    assert hits(njit()(triple)) == 0


@pytest.mark.parametrize("kind", ["nbi", "nbc"], ids=["index", "data"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "foreign"])
def test_a_damaged_file_is_made_again(place: Path, kind: str, damage: str) -> None:
    assert hits(njit(cache=True)(triple)) == 0
    (path,) = place.rglob(f"*.{kind}")
    content = path.read_bytes()
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    forms = {"flipped": changed, "cut": content[:-1], "empty": b"", "foreign": b"\x80\x04N." * 50}
    path.write_bytes(forms[damage])
    assert [hits(njit(cache=True)(triple)) for _ in range(2)] == [0, 1]


def test_without_a_place_it_runs_uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    compiled._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="numba has no folder that it can write its cache to"):
        function = njit(cache=True)(triple)
    assert hits(function) == 0


def test_a_full_disk_does_not_stop_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*path: str) -> Any:
        raise OSError(28, "No space left on device")

    function = njit(cache=True)(triple)
    monkeypatch.setattr(compiled._File, "_open_for_write", full)
    assert hits(function) == 0 and not list(place.rglob("*.nb?"))
