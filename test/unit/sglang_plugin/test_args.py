"""The command line: Engram's flags beside SGLang's, and what they set of SGLang's own."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

from engram.core.settings import Settings
from engram.sglang_plugin import args as args_module
from engram.sglang_plugin.args import (
    FLAGS,
    LINKER_MODULE,
    add_flags,
    apply_flags,
    open_store,
    settings_of,
)
from engram.store.filesystem import FileSystem
from engram.store.keyring import sealed_by
from engram.store.keys import KEY_VARIABLE, Key, new_key, write_key_file
from engram.store.layout import Layout

ON = "--enable-snapshot-persistence"
CONTRACT = {
    "--snapshot-dir": ("/some/where", "/some/where"),
    "--snapshot-retention-count": ("3", 3),
    "--snapshot-trigger-policy": ("every_n_turns", "every_n_turns"),
    "--snapshot-every-n-turns": ("7", 7),
    "--snapshot-min-interval-seconds": ("0.5", 0.5),
    "--snapshot-point-interval": ("512", 512),
    "--snapshot-health-check-interval": ("2", 2),
    "--snapshot-health-failure-policy": ("log_and_continue", "log_and_continue"),
    "--max-warm-conversations": ("5", 5),
    "--max-warm-memory-gb": ("1.5", 1.5),
    "--conversation-active-timeout": ("10", 10.0),
    "--conversation-warm-timeout": ("20", 20.0),
    "--conversation-cold-retention": ("30", 30.0),
    "--tier-cleanup-interval": ("15", 15.0),
    "--agent-tool-timeout": ("2.5", 2.5),
    "--agent-max-iterations": ("4", 4),
    "--agent-max-tool-calls-per-iteration": ("2", 2),
    "--snapshot-durability": ("sync", "sync"),
    "--snapshot-disk-quota-gb": ("100", 100.0),
    "--snapshot-pin-budget-gb": ("8", 8.0),
    "--snapshot-promote-timeout": ("3", 3.0),
    "--snapshot-encryption-key-file": ("/key", "/key"),
    "--snapshot-tenants": ("/tenants", "/tenants"),
    "--agent-tools-module": ("tools", "tools"),
    "--snapshot-remote": ("s3://bucket", "s3://bucket"),
    "--snapshot-verify-weights": ("full", "full"),
}
"""Flags with a value: how it is typed, what it becomes."""
SWITCHES = (
    ON,
    "--snapshot-keep-named-branches",
    "--snapshot-auto-restore",
    "--enable-memory-tiers",
    "--enable-cross-session-refs",
    "--enable-tier-background-cleanup",
    "--enable-agent-tools",
    "--snapshot-link-by-prefix",
)
DEFAULTS: dict[str, Any] = {
    "snapshot_dir": "./sglang_snapshots",
    "snapshot_retention_count": 10,
    "snapshot_trigger_policy": "every_turn",
    "snapshot_every_n_turns": 5,
    "snapshot_min_interval_seconds": 1.0,
    "snapshot_durability": "async",
    "snapshot_promote_timeout": 10.0,
    "max_warm_memory_gb": 10.0,
    "conversation_active_timeout": 300.0,
    "snapshot_verify_weights": "fast",
    "enable_snapshot_persistence": False,
    "snapshot_auto_restore": True,
}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if ON not in parser._option_string_actions:
        add_flags(parser)
    return parser


@pytest.fixture(autouse=True)
def with_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args_module, "cpu_is_active", lambda: False)


@pytest.fixture
def without_accelerator(with_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args_module, "cpu_is_active", lambda: True)


def parse(parser: argparse.ArgumentParser, *options: str) -> argparse.Namespace:
    return parser.parse_args(["--model-path", "no-such-directory", *options])


def test_the_contract_names_every_flag(parser: argparse.ArgumentParser) -> None:
    assert {flag.option for flag in FLAGS} == {*CONTRACT, *SWITCHES}
    assert {flag.field for flag in FLAGS} == set(Settings.model_fields)
    assert all(option in parser._option_string_actions for option in (*CONTRACT, *SWITCHES))


@pytest.mark.parametrize("option", CONTRACT)
def test_a_value_is_parsed_and_taken_off_the_namespace(
    parser: argparse.ArgumentParser, option: str
) -> None:
    typed, wanted = CONTRACT[option]
    args = parse(parser, option, typed)
    settings = apply_flags(args)
    field = option[2:].replace("-", "_")
    assert getattr(settings, field) == wanted
    assert type(getattr(settings, field)) is type(wanted)
    assert not hasattr(args, field), "SGLang's own settings know nothing of it"


@pytest.mark.parametrize("option", SWITCHES)
def test_every_switch_can_be_switched_on_and_off(
    parser: argparse.ArgumentParser, option: str
) -> None:
    field = option[2:].replace("-", "_")
    for typed, wanted in ((option, True), (option.replace("--", "--no-", 1), False)):
        settings = apply_flags(parse(parser, typed))
        assert getattr(settings, field) is wanted


@pytest.mark.parametrize("option", SWITCHES)
@pytest.mark.parametrize("value", [True, False])
def test_every_switch_can_be_set_in_a_configuration_file(
    parser: argparse.ArgumentParser, tmp_path: Path, option: str, value: bool
) -> None:
    path = tmp_path / "server.yaml"
    for key, wanted in ((option[2:], value), ("no-" + option[2:], not value)):
        path.write_text(f"{key}: {str(value).lower()}\nsnapshot-every-n-turns: 3\n")
        merged = ConfigArgumentMerger(parser).merge_config_with_args(["--config", str(path)])
        settings = apply_flags(parse(parser, *merged))
        assert getattr(settings, option[2:].replace("-", "_")) is wanted
        assert settings.snapshot_every_n_turns == 3


def test_a_switch_takes_no_other_value(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(SystemExit):
        parse(parser, ON, "yes")


def test_defaults(parser: argparse.ArgumentParser) -> None:
    settings = apply_flags(parse(parser))
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--snapshot-retention-count", "0"),
        ("--snapshot-every-n-turns", "0"),
        ("--snapshot-min-interval-seconds", "-1"),
        ("--max-warm-memory-gb", "0"),
        ("--snapshot-promote-timeout", "-0.5"),
        ("--conversation-active-timeout", "0"),
        ("--snapshot-disk-quota-gb", "0"),
    ],
)
def test_a_value_out_of_bounds_names_its_flag(
    parser: argparse.ArgumentParser, option: str, value: str
) -> None:
    with pytest.raises(SystemExit, match=option):
        apply_flags(parse(parser, f"{option}={value}"))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_names_its_flag(parser: argparse.ArgumentParser, value: str) -> None:
    with pytest.raises(SystemExit, match="--max-warm-memory-gb"):
        apply_flags(parse(parser, "--max-warm-memory-gb", value))


def test_a_choice_that_is_none_is_argparses_own_error(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(parser, "--snapshot-trigger-policy", "sometimes")
    assert caught.value.code == 2


# ---- off ----


def test_off_changes_nothing_of_sglang(parser: argparse.ArgumentParser) -> None:
    plain, with_flags = parse(parser), parse(parser, "--snapshot-dir", "/x", "--tp-size", "4")
    plain.tp_size = 4
    apply_flags(plain)
    apply_flags(with_flags)
    assert vars(plain) == vars(with_flags)
    assert plain.enable_unified_cache_external_linker is False
    assert settings_of(plain) is None


# ---- on ----


def test_on_configures_the_linker(parser: argparse.ArgumentParser) -> None:
    args = parse(parser, ON, "--snapshot-dir", "/x", "--snapshot-every-n-turns", "3")
    settings = apply_flags(args)
    assert args.enable_unified_cache_external_linker is True
    assert args.unified_cache_external_linker_backend == "dynamic"
    assert args.unified_cache_external_linker_config["linker_module_path"] == LINKER_MODULE
    assert args.enable_cache_report is True
    assert settings_of(args) == settings
    assert settings.snapshot_dir == "/x"


def test_the_radix_cache_cannot_be_switched_off(
    parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture
) -> None:
    args = parse(parser, ON, "--disable-radix-cache")
    apply_flags(args)
    assert args.disable_radix_cache is False
    assert "--disable-radix-cache" in caplog.text
    without = parse(parser, "--disable-radix-cache")
    apply_flags(without)
    assert without.disable_radix_cache is True


REFUSALS = [
    ("--tokenizer-worker-num", "2"),
    ("--pp-size", "2"),
    ("--enable-dp-attention",),
    ("--attn-dp-size", "2"),
    ("--attn-cp-size", "2"),
    ("--dcp-size", "2"),
    ("--enable-prefill-cp",),
    ("--dwdp-size", "2"),
    ("--ep-size", "2"),
    ("--nnodes", "2"),
    ("--speculative-algorithm", "NGRAM"),
    ("--disaggregation-mode", "prefill"),
    ("--enable-hierarchical-cache",),
    ("--enable-lmcache",),
    ("--enable-flexkv",),
    ("--radix-cache-backend", "another"),
    ("--enable-unified-cache-external-linker",),
    ("--enable-lora",),
    ("--max-loaded-loras", "4"),
    ("--enable-linear-replayssm",),
    ("--enable-session-radix-cache",),
    ("--grpc-mode",),
    ("--smg-grpc-mode",),
    ("--use-ray",),
    ("--encoder-only",),
    ("--enable-return-routed-experts",),
    ("--enable-return-indexer-topk",),
    ("--is-embedding",),
    ("--dllm-algorithm", "LowConfidence"),
    ("--enable-streaming-session",),
    ("--forward-hooks", '[{"name": "a"}]'),
    ("--decrypted-config-file", "config.json"),
    ("--kt-weight-path", "experts"),
    ("--strip-thinking-cache",),
]


@pytest.mark.parametrize("options", REFUSALS, ids=lambda options: options[0])
def test_what_persistence_cannot_work_with_is_refused_by_name(
    parser: argparse.ArgumentParser, options: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as caught:
        apply_flags(parse(parser, ON, *options))
    message = str(caught.value)
    assert options[0] in message
    assert ON in message
    apply_flags(parse(parser, *options))  # without persistence it is SGLang's own business


def test_every_refusal_is_tested() -> None:
    fields = {field for field, *_ in args_module.REFUSED} | {"strip_thinking_cache", "enable_lora"}
    assert {options[0][2:].replace("-", "_") for options in REFUSALS} == fields


@pytest.mark.parametrize("option", ["--snapshot-tenants"])
def test_what_keeps_secrets_is_never_ignored(parser: argparse.ArgumentParser, option: str) -> None:
    with pytest.raises(SystemExit, match=option):
        apply_flags(parse(parser, ON, option, "file"))


# ---- encryption ----


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key in the environment, and none left there that a test has set."""
    monkeypatch.setenv(KEY_VARIABLE, "")
    monkeypatch.delenv(KEY_VARIABLE)


def launched(parser: argparse.ArgumentParser, root: Path, *options: str) -> argparse.Namespace:
    args = parse(parser, ON, "--snapshot-dir", str(root), *options)
    apply_flags(args)
    return args


def shown(args: argparse.Namespace) -> str:
    """All that SGLang logs, shows, pickles or hands on of the command line."""
    return repr(args) + repr(vars(args)) + repr(pickle.dumps(vars(args))) + repr(os.environ)


def is_encrypted_by(args: argparse.Namespace, key: Key) -> None:
    with open_store(args, lock=True) as store, open_store(args, lock=False):
        assert sealed_by(Layout(store.root), FileSystem()) == key.fingerprint


def test_a_key_of_a_file_reaches_every_process_by_its_path(
    parser: argparse.ArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_key: None
) -> None:
    key = new_key()
    write_key_file(tmp_path / "key", key)
    monkeypatch.chdir(tmp_path)
    args = launched(parser, tmp_path / "store", "--snapshot-encryption-key-file", "key")
    assert key.text().split(":")[1].strip() not in shown(args)
    monkeypatch.chdir("/")  # another process may be anywhere
    is_encrypted_by(args, key)


def test_a_key_of_the_environment_leaves_it_and_reaches_every_process(
    parser: argparse.ArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_key: None
) -> None:
    key = new_key()
    monkeypatch.setenv(KEY_VARIABLE, key.text().strip())
    args = launched(parser, tmp_path / "store")
    assert KEY_VARIABLE not in os.environ
    assert key.text().split(":")[1].strip() not in shown(args)
    is_encrypted_by(args, key)


def test_a_server_without_a_key_encrypts_nothing(
    parser: argparse.ArgumentParser, tmp_path: Path, no_key: None
) -> None:
    args = launched(parser, tmp_path / "store")
    with open_store(args, lock=True) as store:
        assert sealed_by(Layout(store.root), FileSystem()) is None


@pytest.mark.parametrize("text", ["", "secret-of-mine", "engram-key-1:" + "0" * 63])
def test_a_bad_key_ends_the_launch_and_is_not_repeated(
    parser: argparse.ArgumentParser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_key: None,
    text: str,
) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(SystemExit, match="holds no key") as in_file:
        launched(parser, tmp_path, "--snapshot-encryption-key-file", str(path))
    monkeypatch.setenv(KEY_VARIABLE, text)
    with pytest.raises(SystemExit, match=f"{KEY_VARIABLE} holds no key") as in_environment:
        launched(parser, tmp_path)
    for caught in (in_file, in_environment):
        assert not text or text not in str(caught.value)
    with pytest.raises(SystemExit, match="one of the two"):
        launched(parser, tmp_path, "--snapshot-encryption-key-file", str(path))
    launched(parser, tmp_path, "--no-enable-snapshot-persistence")  # it is nobody's business then


@pytest.mark.parametrize("flag", [f for f in FLAGS if not f.active], ids=lambda f: f.field)
def test_a_flag_that_is_not_active_yet_says_so(
    parser: argparse.ArgumentParser, flag: args_module.Flag, caplog: pytest.LogCaptureFixture
) -> None:
    if flag.field in args_module.UNSAFE_TO_IGNORE:
        return
    typed = [flag.option, CONTRACT[flag.option][0]] if flag.option in CONTRACT else [flag.option]
    apply_flags(parse(parser, ON))
    assert caplog.text == ""
    apply_flags(parse(parser, ON, *typed))
    assert f"{flag.option} is accepted but not yet active" in caplog.text
    assert "Not yet active" in (parser._option_string_actions[flag.option].help or "")


# ---- strategy, and machines without an accelerator ----


def test_the_old_name_of_the_strategy_is_an_alias(parser: argparse.ArgumentParser) -> None:
    assert parse(parser).mamba_radix_cache_strategy == "auto"
    for option in ("--mamba-scheduler-strategy", "--mamba-radix-cache-strategy"):
        args = parse(parser, option, "no_buffer")
        apply_flags(args)
        assert args.mamba_radix_cache_strategy == "no_buffer"
        assert not hasattr(args, "mamba_scheduler_strategy")


def test_the_lazy_strategy_is_refused_and_the_other_named(parser: argparse.ArgumentParser) -> None:
    args = parse(parser, ON, "--mamba-scheduler-strategy", "extra_buffer_lazy")
    with pytest.raises(SystemExit, match="use --mamba-radix-cache-strategy extra_buffer"):
        apply_flags(args)


@pytest.mark.usefixtures("without_accelerator")
def test_without_an_accelerator_the_settings_are_chosen_and_named(
    parser: argparse.ArgumentParser, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    args = parse(parser)
    apply_flags(args)
    assert (args.device, args.attention_backend) == ("cpu", "torch_native")
    assert args.mamba_radix_cache_strategy == "no_buffer"
    assert args.disable_overlap_schedule is True
    assert args.sleep_on_idle is True
    lines = [r.getMessage() for r in caplog.records if "no accelerator" in r.getMessage()]
    assert len(lines) == 1
    for fact in ("cpu", "torch_native", "no_buffer", "overlap"):
        assert fact in lines[0]


@pytest.mark.usefixtures("without_accelerator")
def test_an_explicit_choice_is_honoured(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    args = parse(
        parser,
        *("--mamba-scheduler-strategy", "extra_buffer", "--device", "cpu"),
        *("--attention-backend", "intel_amx", "--mem-fraction-static", "0.5"),
    )
    apply_flags(args)
    assert args.mamba_radix_cache_strategy == "extra_buffer"
    assert args.attention_backend == "intel_amx"
    assert args.disable_overlap_schedule is False
    assert args.mem_fraction_static == 0.5


def test_with_an_accelerator_nothing_is_chosen(parser: argparse.ArgumentParser) -> None:
    args = parse(parser, ON)
    apply_flags(args)
    assert (args.device, args.attention_backend) == (None, None)
    assert args.mamba_radix_cache_strategy == "auto"
    assert args.disable_overlap_schedule is False
    assert args.sleep_on_idle is False


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [({0, 1}, 2, "0|1"), ({0, 1, 2, 5}, 2, "0,2|1,5"), ({4}, 2, "4|4"), ({1, 3}, 3, "1|3|1")],
)
def test_ranks_on_a_cpu_share_its_cores(
    parser: argparse.ArgumentParser,
    monkeypatch: pytest.MonkeyPatch,
    cores: set[int],
    ranks: int,
    shares: str,
) -> None:
    monkeypatch.setattr(args_module, "cpu_is_active", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setenv(args_module.CORES_OF_RANKS, "as the user says")
    apply_flags(parse(parser, "--tp-size", str(ranks)))
    assert os.environ[args_module.CORES_OF_RANKS] == "as the user says"
    monkeypatch.delenv(args_module.CORES_OF_RANKS)
    apply_flags(parse(parser))
    assert args_module.CORES_OF_RANKS not in os.environ
    apply_flags(parse(parser, "--tp-size", str(ranks)))
    assert os.environ[args_module.CORES_OF_RANKS] == shares
    monkeypatch.delenv(args_module.CORES_OF_RANKS)
    apply_flags(parse(parser, "--dp-size", str(ranks)))  # replicas are processes as well
    assert os.environ[args_module.CORES_OF_RANKS] == shares
    monkeypatch.delenv(args_module.CORES_OF_RANKS)
    apply_flags(parse(parser, "--dp-size", "2", "--tp-size", str(ranks)))
    assert len(os.environ[args_module.CORES_OF_RANKS].split("|")) == 2 * ranks


def test_agents_are_refused_with_encryption_and_need_persistence(
    parser: argparse.ArgumentParser,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What they remember would lie beside the encrypted states as it is."""
    with pytest.raises(SystemExit, match="encryption"):
        apply_flags(
            parse(parser, ON, "--enable-agent-tools", "--snapshot-encryption-key-file", "/key")
        )
    monkeypatch.setenv(KEY_VARIABLE, "00" * 32)
    with pytest.raises(SystemExit, match="encryption"):
        apply_flags(parse(parser, ON, "--enable-agent-tools"))
    monkeypatch.delenv(KEY_VARIABLE)
    apply_flags(parse(parser, "--enable-agent-tools"))
    assert "no effect" in caplog.text
