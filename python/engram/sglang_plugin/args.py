"""Engram's command-line flags, and what they set of SGLang's own.

`add_flags` hangs them on SGLang's parser, `apply_flags` turns the parsed namespace into what
SGLang understands.  The settings reach the scheduler processes inside the linker's own
configuration, which SGLang pickles along.
"""

from __future__ import annotations

import argparse
import logging
import os
import uuid
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, get_args, get_origin

import psutil
from pydantic import ValidationError

from engram.core.settings import Settings
from engram.core.weights import adapter_digest, weight_files
from engram.errors import EngramError
from engram.sglang_plugin import adapters as adapters_module
from engram.sglang_plugin.cpu import is_active as cpu_is_active
from engram.store.disk import DiskStore
from engram.store.keys import KEY_VARIABLE, find_key, publish_in_memory, read_key_file

logger = logging.getLogger(__name__)

LINKER: Final = "EngramLinker"
LINKER_MODULE: Final = "engram.sglang_plugin.linker"


@dataclass(frozen=True)
class Flag:
    """One flag; not `active` while its machinery is still to come."""

    field: str
    help: str
    active: bool = True

    @property
    def option(self) -> str:
        """The flag as typed."""
        return "--" + self.field.replace("_", "-")


FLAGS: Final = (
    Flag("enable_snapshot_persistence", "Switch the snapshot subsystem on."),
    Flag("snapshot_dir", "Directory of the snapshot store; made if missing."),
    Flag("snapshot_retention_count", "Snapshots kept per conversation branch."),
    Flag(
        "snapshot_trigger_policy",
        "When a tagged turn is saved by itself.",
    ),
    Flag("snapshot_every_n_turns", "Turns between saves under every_n_turns."),
    Flag(
        "snapshot_min_interval_seconds",
        "Least time between automatic saves of one conversation; the last turn is always saved.",
    ),
    Flag(
        "snapshot_point_interval",
        "Tokens between states that VRAM keeps inside prompts and replies; 0: the usual points.",
    ),
    Flag("snapshot_keep_named_branches", "Exempt named branches from retention."),
    Flag("snapshot_auto_restore", "Let requests bring their stored prefix into RAM themselves."),
    Flag(
        "snapshot_health_check_interval",
        "Compare a state's norm with the one so many turns earlier; 0: never.",
    ),
    Flag("snapshot_health_failure_policy", "What to do with a state that fails."),
    Flag("enable_memory_tiers", "Let conversations leave RAM by policy."),
    Flag("max_warm_conversations", "Conversations kept in the RAM tier."),
    Flag("max_warm_memory_gb", "Size of the RAM tier of each rank."),
    Flag("conversation_active_timeout", "Seconds a restored snapshot is held in the RAM tier."),
    Flag("conversation_warm_timeout", "Seconds until a conversation leaves RAM."),
    Flag("conversation_cold_retention", "Seconds until it leaves the disk."),
    Flag("enable_cross_session_refs", "Let a conversation continue from another's snapshot."),
    Flag("enable_tier_background_cleanup", "Demote and expire in the background."),
    Flag("tier_cleanup_interval", "Seconds between clean-ups."),
    Flag("enable_agent_tools", "Serve the agent framework."),
    Flag("agent_tool_timeout", "Seconds one tool call may take."),
    Flag("agent_max_iterations", "Model calls in one agent run."),
    Flag("agent_max_tool_calls_per_iteration", "Tool calls in one reply."),
    Flag(
        "snapshot_durability",
        "Automatic saves: 'sync' ends a reply only when its snapshot is durable.",
    ),
    Flag("snapshot_disk_quota_gb", "GB that the segments may take on disk."),
    Flag("snapshot_pin_budget_gb", "GB of VRAM that pinned conversations may hold."),
    Flag(
        "snapshot_promote_timeout",
        "Seconds a request waits for its stored prefix; then it is recomputed.",
    ),
    Flag(
        "snapshot_encryption_key_file",
        "File with the key for encryption at rest; else ENGRAM_SNAPSHOT_KEY, if set.",
    ),
    Flag("snapshot_link_by_prefix", "Make untagged chats turns of the conversation they extend."),
    Flag("snapshot_tenants", "File that maps API keys to tenants.", active=False),
    Flag("agent_tools_module", "Python module with tools for agents."),
    Flag("snapshot_remote", "URL of an object store shared by replicas.", active=False),
    Flag("snapshot_verify_weights", "How thoroughly the weights are fingerprinted."),
)


UNSAFE_TO_IGNORE: Final = frozenset({"snapshot_tenants"})
"""Flags of machinery still to come whom an operator trusts with secrets: refused, not ignored."""


class Switch(argparse._StoreAction):
    """`--x` and `--no-x`; also `--x true`, which is how SGLang passes on `x: true` of a YAML file.

    SGLang refuses a `--config` file that names a flag of argparse's own BooleanOptionalAction.
    """

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        names = [*option_strings, *("--no-" + option[2:] for option in option_strings)]
        super().__init__(
            names, dest, nargs="?", const=True, type=_truth, metavar="true|false", **kwargs
        )

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        """Store the value, turned round by the `--no-` form."""
        setattr(namespace, self.dest, value is not str(option).startswith("--no-"))


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add Engram's flags and the alias of an upstream flag that was renamed."""
    group = parser.add_argument_group("Engram: snapshots of inference state")
    for flag in FLAGS:
        note = "" if flag.active else " Not yet active."
        group.add_argument(
            flag.option, default=None, help=f"{flag.help}{note} [{_default(flag)}]", **_kind(flag)
        )
    group.add_argument(
        "--mamba-scheduler-strategy",
        dest="mamba_radix_cache_strategy",
        choices=["auto", "no_buffer", "extra_buffer", "extra_buffer_lazy"],
        default=argparse.SUPPRESS,
        help="Old name of --mamba-radix-cache-strategy.",
    )


def apply_flags(args: argparse.Namespace) -> Settings:
    """Take Engram's values off the namespace and set SGLang's accordingly.

    Exits with a message on the standard error for what cannot work, as argparse does.
    """
    settings = _settings(args)
    if cpu_is_active():
        _prepare_cpu(args)
    if settings.enable_agent_tools:
        _check_agents(settings)
    if settings.enable_snapshot_persistence:
        refuse(args)
        _switch_on(args, settings)
    return settings


def settings_of(server_args: Any) -> Settings | None:
    """The settings of a server whose persistence is on; None when it is off."""
    config = server_args.unified_cache_external_linker_config
    if not isinstance(config, dict) or config.get("linker_module_path") != LINKER_MODULE:
        return None
    return Settings.model_validate(config["linker_extra_config"]["settings"])


def open_store(server_args: Any, *, lock: bool) -> DiskStore:
    """The snapshot store of a server whose persistence is on, under its key if it has one.

    Raises as `DiskStore.open` does, and `EncryptionKeyError` for a key that cannot be read.
    """
    extra = server_args.unified_cache_external_linker_config["linker_extra_config"]
    path = extra["key_file"]
    key = None if path is None else read_key_file(path)
    return DiskStore.open(extra["settings"]["snapshot_dir"], lock=lock, key=key)


def _settings(args: argparse.Namespace) -> Settings:
    given = {}
    for flag in FLAGS:
        value = args.__dict__.pop(flag.field, None)
        if value is not None:
            given[flag.field] = value
    try:
        settings = Settings.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        option = "--" + str(problem["loc"][0]).replace("_", "-")
        _exit(f"{option}: {problem['msg']}")
    if settings.enable_snapshot_persistence:
        for field in sorted(given.keys() & UNSAFE_TO_IGNORE):
            option = "--" + field.replace("_", "-")
            _exit(f"{option} is not available yet, and running without it would not be safe")
        for flag in FLAGS:
            if flag.field in given and not flag.active:
                logger.warning("Engram: %s is accepted but not yet active", flag.option)
    return settings


def _prepare_cpu(args: argparse.Namespace) -> None:
    """Settings that stock SGLang needs on a machine without an accelerator."""
    chosen: dict[str, object] = {}
    if args.device is None:
        args.device = chosen["device"] = "cpu"
    if args.attention_backend is None:
        args.attention_backend = chosen["attention backend"] = "torch_native"
    if args.mamba_radix_cache_strategy == "auto":
        args.mamba_radix_cache_strategy = chosen["strategy"] = "no_buffer"
    if args.mamba_radix_cache_strategy == "no_buffer" and not args.disable_overlap_schedule:
        args.disable_overlap_schedule = True
        chosen["overlap scheduling"] = "off"
    processes = args.tp_size * args.dp_size
    if processes > 1 and CORES_OF_RANKS not in os.environ:
        os.environ[CORES_OF_RANKS] = _share_cores(processes)
        chosen["cores of each rank"] = os.environ[CORES_OF_RANKS]
    # A scheduler that polls takes a whole core, which is what computes here.
    args.sleep_on_idle = True
    if args.mem_fraction_static is None and args.max_total_tokens is None:
        fraction = _memory_fraction(args.model_path)
        if fraction is not None:
            args.mem_fraction_static = chosen["memory fraction"] = fraction
    if chosen:
        facts = ", ".join(f"{name} {value}" for name, value in chosen.items())
        logger.info("Engram: no accelerator found, serving on CPU (%s)", facts)


CORES_OF_RANKS: Final = "SGLANG_CPU_OMP_THREADS_BIND"
"""Without it SGLang wants a NUMA node for each rank."""


def _share_cores(ranks: int) -> str:
    """The cores of this process divided among ranks, as SGLang reads it: "0,1|2,3"."""
    cores = sorted(os.sched_getaffinity(0))
    # On fewer cores than ranks, some share one.
    shares = [cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


POOL_SHARE: Final = 0.2
"""Share of the free memory that the pools take on a CPU.  Upstream's default, nearly all of it, is
for memory that serves nothing else; here it is the whole machine's, and every byte is zeroed."""


def _memory_fraction(model_path: str) -> float | None:
    """`--mem-fraction-static` for weights plus pools; None where the weights' size is unknown."""
    if not os.path.isdir(model_path):
        return None
    weights = sum(path.stat().st_size for path in weight_files(model_path))
    share = POOL_SHARE + weights / psutil.virtual_memory().available
    return round(share, 3) if share < 0.9 else None


REFUSED: Final = (
    ("tokenizer_worker_num", 1, "--tokenizer-worker-num above 1", "use one tokenizer worker"),
    ("pp_size", 1, "pipeline parallelism", "use --pp-size 1"),
    ("enable_dp_attention", False, "data-parallel attention", "drop --enable-dp-attention"),
    ("attn_dp_size", 1, "data-parallel attention", "use --attn-dp-size 1"),
    ("attn_cp_size", 1, "context parallelism", "use --attn-cp-size 1"),
    ("enable_prefill_cp", False, "context parallelism", "drop --enable-prefill-cp"),
    ("dcp_size", 1, "decode context parallelism", "use --dcp-size 1"),
    ("dwdp_size", 1, "distributed weight data parallelism", "use --dwdp-size 1"),
    ("ep_size", 1, "expert parallelism", "use --ep-size 1"),
    ("nnodes", 1, "more than one node", "use --nnodes 1: every rank needs the same folder"),
    ("speculative_algorithm", None, "speculative decoding", "drop --speculative-algorithm"),
    ("disaggregation_mode", "null", "prefill/decode disaggregation", "drop --disaggregation-mode"),
    ("enable_hierarchical_cache", False, "HiCache", "drop --enable-hierarchical-cache"),
    ("enable_lmcache", False, "LMCache", "drop --enable-lmcache"),
    ("enable_flexkv", False, "FlexKV", "drop --enable-flexkv"),
    ("radix_cache_backend", None, "another radix cache", "drop --radix-cache-backend"),
    (
        "enable_unified_cache_external_linker",
        False,
        "another external linker",
        "drop --enable-unified-cache-external-linker",
    ),
    # An adapter that had to make room is read again later, under the id of its files at launch.
    ("max_loaded_loras", None, "--max-loaded-loras", "drop it: all adapters stay loaded"),
    ("enable_linear_replayssm", False, "ReplaySSM", "drop --enable-linear-replayssm"),
    (
        "enable_session_radix_cache",
        False,
        "the session radix cache",
        "drop --enable-session-radix-cache",
    ),
    # Kept beside the slots of the pools: those of a restored prefix are another request's.
    (
        "enable_return_routed_experts",
        False,
        "routed experts in replies",
        "drop --enable-return-routed-experts",
    ),
    (
        "enable_return_indexer_topk",
        False,
        "indexer choices in replies",
        "drop --enable-return-indexer-topk",
    ),
    # They change what the model computes, and no fingerprint would tell.
    ("kt_weight_path", None, "experts of KTransformers", "drop --kt-weight-path"),
    ("forward_hooks", None, "forward hooks", "drop --forward-hooks"),
    ("decrypted_config_file", None, "a decrypted config", "drop --decrypted-config-file"),
    # Other front ends than the HTTP server: nothing would answer a save there.
    ("grpc_mode", False, "the gRPC server", "drop --grpc-mode"),
    ("smg_grpc_mode", False, "the gRPC server", "drop --smg-grpc-mode"),
    ("use_ray", False, "Ray", "drop --use-ray"),
    ("encoder_only", False, "an encoder server", "drop --encoder-only"),
    # What they compute of a prompt is no prefix of anything, and must not be cut into pieces.
    ("is_embedding", False, "an embedding server", "drop --is-embedding"),
    ("dllm_algorithm", None, "diffusion language models", "drop --dllm-algorithm"),
    ("enable_streaming_session", False, "streaming sessions", "drop --enable-streaming-session"),
)
"""What persistence cannot work with yet: field, the value that is fine, its name, what to do."""


def refuse(args: argparse.Namespace) -> None:
    """Exit, naming the first setting that snapshots cannot be combined with."""
    for field, fine, name, hint in REFUSED:
        value = getattr(args, field, fine)
        if value != fine and not (fine is None and not value):
            _exit(f"--enable-snapshot-persistence does not work with {name} yet; {hint}")
    if args.mamba_radix_cache_strategy == "extra_buffer_lazy":
        _exit(
            "--enable-snapshot-persistence does not work with extra_buffer_lazy yet; "
            "use --mamba-radix-cache-strategy extra_buffer"
        )
    if args.enable_lora and not args.lora_paths:
        _exit(
            "--enable-snapshot-persistence does not work with --enable-lora alone: adapters cannot "
            "be loaded while the server runs; name them with --lora-paths"
        )
    no_buffer = args.mamba_radix_cache_strategy in ("auto", "no_buffer")
    if no_buffer and getattr(args, "strip_thinking_cache", False):
        _exit(
            "--enable-snapshot-persistence does not work with --strip-thinking-cache under "
            "no_buffer: the state kept there is not the one its key names"
        )


def _check_agents(settings: Settings) -> None:
    if not settings.enable_snapshot_persistence:
        logger.warning(
            "Engram: --enable-agent-tools has no effect without --enable-snapshot-persistence"
        )
    elif settings.snapshot_encryption_key_file is not None or KEY_VARIABLE in os.environ:
        _exit(
            "--enable-agent-tools does not work with encryption at rest yet: what agents remember "
            "and the journal of their runs would not be encrypted"
        )


def _switch_on(args: argparse.Namespace, settings: Settings) -> None:
    if args.disable_radix_cache:
        logger.warning(
            "Engram: --disable-radix-cache is not applied: snapshots are kept in the radix tree"
        )
        args.disable_radix_cache = False
    _check_adapters(args.lora_paths or (), settings)
    args.enable_cache_report = True
    args.enable_unified_cache_external_linker = True
    args.unified_cache_external_linker_backend = "dynamic"
    args.unified_cache_external_linker_config = {
        "linker": LINKER,
        "linker_module_path": LINKER_MODULE,
        "linker_extra_config": {
            "settings": settings.model_dump(mode="json"),
            # The same in every process of this server, and in no other server.
            "launch_id": uuid.uuid4().hex,
            "key_file": _key_file(settings),
        },
    }


def _check_adapters(adapters: Any, settings: Settings) -> None:
    """Have adapters be known by their files, and exit where those cannot be read."""
    adapters_module.name_by_contents(settings.snapshot_verify_weights)
    paths = adapters.values() if isinstance(adapters, dict) else map(_adapter_path, adapters)
    for path in paths:
        try:
            adapter_digest(path, settings.snapshot_verify_weights)
        except (EngramError, OSError) as error:
            _exit(f"--lora-paths: {error}")


def _adapter_path(adapter: Any) -> str:
    """The path of one of `--lora-paths`, in any of the forms that SGLang takes."""
    if isinstance(adapter, str):
        return adapter.split("=", 1)[-1]
    return str(adapter["lora_path"])


def _key_file(settings: Settings) -> str | None:
    """Where every process of this server reads the key from; None if nothing is to be encrypted.

    A key of the environment is taken out of it, so that no child inherits it, and handed on in
    memory: what is returned is pickled, logged and shown, and must be no secret.
    """
    given = settings.snapshot_encryption_key_file
    try:
        key = find_key(given)
    except EngramError as error:
        _exit(str(error))
    if key is None:
        return None
    if given is not None:
        return os.path.abspath(given)
    del os.environ[KEY_VARIABLE]
    return publish_in_memory(key)


def _kind(flag: Flag) -> dict[str, Any]:
    annotation = Settings.model_fields[flag.field].annotation
    if get_origin(annotation) is Literal:
        return {"choices": list(get_args(annotation))}
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    if kinds[0] is bool:
        return {"action": Switch}
    base = kinds[0]
    return {"type": base if base in (int, float, str) else float}


def _default(flag: Flag) -> str:
    value = Settings.model_fields[flag.field].default
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _exit(message: str) -> NoReturn:
    raise SystemExit(f"engram: error: {message}")
