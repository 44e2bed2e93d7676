"""What a log says of the head, and whether a model has that head and those first weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elasticzo.digest import digest
from elasticzo.head import Head


def describe_head(head: Head) -> list[dict[str, Any]]:
    """The weights as a log lists them: all that an update of one depends on but its values."""
    return [
        {
            "name": one.name,
            "index": one.index,
            "scale": one.scale,
            "still_row": one.still_row,
            "shape": list(w.shape),
            "dtype": str(w.dtype).removeprefix("torch."),
        }
        for one, w in head
    ]


def first_weights(head: Head) -> dict[str, str]:
    """A digest of each weight as it is now, by name. Reads the device."""
    return {one.name: digest(w) for one, w in head}


def check_head(logged: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Compare the header of a log with what a model's would be.

    Raises: ValueError that names the weight.
    """
    mine = {one["name"]: one for one in ours["head"]}
    names = [one["name"] for one in logged["head"]]
    missing = [name for name in names if name not in mine]
    if missing:
        raise ValueError(f"the log updates {missing[0]!r}, which is not in this model's head")
    more = [name for name in mine if name not in names]
    if more:
        raise ValueError(
            f"this model's head has {more[0]!r}, which the log does not update: give it the tail "
            "that the run had"
        )
    for one in logged["head"]:
        here = mine[one["name"]]
        for what, value in one.items():
            if what in here and what != "group" and here[what] != value:
                raise ValueError(
                    f"the log is of another model: {what} of {one['name']!r} was {value}, is "
                    f"{here[what]}"
                )
    for name, value in logged["first_weights"].items():
        if ours["first_weights"][name] != value:
            raise ValueError(
                f"{name!r} has other values than it had at step {logged['start']}, where the log "
                "begins: give the model as it was then"
            )
