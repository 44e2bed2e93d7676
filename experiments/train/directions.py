"""By whose noise the head of a run is learnt: what fits together, and what the library is told."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from elasticzo import ElasticZO
from elasticzo.feedback import Feedback
from experiments.train.config import PAPER, TrainConfig

MATRICES = {
    "feedback": "learnt", "feedback-zero": "zero", "feedback-random": "random",
    "feedback-exact": "learnt", "feedback-exact-zero": "zero",
}  # fmt: skip
# Points of a cloud have no order: a matrix of each would learn what is the same for all of them.
# Seven layers add to the noise of the last, whose exact gradient it spoils (docs/decisions.md).
OF_MODEL: Mapping[str, Mapping[str, Any]] = {
    "pointnet": {"shared": ("conv*",), "noise": 0.02, "fit": "residual"}
}
# The last layers, whose activations are few.
EXACT: Mapping[str, tuple[str, ...]] = {
    "lenet5": ("fc*",), "pointnet": ("fc*",), "cnn": ("conv3", "fc*"),
}  # fmt: skip
GROUPED = ("sample", "auto")  # kinds of which neighbouring samples may share a direction


def by_feedback(config: TrainConfig) -> bool:
    """Whether errors come back through matrices, learnt ones or a control's."""
    return config.directions in MATRICES


def library_directions(config: TrainConfig, head: Iterable[str]) -> str | Feedback:
    """What `ElasticZO` takes.

    Args:
        head: names of its parameters.
    """
    kind = config.directions or "weight"
    if kind not in MATRICES:
        return kind
    settings = dict(OF_MODEL.get(config.model, {}))
    if "exact" in kind:
        names = {name.rpartition(".")[0] for name in head}
        settings["exact"] = tuple(p for p in EXACT[config.model] if fnmatch.filter(names, p))
    return Feedback(matrix=MATRICES[kind], **settings)


def check_head_rule(config: TrainConfig, optimizer: str) -> None:
    """Raise ValueError where the rule of the head does not fit what is said of it.

    Args:
        config: as given.
        optimizer: the recipe's.
    """
    given = config.head_optimizer or optimizer
    if given != "sgd" and config.head_momentum:
        raise ValueError(
            f"head_momentum belongs to head_optimizer 'sgd', got {config.head_momentum} with "
            f"{given!r}"
        )
    if given != optimizer and config.head_lr is None and {given, optimizer} != {"adam", "adamw"}:
        raise ValueError(
            f"head_lr must be given with head_optimizer {given!r}: the recipe of directions "
            f"{config.directions or PAPER['directions']} knows that of {optimizer!r} alone"
        )


def check_directions(config: TrainConfig, head: Sequence[str]) -> None:
    """Raise ValueError where the kind does not fit the rest of a configuration.

    Args:
        config: with its defaults.
        head: names of what ZO trains.
    """
    kind = config.directions
    if kind not in (None, PAPER["directions"]) and not head:
        raise ValueError(
            f"directions belongs to a method with a head that learns, got {kind!r} with "
            f"{config.method!r}"
        )
    if config.group != 1 and kind not in GROUPED:
        raise ValueError(
            f"group belongs to directions {' or '.join(GROUPED)}, got {config.group} with {kind!r}"
        )
    if not by_feedback(config):
        return
    if "exact" in str(kind) and config.model not in EXACT:
        raise ValueError(
            f"directions {kind!r} belongs to model {', '.join(EXACT)}, got {config.model!r}: say "
            "which layers are exact with elasticzo.feedback.Feedback(exact=...)"
        )
    wanted = {"queries": (1,), "noise": ("rademacher",), "tail_source": ("mean", "clean")}
    for name, values in wanted.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"{name} must be {' or '.join(map(str, values))} with directions {kind!r} (one "
                f"clean pass, one with signs), got {getattr(config, name)!r}"
            )


def kinds_of(model: ElasticZO) -> dict[str, str]:
    """By whose noise each weight of the head is learnt, and why, where that is not its own
    elements'; of a model that has seen a forward."""
    kinds = {name: str(kind) for name, kind in model.directions.items()}
    return {} if set(kinds.values()) <= {"weight"} else kinds


def summary(kinds: Mapping[str, str]) -> str:
    """How many weights have which kind: "4 node, 4 sample"."""
    count = Counter(kind.partition(" ")[0] for kind in kinds.values())
    return ", ".join(f"{n} {name}" for name, n in sorted(count.items()))


def replay_of(kinds: Mapping[str, str]) -> str | None:
    """What `elasticzo.replay` needs beside the log and the first weights; None: nothing."""
    found = {kind.partition(" ")[0] for kind in kinds.values()}
    if "feedback" in found:
        return (
            "no log: a step of feedback depends on the gradients of loss and tail, which no losses "
            "say; the checkpoint has weights and matrices"
        )
    if "node" in found:
        return (
            "trajectory.jsonl, the first weights, and the inputs of each step, as batches of "
            "elasticzo.replay: experiments.train.inputs makes them again from this configuration"
        )
    return None
