"""The live server of the client's tests, for the commands that talk to one."""

from unit.client.conftest import live

__all__ = ["live"]
