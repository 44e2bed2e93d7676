"""A hash of what is compiled: the source of a kernel and of all it calls, and its configuration.

Equal in every version of Python and Triton, compiled or interpreted. Comments, docstrings and blank
lines take no part; the compiler and its library (`tl.philox`) are named by their version instead.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import textwrap
import tokenize
from collections.abc import Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.static.config import Config

LAYOUT = {
    tokenize.COMMENT: None,
    tokenize.NL: None,
    tokenize.ENDMARKER: None,
    tokenize.NEWLINE: "\n",
    tokenize.INDENT: "{",
    tokenize.DEDENT: "}",
}


def _tokens(text: str, tree: ast.AST) -> str:
    """The words of a source without comments, docstrings and its way of indenting."""
    docstrings = {
        (node.body[0].lineno, node.body[0].col_offset)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None
    }
    words = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        word = LAYOUT.get(token.type, token.string)
        if word is not None and token.start not in docstrings:
            words.append(word)
    return " ".join(words)


def _named(tree: ast.AST, function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Globals that a source names, also as attributes of modules: (name, value)."""
    own = function.__code__.co_varnames
    scope = {k: v for k, v in function.__globals__.items() if k not in own}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in scope:
            yield node.id, scope[node.id]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = scope.get(node.value.id)
            if isinstance(module, ModuleType) and not module.__name__.startswith("triton"):
                yield node.attr, getattr(module, node.attr)


@cache
def _read(function: FunctionType) -> tuple[str, list[tuple[str, Any]]]:
    """The words of one function, and the globals that it names."""
    text = textwrap.dedent(inspect.getsource(function))
    tree = ast.parse(text)
    return _tokens(text, tree), list(_named(tree, function))


def sources(kernel: Any) -> dict[str, str]:
    """The words of a kernel and of every jit function that it calls, constants by value; by name.

    Raises: TypeError where a kernel names a global that is neither.
    """
    found: dict[str, str] = {}
    todo = [kernel]
    while todo:
        function = todo.pop()
        function = getattr(function, "fn", function)
        assert isinstance(function, FunctionType)
        name = f"{function.__module__}.{function.__qualname__}"
        if name in found:
            continue
        found[name], named = _read(function)
        for other, value in named:
            if isinstance(getattr(value, "fn", None), FunctionType):
                todo.append(value)
            elif type(value).__name__ == "constexpr":
                found[f"{function.__module__}.{other}"] = repr(value.value)
            elif not isinstance(value, ModuleType) and other != "jit":
                raise TypeError(f"{name} names {other}: no jit function and no tl.constexpr")
    return found


def digest(config: Config) -> str:
    """The hash of a configuration: 16 hexadecimal digits."""
    content = {
        # Without the modules: where a function stands changes nothing that is compiled.
        "sources": sorted({f"{k.split('.')[-1]}: {v}" for k, v in sources(config.kernel).items()}),
        "signature": config.signature,
        "constants": config.plain_constants,
        "aligned": sorted(config.aligned),
        "launch": [config.warps, config.stages],
        "problem": config.problem,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


__all__ = ["digest", "sources"]
