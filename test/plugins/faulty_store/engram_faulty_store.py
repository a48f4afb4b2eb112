"""A plug-in of SGLang's for test servers: Engram's store and loads meet the faults a test sets.

SGLang finds it through the `dist-info` beside it when this folder is on PYTHONPATH.  The folder
with the faults is named by ENGRAM_TEST_FAULTS.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram.catalog import database
from engram.store import disk
from engram.testing.faults import ControlledFileSystem, FaultControl

_control = FaultControl(Path(os.environ["ENGRAM_TEST_FAULTS"]))


def register() -> None:
    """Called by SGLang in every process."""
    disk.FileSystem = lambda: ControlledFileSystem(_control)  # type: ignore[assignment,misc]
    database.Database._run = _committing(database.Database._run)  # type: ignore[method-assign]
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    # When the tree is built: the linker's module needs SGLang's to be loaded.
    HookRegistry.register(
        "sglang.srt.mem_cache.registry.create_unified_radix_cache", _around_tree, HookType.AROUND
    )


def _committing(run: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(self: database.Database, sql: str, parameters: Any = ()) -> Any:
        if sql == "COMMIT":
            try:
                _control.meet("commit")
            except OSError as error:
                full = error.errno == errno.ENOSPC
                said = "database or disk is full" if full else "disk I/O error"
                raise database._catalog_error(self.path, sqlite3.OperationalError(said)) from error
        return run(self, sql, parameters)

    return faulty


def _around_tree(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from engram.sglang_plugin.linker import EngramLinker

    scatter = EngramLinker._scatter

    def slow(self: Any, *given: Any) -> None:
        _control.meet("layer")
        scatter(self, *given)

    EngramLinker._scatter = slow  # type: ignore[method-assign]
    return original(*args, **kwargs)
