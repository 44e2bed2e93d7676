"""Which package needs which: checked in the source, and in processes where a package is missing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zo_kernels

PACKAGE = Path(zo_kernels.__file__).parent
STEP = """
import torch
import zo_kernels as zk
key, f64 = torch.tensor([1, 2]), lambda x: torch.tensor(x, dtype=torch.float64)
w = torch.ones(3, 5)
halves = zk.perturbed_weights(w, key, f64(0.1), tensor=0)
zk.perturb_(w, key, f64(0.1), tensor=0)
zk.update_([w], key, f64([0.1]), f64([0.1]), f64([0.0]), torch.zeros(()),
           tensors=[0], groups=[0], scales=[1.0])
z = zk.sample((3, 5), key, tensor=0, noise="rademacher")
assert torch.allclose(halves.mean(0), torch.ones(3, 5)) and not halves.eq(1).any()
assert z.abs().eq(1).all() and not w.eq(1).any()
"""


def run(code: str, block: str = "") -> str:
    """Run in a fresh process in which the package `block` cannot be imported."""
    if block:
        # find_spec must not find it either, or "auto" would choose its backend.
        code = f"""
import sys, importlib.abc, importlib.util
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {block!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Block())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {block!r} else find(name, *a)
{code}"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=env | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_where_triton_is_missing() -> None:
    """A whole step on the CPU, and the reason when its backend is asked for."""
    out = run(
        STEP
        + """
try:
    zk.resolve_backend("triton", "cpu")
except ValueError as error:
    print(error)
""",
        block="triton",
    )
    assert "it is not installed" in out


def test_falls_to_the_reference_where_numba_is_missing() -> None:
    assert run(STEP + 'print(zk.resolve_backend("auto", "cpu"))', block="numba") == "reference\n"


def test_the_reference_imports_neither_triton_nor_numba_itself() -> None:
    for path in (PACKAGE / "reference").glob("*.py"):
        assert not {"triton", "numba", "zo_kernels.triton.shim"} & imported(path), path.name


def test_the_interpreter_is_not_a_default() -> None:
    """Without TRITON_INTERPRET, kernels are not run on CPU tensors by accident."""
    pytest.importorskip("triton")
    code = """
from zo_kernels import resolve_backend
try:
    resolve_backend("triton", "cpu")
except ValueError as error:
    print(error)
"""
    assert "needs CUDA tensors" in run(code)


def imported(path: Path) -> set[str]:
    """Modules named by the import statements of a file, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names.add(node.module or "")
    return names


FILES = sorted(PACKAGE.rglob("*.py"))
# Arrows run down this list only; a column knows no other one, but the twins on the CPU the
# reference. The registry finds a function in a column by its name, when an op is called.
ORDER = ("__init__", "ops", "paths", "triton", "cpu", "reference", "int8", "rules", "geometry")
ORDER += ("registry", "layout")
APART = {("triton", "cpu"), ("triton", "reference"), ("ops", "cpu"), ("ops", "reference")}


def room_of(module: str) -> str:
    """The place in ORDER of a module of the package."""
    return [*module.split("."), "__init__"][1]


def modules_of(path: Path) -> tuple[str, set[str]]:
    """The module of a file, and those of the package that it imports."""
    parts = ["zo_kernels", *path.relative_to(PACKAGE).with_suffix("").parts]
    own = {name for name in imported(path) if name.split(".")[0] == "zo_kernels"}
    return ".".join(part for part in parts if part != "__init__"), own


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_down(path: Path) -> None:
    module, own = modules_of(path)
    rooms = room_of(module), {room_of(name) for name in own}
    below = ORDER[ORDER.index(rooms[0]) + (rooms[0] not in ("ops", "triton", "cpu", "reference")) :]
    assert rooms[1] <= {*below} - {there for here, there in APART if here == rooms[0]}


def test_no_circle() -> None:
    graph = dict(map(modules_of, FILES))
    done: set[str] = set()
    while graph:
        free = {module for module, own in graph.items() if own <= done}
        assert free, f"a circle among {sorted(graph)}"
        done |= free
        graph = {module: own for module, own in graph.items() if module not in free}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_package_knows_no_model(path: Path) -> None:
    assert not [n for n in imported(path) if n.split(".")[0] in ("elasticzo", "experiments")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_triton_is_imported_in_one_place(path: Path) -> None:
    if path.name != "shim.py":
        assert not [n for n in imported(path) if n.split(".")[0] == "triton"]
