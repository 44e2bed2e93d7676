"""The order of rooms: what a module may import; no circle (TYPE_CHECKING counts)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import elasticzo

ROOT = Path(elasticzo.__file__).parent
# A room imports what stands before it, or beside it between the same arrows.
ROOMS = (
    "settings buffers digest overlap files cut points reductions > lines losses data models > head"
    " > directions > samples feedback > estimator > session > module forward > ownership optim"
    " > trajectory memory checkpoint > wrapper int8 > capture > __init__"
)
ORDER = {room: i for i, line in enumerate(ROOMS.split(">")) for room in line.split()}
MODULES = {
    ".".join(p.relative_to(ROOT.parent).with_suffix("").parts): p for p in ROOT.rglob("*.py")
}


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports; names of submodules are followed."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [n for n in names if n in MODULES] or [node.module, f"{node.module}.__init__"]
            yield from (n for n in found if n in MODULES)


def test_arrows_run_one_way() -> None:
    graph = {name: set(imports(path)) for name, path in MODULES.items()}
    for name, wanted in graph.items():
        for other in wanted:
            here, there = (ORDER[n.split(".")[1]] for n in (name, other))
            assert there <= here, f"{name} imports {other}, which stands behind it"
    tuple(TopologicalSorter(graph).static_order())  # raises where there is a circle
