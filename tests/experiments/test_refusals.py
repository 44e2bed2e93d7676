"""What a command says where a place, a disk or a number will not do: a sentence, no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.commands import plain_console, run_command
from experiments.files import check_file, check_folder, write_json
from experiments.studies import integer_loss
from experiments.train.__main__ import main as train

ROOT = Path(__file__).parents[2]


def places(folder: Path) -> dict[str, tuple[str, str]]:
    (folder / "file").write_text("kept")
    (folder / "broken").symlink_to(folder / "nowhere")
    return {
        "empty": ("", "out must name a folder, got '.'"),
        "file": (str(folder / "file"), "file is a file"),
        "under a file": (str(folder / "file" / "a" / "b"), "file is a file"),
        "broken link": (str(folder / "broken"), "broken is a broken link"),
        "under a broken link": (str(folder / "broken" / "a"), "broken is a broken link"),
    }


@pytest.mark.parametrize("place", ["empty", "file", "under a file", "broken link"])
def test_a_folder_that_cannot_be(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, message = places(tmp_path)[place]
    before = sorted(tmp_path.iterdir())
    assert train(["--out", out, "--epochs", "1", "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "kept"
    with pytest.raises(ValueError, match="out must"):
        check_folder("out", Path(out))


def test_a_file_that_cannot_be(tmp_path: Path) -> None:
    places(tmp_path)
    for path in (Path(""), tmp_path):
        with pytest.raises(ValueError, match="out must name a file, got"):
            check_file("out", path)
    with pytest.raises(ValueError, match="the folder of out must be a folder"):
        check_file("out", tmp_path / "file" / "x.json")
    check_file("out", tmp_path / "new" / "x.json")
    check_folder("out", tmp_path / "new" / "run")


@pytest.mark.parametrize("where", ["work", "finish"])
def test_what_the_system_refuses_is_said(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def write(_: Any = None) -> None:
        write_json(tmp_path / "x.json", {"a": 1})

    write()
    monkeypatch.setattr("os.fsync", full)
    calls = (write, lambda _: None) if where == "work" else (lambda: None, write)
    assert run_command(*calls, plain_console()) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/x.json: No space left on device\n"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("count", ["0", "100000"])
def test_threads_that_torch_would_not_survive(
    count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["--threads", count, "--device", "cpu"]) == 2
    assert f"threads must be in [1, 1024], got {count}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        {"batches": (0,)}, {"batches": ()}, {"trials": 0}, {"fraction_bits": (17,)},
        {"exponents": ()}, {"seed": -1},
    ],
    ids=str,
)  # fmt: skip
def test_the_integer_loss_overwrites_nothing(
    wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "committed.json"
    out.write_text("kept")
    assert integer_loss.main(integer_loss.Config(out=out, **wrong)) == 2
    assert f"{next(iter(wrong))} must be at least one number in" in capsys.readouterr().err
    assert out.read_text() == "kept"


def test_an_interruption_at_the_start_is_a_word() -> None:
    code = "import sys; sys.argv[0] = '-m'; import experiments; raise KeyboardInterrupt"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "interrupted\n" and done.returncode in (-signal.SIGINT, 130)
