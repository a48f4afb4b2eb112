"""What `engram doctor` asks of the seam: versions, device, hooks, kernels, page hashing."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from engram.sglang_plugin import compat, cpu
from engram.version import SUPPORTED_SGLANG, __version__


@dataclass(frozen=True)
class Hook:
    """A name of SGLang that Engram hooks, how, and whether SGLang applied it here."""

    target: str
    kind: str
    applied: bool


@dataclass(frozen=True)
class SeamReport:
    """How Engram and the SGLang that is installed get on; ``problems`` is empty when all is well.

    ``kernels`` are the names of SGLang replaced to serve on a CPU, empty with an accelerator.
    """

    engram: str
    sglang: str
    sglang_supported: str
    torch: str
    python: str
    device: str
    page_hash: str
    hooks: tuple[Hook, ...]
    kernels: tuple[str, ...]
    problems: tuple[str, ...]


def seam_report() -> SeamReport:
    """Load SGLang with its plug-ins in this process, as a server does, and look at the result."""
    from sglang.srt.plugins import load_plugins

    from engram.sglang_plugin.plugin import HOOKS

    load_plugins()
    unapplied = set(compat.unapplied(HOOKS))
    hooks = tuple(
        Hook(target, kind, target not in unapplied) for target, (_, kind) in HOOKS.items()
    )
    found = compat.installed_sglang()
    problems = [str(problem) for problem in compat.problems()]
    if found != SUPPORTED_SGLANG:
        problems.append(f"SGLang is {found}; this Engram supports {SUPPORTED_SGLANG}")
    problems += [f"the hook on {hook.target} was not applied" for hook in hooks if not hook.applied]
    page_hash, hash_problem = page_hashing()
    return SeamReport(
        engram=__version__,
        sglang=found,
        sglang_supported=SUPPORTED_SGLANG,
        torch=torch.__version__,
        python=platform.python_version(),
        device=device(),
        page_hash=page_hash,
        hooks=hooks,
        kernels=tuple(cpu.install()),
        problems=(*problems, *hash_problem),
    )


def device() -> str:
    """What a server started here would compute on."""
    if cpu.is_active():
        return f"CPU, {torch.get_num_threads()} threads (platform engram_cpu)"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)} ({torch.cuda.device_count()} visible)"
    return "as SGLang chooses; torch sees no CUDA device"


def page_hashing() -> tuple[str, tuple[str, ...]]:
    """Which code makes page keys, and how it differs from the definition, if it does."""
    from sglang.srt.mem_cache.utils import storage_namespace_seed

    from engram.sglang_plugin import keys

    sample = list(range(1, 9))
    try:
        from sglang.srt.mem_cache.rust_tree_core import extension  # noqa: F401
    except ImportError:
        return "hashlib (SGLang's Rust extension cannot be loaded)", ()
    defined = keys.hash_pages_in_python(sample, storage_namespace_seed(None, None), 4)
    if keys.page_keys(sample, 4) != defined:
        return "Rust extension", (
            "SGLang's Rust extension makes other page keys than SHA-256 does",
        )
    return "Rust extension", ()
