"""Compiled evidence: every shipped configuration of every kernel, compiled without a GPU."""
