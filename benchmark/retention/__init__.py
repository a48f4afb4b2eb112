"""How long a plan takes: `run` measures it."""
