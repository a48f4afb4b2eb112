"""The tiny model: reproducible, loadable, and with outputs that depend on all it has read."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engram.testing import tiny_model
from engram.testing.tiny_model import FAMILIES, write_tiny_model
from engram.testing.tiny_tokenizer import CHARACTERS, SPECIALS

SPOKEN = range(len(SPECIALS), len(SPECIALS) + len(CHARACTERS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(SPOKEN, k=length)


@torch.inference_mode()
def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    reply: list[int] = output[0, len(ids) :].tolist()
    return reply


@torch.inference_mode()
def last_log_probabilities(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0, -1].float(), -1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_tiny_model(tmp_path / "again", seed=0)
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert files(again) == files(folder)
    changed = {name for name, data in files(other).items() if data != files(folder)[name]}
    assert changed == {"model.safetensors"}


def test_the_directory_is_whole(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["max_position_embeddings"] >= 8192
    assert len(config["layer_types"]) == 6
    assert config["mamba_chunk_size"] == 32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.chat_template
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("family", "seed"),
    [("granite-hybrid", 0), ("granite-hybrid", 2), *((family, 1) for family in sorted(FAMILIES))],
)
def test_greedy_output_varies(family: str, seed: int, tmp_path: Path) -> None:
    model = load(write_tiny_model(tmp_path, family, seed=seed))
    replies = [greedy(model, prompt(number, 30), 60) for number in range(3)]
    assert len({tuple(reply) for reply in replies}) == 3
    for reply in replies:
        assert len(set(reply)) >= 20
        # Not a cycle either: no period of up to 10 tokens holds to the end.
        assert all(reply[-20:] != reply[-20 - period : -period] for period in range(1, 11))
        assert set(reply) <= {*SPOKEN, SPECIALS.index("<|endoftext|>")}


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("granite-hybrid", ["mamba"]),
        ("granite-hybrid", ["attention"]),
        ("granite-hybrid", ["mamba", "attention"]),
        ("granite-moe", ["mamba", "attention"]),
        ("mamba2", ["mamba"]),
        ("mamba", ["mamba"]),
        ("falcon-mamba", ["mamba"]),
        ("falcon-h1", ["parallel"]),
        ("lfm2", ["conv", "attention"]),
        ("lfm2-moe", ["conv", "attention"]),
        ("qwen3-next", ["delta", "delta", "delta"]),
        ("qwen3-next", ["attention"]),
        ("qwen3.5", ["delta", "delta", "delta"]),
        ("qwen3.5-moe", ["delta", "delta", "delta"]),
        ("nemotron-h", ["mamba", "attention", "moe"]),
        ("nemotron-h-latent", ["mamba", "attention", "moe"]),
        ("kimi-linear", ["mla"]),
        ("kimi-linear", ["kda", "mla"]),
        ("llama", ["attention"]),
        ("qwen3", ["attention"]),
    ],
)
def test_the_first_of_150_tokens_still_counts(
    family: str, layers: list[str], tmp_path: Path
) -> None:
    """In each kind of layer: what a state or a row holds shows in the output."""
    model = load(write_tiny_model(tmp_path, family, seed=3, layers=layers))
    ids = prompt(3, 150)
    changed = [ids[0] + 1 if ids[0] + 1 in SPOKEN else ids[0] - 1, *ids[1:]]
    difference = last_log_probabilities(model, ids) - last_log_probabilities(model, changed)
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_seed_makes_every_family(family: str, tmp_path: Path) -> None:
    one, same = (write_tiny_model(tmp_path / name, family, seed=7) for name in ("one", "same"))
    other = write_tiny_model(tmp_path / "other", family, seed=8)
    assert files(one) == files(same)
    assert files(one)["model.safetensors"] != files(other)["model.safetensors"]


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("granite-moe", 6),
        ("lfm2-moe", 5),
        ("qwen3-next", 4),
        ("qwen3.5-moe", 4),
        ("nemotron-h", 1),
        ("nemotron-h-latent", 1),
        ("kimi-linear", 5),
    ],
)
def test_every_expert_is_used(family: str, layers: int, tmp_path: Path) -> None:
    """By other tokens: a router that always sends to the same experts would hide the rest."""
    model = load(write_tiny_model(tmp_path, family, seed=0))
    chosen: list[set[int]] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):  # called with tokens, and the experts of each with a weight
            chosen.append(set())
            module.register_forward_pre_hook(
                lambda module, inputs, found=chosen[-1]: found.update(
                    next(part for part in inputs if not part.is_floating_point()).flatten().tolist()
                )
            )
    last_log_probabilities(model, prompt(0, 150))
    assert chosen == [set(range(6))] * layers


def test_layers_that_a_family_cannot_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention must come every so many layers"):
        write_tiny_model(tmp_path, "qwen3-next", layers=["attention", "delta"])


@pytest.mark.parametrize("family", ["nemotron-h", "kimi-linear"])
def test_what_is_written_as_published_is_the_same_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = write_tiny_model(tmp_path / "published", family, seed=4)
    plain = replace(FAMILIES[family], publish=None, renamed={})
    monkeypatch.setitem(tiny_model.FAMILIES, family, plain)
    own = write_tiny_model(tmp_path / "own", family, seed=4)
    assert files(own) != files(published)
    ids = prompt(2, 40)
    one, other = (last_log_probabilities(load(folder), ids) for folder in (own, published))
    assert torch.equal(one, other)


def test_bfloat16_weights(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, seed=0, dtype="bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    model = load(folder, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert len(set(greedy(model, prompt(0, 30), 40))) >= 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"family": "gpt"},
            "unknown family 'gpt'; supported: falcon-h1, falcon-mamba, granite-hybrid",
        ),
        ({"dtype": "float64"}, "unknown dtype 'float64'; supported: float32, bfloat16"),
        ({"seed": -1}, "must not be negative, got -1"),
        (
            {"layers": ["mamba", "conv"]},
            r"unknown.*\['conv'\]; granite-hybrid has mamba, attention",
        ),
        ({"layers": []}, "unknown or no layer kinds"),
    ],
)
def test_bad_arguments_are_errors_before_anything_is_written(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        write_tiny_model(out, **arguments)  # type: ignore[arg-type]
    assert not out.exists()


def test_a_directory_in_use_is_left_alone_unless_forced(tmp_path: Path) -> None:
    kept = tmp_path / "notes.txt"
    kept.write_text("mine")
    with pytest.raises(FileExistsError, match=f"{re.escape(str(tmp_path))} is not empty; --force"):
        write_tiny_model(tmp_path)
    assert kept.read_text() == "mine"
    with pytest.raises(FileExistsError, match="is not a directory"):
        write_tiny_model(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    write_tiny_model(tmp_path, force=True)
    assert (tmp_path / "config.json").exists()
    assert kept.read_text() == "mine"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    arguments = ["--out", str(out), "--seed", "5", "--layers", "mamba,attention"]
    assert tiny_model.main(arguments) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert files(out) == files(
        write_tiny_model(tmp_path / "same", seed=5, layers=["mamba", "attention"])
    )
    with pytest.raises(SystemExit) as caught:
        tiny_model.main(arguments)
    assert caught.value.code == 2
    assert "is not empty; --force" in capsys.readouterr().err
    assert tiny_model.main([*arguments, "--force"]) == 0


def test_help_names_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tiny_model.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(family in shown for family in FAMILIES)
