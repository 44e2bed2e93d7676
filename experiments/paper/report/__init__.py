"""The study's results as one page that needs nothing else: `python -m experiments.paper.report`."""
