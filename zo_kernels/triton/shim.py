"""Triton where it is installed, and names that let a kernel file be imported where it is not."""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # macOS, Windows, CPU-only installs: the reference and the CPU twin remain

    class _Absent:
        """Stands for `triton` and `tl` in annotations and decorators of kernels never launched."""

        def __getattr__(self, name: str) -> _Absent:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) else self

    triton = tl = _Absent()

    def jit(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args else (lambda fn: fn)


__all__ = ["jit", "tl", "triton"]
