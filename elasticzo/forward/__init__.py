"""How a float network is evaluated at points: all of them stacked, or one after the other."""
