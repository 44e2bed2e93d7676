"""The order of the rooms of `experiments`: each imports what is below it, and nobody a command."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "experiments"
# From the top; rooms of one line do not know each other.
ROOMS = ("documents", "demo paper estimator benchmarks", "studies", "static", "train",
         "timing commands files")  # fmt: skip
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """What a module imports anywhere, also for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield str(node.module)


def test_arrows_run_one_way() -> None:
    floor = {room: i for i, line in enumerate(ROOMS) for room in line.split()}
    known = {name: {*imports(path)} & MODULES.keys() - {name} for name, path in MODULES.items()}
    known = {name: found - {"experiments"} for name, found in known.items()}
    for one, other in ((one, other) for one, found in known.items() for other in found):
        here, there = one.split(".")[1], other.split(".")[1]
        assert here == there or floor[here] < floor[there], f"{one} imports {other}"
        assert '__name__ == "__main__"' not in MODULES[other].read_text(), f"{one}: {other}"
    TopologicalSorter(known).prepare()  # raises CycleError for a circle
