"""The paper's study: every method, in floats and in integers, tuned alike, and fine-tuned.

`python -m experiments.paper --preset cpu --data-dir DIR` runs it.
"""
