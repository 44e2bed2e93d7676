"""What a researcher runs: the training command, the studies, the benchmarks."""
