"""Engram inside the frameworks of others; each needs an extra dependency of its name."""
