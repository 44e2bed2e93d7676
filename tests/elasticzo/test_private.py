"""A private name is read by its own class alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.elasticzo.test_rooms import MODULES

TORCHS = {"_apply", "_load_from_state_dict", "_modules"}  # overridden in our classes


def test_nobody_reads_a_private_field_of_another_class() -> None:
    trees = {name: list(ast.walk(ast.parse(path.read_text()))) for name, path in MODULES.items()}
    own = {
        name: {a for node in nodes for a in private(node, own=True)}
        for name, nodes in trees.items()
    }
    ours = set().union(*own.values()) - TORCHS
    for name, nodes in trees.items():
        read = {attr for node in nodes for attr in private(node, own=False)}
        assert not read & ours - own[name], name


def private(node: ast.AST, own: bool) -> Iterator[str]:
    """Private names that a node defines for its own class, or reads of another object."""
    if isinstance(node, ast.FunctionDef) and own and node.name.startswith("_"):
        yield node.name
    if isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr[1] != "_":
        yield from [node.attr] if (ast.unparse(node.value) == "self") == own else []
