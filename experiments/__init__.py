"""What a researcher runs: the training command, the studies, the benchmarks."""

import sys
from types import TracebackType


def _say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of a KeyboardInterrupt that nobody catches a word; Python then ends as it always does."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # python -m experiments.<name>: while it is imported or parses
    sys.excepthook = _say
