"""Benchmarks: one command each; they verify before they time."""
