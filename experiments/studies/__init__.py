"""Questions that several runs answer; each a command."""
