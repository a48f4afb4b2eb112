"""Engram: memory for language models that outlives a request, a process and a machine."""

from engram.version import __version__

__all__ = ["__version__"]
