"""Fetching the published MNIST and Fashion-MNIST files.

A file is written under a temporary name beside its place, its SHA256 is compared with the known
one, and only then is it moved into place: it is there whole, or not at all.
"""

import hashlib
import importlib
import importlib.util
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from uuid import uuid4

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}
FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
    ),
    "train-labels-idx1-ubyte.gz": (
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
    ),
}

_TIMEOUT_S = 30
_CHUNK_BYTES = 1 << 16


class DownloadError(RuntimeError):
    """A file could not be fetched whole, or the one already there is not the published one."""


def download_mnist(
    root: str | Path, base_url: str = MNIST_URL, progress: bool = True
) -> list[Path]:
    """Fetch MNIST's four files into `root`/MNIST/raw, torchvision's layout (about 12 MB).

    Args, Raises: see `download_file`; `base_url` is the folder of a mirror.
    Returns:
        The four paths.
    """
    return _download_set(Path(root) / "MNIST" / "raw", base_url, MNIST_SHA256, progress)


def download_fashion_mnist(
    root: str | Path, base_url: str = FASHION_MNIST_URL, progress: bool = True
) -> list[Path]:
    """Fetch Fashion-MNIST's four files into `root`/FashionMNIST/raw (about 31 MB).

    Args, Raises: see `download_file`; `base_url` is the folder of a mirror.
    Returns:
        The four paths.
    """
    folder = Path(root) / "FashionMNIST" / "raw"
    return _download_set(folder, base_url, FASHION_MNIST_SHA256, progress)


def download_file(url: str, path: str | Path, sha256: str, progress: bool = True) -> Path:
    """Fetch one file; nothing is left behind unless it is the expected one.

    Args:
        url: an http or https address.
        path: where the file goes; its folder is made. A file with the right hash is kept and not
            fetched again; one with another hash is never overwritten.
        sha256: the expected hash, in hexadecimal.
        progress: draw a bar on a terminal's stderr, where rich is installed.
    Returns:
        `path`.
    Raises:
        DownloadError: names the URL, the expected hash and what came instead.
        ImportError: pooch is missing.
    """
    path = Path(path)
    if path.exists():
        _check_present(path, sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path)
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        _fetch(url, part, sha256, _progress_bar(path.name) if progress else None)
        if _sha256(part) != sha256:
            raise _failure(url, part, sha256, "the file is not the published one")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def import_data_extra(module: str, purpose: str) -> ModuleType:
    """Import a module of the `data` extra, or raise an ImportError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {module.partition('.')[0]}: pip install elasticzo[data]"
        ) from error


def _download_set(
    folder: Path, base_url: str, hashes: Mapping[str, str], progress: bool
) -> list[Path]:
    base = base_url.rstrip("/")
    return [
        download_file(f"{base}/{name}", folder / name, sha256, progress)
        for name, sha256 in hashes.items()
    ]


def _remove_left(path: Path) -> None:
    """Parts of a process that was killed: one that is alive writes within the timeout."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > 2 * _TIMEOUT_S:
                part.unlink()


def _check_present(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise DownloadError(f"{path} is in the way: expected a file or nothing there")
    found = _sha256(path)
    if found != sha256:
        raise DownloadError(
            f"{path} is not the published file: expected SHA256 {sha256}, got {found};"
            " move it away to fetch it again"
        )


def _fetch(url: str, part: Path, sha256: str, bar: "_RichBar | None") -> None:
    """Stream the file to `part`; a DownloadError for whatever goes wrong on the way."""
    pooch = import_data_extra("pooch", "downloading data")
    fetch = pooch.HTTPDownloader(
        progressbar=bar or False,
        chunk_size=_CHUNK_BYTES,
        timeout=_TIMEOUT_S,
        # Else a server may mark a .gz file as an encoding, and it would arrive decompressed.
        headers={"Accept-Encoding": "identity"},
    )
    try:
        fetch(url, str(part), None)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        refused = getattr(error, "response", None)  # a 404's; pooch leaves its socket open
        if refused is not None:
            refused.close()
        raise _failure(url, part, sha256, str(error)) from error
    finally:
        if bar is not None:
            bar.close()


def _failure(url: str, part: Path, sha256: str, reason: str) -> DownloadError:
    size = part.stat().st_size if part.exists() else 0
    found = f"{_sha256(part)} for the {size} bytes written" if size else "no data"
    return DownloadError(
        f"could not download {url}: {reason}; expected SHA256 {sha256}, got {found}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _progress_bar(name: str) -> "_RichBar | None":
    """A bar for pooch, or None where rich is not installed: a bar is no reason to fail."""
    return _RichBar(name) if importlib.util.find_spec("rich") else None


class _RichBar:
    """What pooch asks of a progress bar (`total`, `update`, `reset`, `close`), drawn by rich."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(name, total=None)
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, total: int) -> None:
        # pooch sets it once the server has answered, so a refused request draws nothing.
        self._total = total
        self._bar.update(self._task, total=total or None)
        self._bar.start()

    def update(self, amount: int) -> None:
        self._bar.advance(self._task, amount)

    def reset(self) -> None:
        self._bar.reset(self._task, total=self._total or None)

    def close(self) -> None:
        self._bar.stop()
