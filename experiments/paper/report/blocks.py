"""What a page is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["", "best", "kept", "broken", "unknown"]


@dataclass(frozen=True)
class Cell:
    """Text of a table, and how it stands out."""

    text: str
    kind: Kind = ""


Row = Sequence[str | Cell]


@dataclass(frozen=True)
class Table:
    """The first column names the rows.

    Attributes:
        caption: what the figures are, with their unit.
        folded: seen when asked for.
    """

    head: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure inside the page.

    Attributes:
        source: a data URI.
        wide: of small print: on a narrow screen it is scrolled, not shrunk.
    """

    source: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Block:
    """A part of the page: figures, and the command that made them."""

    title: str
    text: Sequence[str] = ()
    command: str = ""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    made: str = ""
    """Hardware, seeds and commit."""
    parts: Sequence[Block] = field(default=())

    @property
    def anchor(self) -> str:
        """The name by which a link finds it."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def made_by(content: Mapping[str, Any]) -> str:
    """Hardware, seeds and commit of a results file and of its sections, as far as they say."""
    parts = []
    told = [content, *dict(content.get("sections") or {}).values()]
    for name in ("hardware", "clock", "commit", "commits"):
        for value in (one.get(name) for one in told):
            texts = [str(v) for v in (value if isinstance(value, list) else [value]) if v]
            if name.startswith("commit"):
                texts = [f"commit {text[:10]}" for text in texts]
            parts += texts
    seeds = (one.get("seeds") for one in told)
    parts += [f"seeds {', '.join(map(str, found))}" for found in seeds if found]
    return "; ".join(dict.fromkeys(parts))
