"""The training command and what it is made of."""
