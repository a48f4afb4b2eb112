"""Weights that change while the server runs: what becomes of a rank's namespace.

After `/update_weights_from_disk` the weights are those of a directory, and the namespace is the one
that a server has which was updated to it in the same way; back at the directory of the launch it is
the first one again, and the old snapshots match.  Weights that came as tensors, over the network or
from another process have no directory: they get a name that nothing else ever has.  So does
whatever may be a mixture.  In doubt states are lost, never used with weights that did not make
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from engram.core.weights import Checkpoint, files_identity
from engram.sglang_plugin.rank import Launch, model_dir

if TYPE_CHECKING:
    from engram.sglang_plugin.cache import EngramRadixCache

UNTOUCHED: Final = ("Failed to get weights iterator", "Failed to get model loader")
"""How the messages of failed updates begin after which the weights are still those of before.

Not among them is the failure that upstream answers by "rolling back": it has set the model's path
by then, and loads the new files once more.
"""
FLUSH_REFUSED: Final = "Weights were updated, but the cache was not flushed"
WEIGHTS_TAG: Final = "weights"
"""Upstream's name of the weights among the kinds of memory that can be released."""


def engram_tree(manager: Any) -> EngramRadixCache | None:
    """The tree of a scheduler's `SchedulerWeightUpdaterManager`, if it is Engram's."""
    from engram.sglang_plugin.cache import EngramRadixCache

    cache = manager.scheduler.tree_cache if manager.scheduler is not None else None
    return cache if isinstance(cache, EngramRadixCache) else None


def update_from_disk(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around `SchedulerWeightUpdaterManager.update_weights_from_disk`."""
    cache = engram_tree(manager)
    if cache is None:
        return original(manager, request)
    before = _identity(request.model_path)
    output = original(manager, request)
    name: str | None = None
    if output.success or output.message.startswith(FLUSH_REFUSED):
        name = cache.containment.run(
            "the fingerprint of the new weights",
            lambda: _directory_name(cache.rank.launch, request, before),
            None,
        )
    elif output.message.startswith(UNTOUCHED):
        name = cache.rank.weights
    # In every case: what has failed here may have been done on another rank.
    cache.weights_changed(name)
    return output


def update_at_runtime(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around the other ways to change weights, the begin and the end of a session included.

    Between begin and end weights may also be written from outside, without a word.  What fails
    outside a session has changed nothing, else it may have changed a part.
    """
    cache = engram_tree(manager)
    if cache is None:
        return original(manager, request)
    in_session = manager._session is not None
    output = original(manager, request)
    if output.success or in_session or manager._session is not None:
        cache.weights_changed(None)
    return output


def update_from_ipc(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around `update_weights_from_ipc`, which needs no session and may fail half-way."""
    cache = engram_tree(manager)
    output = original(manager, request)
    if cache is not None:
        cache.weights_changed(None)
    return output


def release_memory(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Around `release_memory_occupation`: nothing of ours may touch memory that is unmapped.

    Weights that are released without a copy of them come back as whatever the memory holds.
    """
    cache = engram_tree(manager)
    if cache is None:
        return original(manager, request)
    assert cache.linker is not None
    cache.linker.cache_linker.quiesce()
    output = original(manager, request)
    released = not request.tags or WEIGHTS_TAG in request.tags
    if released and manager.memory_saver_adapter.enabled and not _weights_are_backed_up():
        cache.weights_changed(None)
    return output


def _weights_are_backed_up() -> bool:
    from sglang.srt.runtime_context import get_exec

    return bool(get_exec().features.enable_weights_cpu_backup)


def _identity(model_path: str) -> tuple[object, ...] | None:
    """Of the files in a directory; None for a name, whose files the hub's cache never changes."""
    if not os.path.isdir(model_path):
        return None
    try:
        return files_identity(model_path)
    except OSError:
        return ()  # a directory in doubt: no files have this identity


def _directory_name(launch: Launch, request: Any, before: tuple[object, ...] | None) -> str | None:
    """What the namespace calls the weights that were loaded from a directory; None in doubt."""
    if request.load_format not in (None, launch.load_format) or launch.checkpoint is None:
        return None
    path = model_dir(request.model_path, launch.revision)
    loaded = Checkpoint.read(path, launch.verify)
    if before is not None and before != files_identity(path):
        return None  # somebody wrote into the directory meanwhile
    return loaded.digest if loaded.replaces(launch.checkpoint) else None
