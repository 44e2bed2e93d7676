"""JSON lines, each with a checksum of itself and of all lines before it.

A changed, lost, added or exchanged line is noticed, wherever it is; a last line without its end was
cut off by a crash, and is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_MARK = b', "check": "'


def to_lines(records: Iterable[dict[str, Any]], check: str = "") -> tuple[bytes, str]:
    """The lines of some records that follow on a line of checksum `check` ("": the first ones),
    and the checksum of the last."""
    lines = []
    for record in records:
        body = json.dumps(record)[:-1].encode()
        check = _checksum(body, check)
        lines.append(body + _end(check) + b"\n")
    return b"".join(lines), check


def from_lines(path: Path) -> tuple[list[dict[str, Any]], str]:
    """All records of a file, and the checksum of the last.

    Raises: ValueError that names the first line that is not as it was written.
    """
    *lines, cut = path.read_bytes().split(b"\n")
    records, check = [], ""
    for number, line in enumerate(lines, start=1):
        found = _checked(line, check)
        if found is None:
            raise ValueError(f"{path}: line {number} is corrupt, it does not match its checksum")
        record, check = found
        records.append(record)
    if _checked(cut[:-1], check) is not None:  # whole, but for the byte that ends it
        raise ValueError(f"{path}: line {len(lines) + 1} is corrupt, its end is {cut[-1:]!r}")
    return records, check


def append(path: Path, lines: bytes) -> None:
    """Write lines to the end of a file and to the disk; of what fails, nothing stays."""
    with path.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            error.filename = str(path)
            file.truncate(size)
            raise


def _checksum(body: bytes, before: str) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()[:16]


def _end(check: str) -> bytes:
    return _MARK + check.encode() + b'"}'


def _checked(line: bytes, before: str) -> tuple[dict[str, Any], str] | None:
    """The record of a line and its checksum; None where that is another."""
    body, _, end = line.rpartition(_MARK)
    check = _checksum(body, before)
    if _MARK + end != _end(check):
        return None
    return json.loads(body + b"}"), check
