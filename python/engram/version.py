"""The version of the distribution, read by the build and by `engram doctor`."""

__version__ = "0.1.0"

SUPPORTED_SGLANG = "0.5.23"
