"""What the zeroth-order estimator does, by one command: `python -m experiments.estimator`."""
