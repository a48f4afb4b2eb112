"""Measurements of the conditional memory. `run` takes them, `plots` draws them."""
