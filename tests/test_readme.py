"""The README's code: Python blocks run as they stand, commands exist and explain themselves."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.split("#")[0].strip()
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.split("#")[0].strip()
]


def test_the_readme_has_code() -> None:
    assert PYTHON and COMMANDS


def test_python_blocks_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), names)
    said = capsys.readouterr().out
    learnt = re.search(r"([\d.]+)% of digits in three epochs; with a frozen head ([\d.]+)%", said)
    assert learnt is not None and float(learnt[1]) > float(learnt[2]) + 20.0
    assert names["step"].losses.shape == (2,)


MODULES = sorted({w[2] for w in map(shlex.split, COMMANDS) if w[:2] == ["python", "-m"]})
ASK = """
import contextlib, io, json, runpy, sys
found = {}
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, (name, end.code)
    found[name] = said.getvalue()
print(json.dumps(found))
"""


@cache
def help_texts() -> dict[str, str]:
    """What each module says of itself; one process, which imports torch once."""
    command = [sys.executable, "-c", ASK, *MODULES]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found: dict[str, str] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_exist(command: str) -> None:
    """`./dev X` is one of dev's commands; `python -m M --flag ...` knows each of its flags."""
    words = shlex.split(command)
    if words[0] == "./dev":
        usage = subprocess.run([ROOT / "dev"], capture_output=True, text=True, check=True).stdout
        assert f"./dev {words[1]} " in usage
    elif words[:2] == ["python", "-m"]:
        for flag in (word for word in words[3:] if word.startswith("--")):
            assert flag in help_texts()[words[2]], flag
    else:
        assert words[0] in ("git", "cd", "pip"), command
