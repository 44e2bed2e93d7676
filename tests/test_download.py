"""Downloads, against a server on the loopback address."""

import hashlib
import os
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from elasticzo.data import DownloadError, load_mnist
from elasticzo.data import download as dl
from tests.test_data import full_size, write  # noqa: F401 (a fixture)


class Server(ThreadingHTTPServer):
    """Serves `files`: path -> (body, the length it claims); 404 for the rest."""

    files: dict[str, tuple[bytes, int]]
    requests: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path not in self.server.files:
            self.send_error(404)
            return
        body, length = self.server.files[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("pooch")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.requests = {}, []
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


BODY = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(BODY).hexdigest()


def test_download_writes_the_file_once(server: Server, tmp_path: Path) -> None:
    server.files["/x"] = (BODY, len(BODY))
    path = tmp_path / "new" / "x"
    for _ in range(2):
        assert dl.download_file(f"{server.url}/x", path, SHA256) == path
    assert path.read_bytes() == BODY and list(path.parent.iterdir()) == [path]
    assert server.requests == ["/x"]


def test_parts_of_killed_downloads_are_removed(server: Server, tmp_path: Path) -> None:
    server.files["/x"] = (BODY, len(BODY))
    old, alive = tmp_path / ".x.0.part", tmp_path / ".x.1.part"
    for part in (old, alive):
        part.write_bytes(BODY[:9])
    os.utime(old, (0, 0))
    dl.download_file(f"{server.url}/x", tmp_path / "x", SHA256)
    assert not old.exists() and alive.exists()


@pytest.mark.parametrize(
    ("body", "claimed", "message"),
    [
        (BODY[:-1] + b"!", len(BODY), "the file is not the published one; .* 256000 bytes written"),
        (BODY[:100], 100, "the file is not the published one; .* the 100 bytes written"),
        (BODY[:-9], len(BODY), "9 more expected.*; expected SHA256"),
        (None, 0, "404 Client Error.*; .* got no data"),
    ],
    ids=["corrupt", "short", "truncated", "404"],
)
def test_bad_download_is_named_and_leaves_nothing(
    server: Server, tmp_path: Path, body: bytes | None, claimed: int, message: str
) -> None:
    if body is not None:
        server.files["/x"] = (body, claimed)
    with pytest.raises(DownloadError, match=message) as error:
        dl.download_file(f"{server.url}/x", tmp_path / "x", SHA256)
    text = str(error.value)
    assert f"could not download {server.url}/x: " in text and f"expected SHA256 {SHA256}" in text
    if body is not None and len(body) == claimed:
        assert f"got {hashlib.sha256(body).hexdigest()}" in text
    assert list(tmp_path.iterdir()) == []


def test_unreachable_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pooch")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:  # bound but not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        with pytest.raises(DownloadError, match=f"could not download {url}: .*got no data"):
            dl.download_file(url, tmp_path / "x", SHA256)
    with pytest.raises(DownloadError, match=r"could not download nowhere/x: .*got no data"):
        dl.download_file("nowhere/x", tmp_path / "x", SHA256)
    assert list(tmp_path.iterdir()) == []


def test_another_file_in_place_is_never_overwritten(server: Server, tmp_path: Path) -> None:
    server.files["/x"] = (BODY, len(BODY))
    path = tmp_path / "x"
    path.write_bytes(b"mine")
    found = hashlib.sha256(b"mine").hexdigest()
    message = f"{path} is not the published file: expected SHA256 {SHA256}, got {found}; move"
    with pytest.raises(DownloadError, match=message):
        dl.download_file(f"{server.url}/x", path, SHA256)
    assert path.read_bytes() == b"mine" and server.requests == []
    with pytest.raises(DownloadError, match="is in the way: expected a file or nothing there"):
        dl.download_file(f"{server.url}/x", tmp_path, SHA256)


def test_progress_bar(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("rich")
    server.files["/x"] = (BODY, len(BODY))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    dl.download_file(f"{server.url}/x", tmp_path / "quiet", SHA256, progress=False)
    assert capsys.readouterr().err == ""
    dl.download_file(f"{server.url}/x", tmp_path / "shown", SHA256)
    err = capsys.readouterr().err
    assert "shown" in err and "256.0/256.0 kB" in err


def test_load_mnist_fetches_what_is_missing(
    server: Server,
    tmp_path: Path,
    full_size: dict[str, bytes],  # noqa: F811 (the fixture)
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, raw in full_size.items():
        server.files[f"/mirror/{name}"] = (raw, len(raw))
        monkeypatch.setitem(dl.MNIST_SHA256, name, hashlib.sha256(raw).hexdigest())
    labels = "train-labels-idx1-ubyte.gz"
    write(tmp_path, {labels: full_size[labels]})
    for _ in range(2):
        data = load_mnist(tmp_path, download=True, base_url=f"{server.url}/mirror/")
    assert data.test_y.equal(torch.arange(10_000) % 10)
    assert sorted(server.requests) == sorted(f"/mirror/{n}" for n in full_size if n != labels)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(DownloadError, match=r"t10k-labels-idx1-ubyte\.gz is not the publ"):
        load_mnist(tmp_path, download=True)


def test_download_set_goes_where_the_loader_looks(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in dl.FASHION_MNIST_SHA256:
        server.files[f"/{name}"] = (name.encode(), len(name))
        monkeypatch.setitem(
            dl.FASHION_MNIST_SHA256, name, hashlib.sha256(name.encode()).hexdigest()
        )
    paths = dl.download_fashion_mnist(tmp_path, server.url, progress=False)
    folder = tmp_path / "FashionMNIST" / "raw"
    assert sorted(paths) == sorted(folder.iterdir()) and len(paths) == 4
    assert all(path.read_bytes() == path.name.encode() for path in paths)
