"""One server of any family: recorded, killed, and started again on what it has stored.

A `Variant` says which model is served and how; `exactness_world` makes it. To cover another family
or strategy, add a variant to `VARIANTS`: the tests of `test_families.py` run over all of them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from e2e.helpers import PRINTABLE_IDS, Client, Reply, random_ids
from e2e.matrix import gpu
from e2e.ranks import CONSENSUS
from e2e.reference import ALL_LOG_PROBABILITIES, CHUNK, ask_for, expect, prompts_of
from e2e.talks import ChatTalk, GenerateTalk, KeyedTalk, Talk
from e2e.worlds import (
    FLOAT32,
    LENGTHS,
    NEXT_LENGTH,
    Case,
    Stage,
    World,
    fresh,
    interleaved,
    launcher,
    save_and_peek,
    start,
)
from engram.testing.samples import seeded_random
from engram.testing.tamper import add_to_value, rewrite_segment
from engram.testing.tiny_adapter import write_tiny_adapter
from engram.testing.tiny_model import FAMILIES, KEPT
from histories import linear

PROMPT = 150
INTERVAL = 64
LONG, SHORT = 40, 20
"""New tokens of two replies to one prompt: the shorter ends inside the longer one's path."""


STATE = frozenset({"conv0", "ssm"})
"""The parts of a buffer's name that are of a state, not of rows."""


@dataclass(frozen=True)
class Variant:
    """A tiny model of a family, in a dtype, on so many tensor-parallel ranks; a `quick` one is part
    of every test run."""

    family: str
    dtype: str
    quick: bool = False
    ranks: int = 1
    """Tensor-parallel ranks."""
    page: int | None = None
    """Tokens a page under `extra_buffer` with overlap scheduling; None for `no_buffer` and pages of
    one token.  Models without recurrent state have pages alone, no strategy."""
    interval: int = 0
    """Tokens between the states kept inside prompts and replies; 0 for the usual ones."""
    adapters: bool = False
    """Whether LoRA adapters are served too."""

    @property
    def name(self) -> str:
        kind = "extra-buffer" if self.has_state else "page"
        strategy = "" if self.page is None else f"-{kind}-{self.page}"
        ranks = f"-tp{self.ranks}" if self.ranks > 1 else ""
        adapters = "-lora" if self.adapters else ""
        return f"{self.family}-{self.dtype}{strategy}{ranks}{adapters}"

    @property
    def exact(self) -> bool:
        """Whether decoding a token and prefilling it give nearly the same numbers."""
        return self.dtype == "float32"

    @property
    def has_state(self) -> bool:
        return any(part in STATE for kind in self.layers for part in KEPT[kind])

    @property
    def layers(self) -> tuple[str, ...]:
        return FAMILIES[self.family].default_layers

    def boundary(self, tokens: int, prompt: int = 0) -> int:
        """Where the state of a turn stands that ended after so many computed tokens, of which so
        many were its prompt."""
        page = self.page or 1
        end = tokens // page * page
        # The state at the end of a prompt of whole pages is gone with the reply's second token,
        # and SGLang copies none between two of the model's chunks: those are longer than a page.
        gone = self.has_state and page > 1 and end == prompt < tokens
        return end - page if gone else end

    @property
    def altered(self) -> dict[str, str]:
        """Case -> the buffer in which one value is changed before the restart, one of each part."""
        found: dict[str, str] = {}
        for layer, kind in enumerate(self.layers):
            for part in KEPT[kind]:
                found.setdefault(f"altered-{part}", f"{part}.{layer}")
        return found

    @property
    def flags(self) -> tuple[str, ...]:
        return (
            *("--enable-snapshot-persistence", "--disable-radix-cache"),
            *self._strategy,
            *("--snapshot-point-interval", str(self.interval)),
            *("--skip-server-warmup", "--dtype", self.dtype),
            *("--chunked-prefill-size", str(CHUNK)),
            *("--max-total-tokens", "8192", "--max-mamba-cache-size", "64"),
            *("--tp-size", str(self.ranks)),
            # Of SGLang's backends on CUDA, one that computes in float32 too.
            *(("--attention-backend", "triton") if gpu() else ()),
        )

    @property
    def _strategy(self) -> tuple[str, ...]:
        if self.page is None:
            return ("--mamba-scheduler-strategy", "no_buffer")
        page = ("--page-size", str(self.page))
        if not self.has_state:
            return page
        return ("--mamba-scheduler-strategy", "extra_buffer", *page)

    @property
    def env(self) -> Mapping[str, str]:
        dtype = FLOAT32 if self.dtype == "float32" else {}
        return {**dtype, **CONSENSUS} if self.ranks > 1 else dtype


def under_both_strategies(family: str) -> tuple[Variant, ...]:
    """A family of which SGLang tracks the states."""
    return (
        Variant(family, "float32"),
        Variant(family, "bfloat16"),
        Variant(family, "float32", page=1),
        Variant(family, "float32", page=16, interval=INTERVAL),
        Variant(family, "bfloat16", page=16, interval=INTERVAL),
    )


VARIANTS = (
    Variant("granite-hybrid", "float32"),
    Variant("granite-hybrid", "bfloat16"),
    Variant("granite-hybrid", "float32", ranks=2),
    Variant("granite-hybrid", "float32", ranks=2, page=1),
    Variant("granite-hybrid", "float32", page=1, quick=True),
    Variant("granite-hybrid", "bfloat16", page=1),
    Variant("granite-hybrid", "float32", page=16, interval=INTERVAL),
    Variant("granite-hybrid", "bfloat16", page=16, interval=INTERVAL),
    *under_both_strategies("granite-moe"),
    Variant("mamba2", "float32", quick=True),
    Variant("mamba2", "bfloat16"),
    *under_both_strategies("falcon-h1"),
    Variant("mamba", "float32"),
    Variant("mamba", "bfloat16"),
    Variant("falcon-mamba", "float32"),
    Variant("falcon-mamba", "bfloat16"),
    Variant("lfm2", "float32"),
    Variant("lfm2", "bfloat16"),
    Variant("lfm2-moe", "float32"),
    Variant("lfm2-moe", "bfloat16"),
    *under_both_strategies("qwen3-next"),
    *under_both_strategies("qwen3.5"),
    *under_both_strategies("qwen3.5-moe"),
    *under_both_strategies("nemotron-h"),
    *under_both_strategies("nemotron-h-latent"),
    *under_both_strategies("kimi-linear"),
    Variant("llama", "float32"),
    Variant("llama", "float32", quick=True, adapters=True),
    Variant("llama", "bfloat16"),
    Variant("llama", "float32", page=16),
    Variant("qwen3", "float32"),
    Variant("qwen3", "bfloat16"),
    Variant("qwen3", "float32", page=16),
)
"""The quick ones have no attention, nothing else, or both under the strategy of a GPU. The other
worlds are of the dense Granite too, under the other strategy."""


@dataclass(frozen=True)
class Refusal:
    """A family, a strategy and a page size that SGLang itself does not serve together."""

    family: str
    strategy: str
    page: int

    @property
    def name(self) -> str:
        return f"{self.family}-{self.strategy.replace('_', '-')}-{self.page}"


_VARIANTS_OF = {
    family: [one for one in VARIANTS if one.family == family and one.has_state]
    for family in sorted(FAMILIES)
}
REFUSALS = (
    *(
        Refusal(family, "extra_buffer", 1)
        for family, own in _VARIANTS_OF.items()
        if own and all(one.page is None for one in own)
    ),
    *(Refusal(family, "no_buffer", 16) for family, own in _VARIANTS_OF.items() if own),
)
"""What is missing in `VARIANTS`."""

LORA = ("--lora-backend", "torch_native", "--max-loras-per-batch", "4")
ADAPTERS = ("kept", "exchanged")
EXCHANGED = "exchanged"
"""The adapter that has other weights after the restart."""
HISTORIES = 7
"""Of `scripts/test --histories`: 21 over the worlds that every test run makes."""
NOT_IMPORTED = re.compile(r"import error when loading sglang\.srt\.models\.(?:falcon_)?mamba:.*")
RESTORED = ("generate", "chat")
INTERLEAVED = ("interleaved-0", "interleaved-1", "interleaved-2")
UNTAGGED = ("untagged", "chat-untagged", "unaltered", *INTERLEAVED)
SEED = 1


def exactness_world(stage: Stage, folder: Path, variant: Variant) -> World:
    """Record every case on one server, kill it, alter what is to be altered, start it again."""
    folder = fresh(folder)
    numbers = seeded_random()
    store = folder / "store" / "snapshots"
    model = stage.model(SEED, variant.family, variant.dtype)
    adapters = [f"{name}={folder / name}" for name in ADAPTERS]
    flags = [*variant.flags, *([*LORA, "--lora-paths", *adapters] if variant.adapters else [])]
    if variant.adapters:
        write_adapters(folder, model, {name: seed for seed, name in enumerate(ADAPTERS)})
    world = start(
        stage.server(folder, flags, model=model, store=store, env=variant.env, kind=launcher()),
        store,
    )
    # SGLang only logs it where a model cannot be imported, and no quick variant needs these two.
    assert not NOT_IMPORTED.findall(world.server.log_path.read_text())
    client = world.client
    if variant.exact:
        world.facts["expected"] = expect(model, prompts_of(SEED))
        world.facts["alone"], world.facts["batch"] = _compared(client)
    for name in (*RESTORED, "untagged", "chat-untagged", "unaltered", *variant.altered):
        talk: Talk = ChatTalk() if name.startswith("chat") else GenerateTalk()
        for length in LENGTHS:
            talk.say(client, talk.draw(client, numbers, length), name)
        world.cases[name] = save_and_peek(client, numbers, name, talk)
    world.cases |= interleaved(client, numbers, INTERLEAVED)
    if variant.adapters:
        world.cases |= _adapted(client, numbers)
    world.facts["again"] = _again(client, numbers)
    if variant.interval:
        world.facts["parted"] = _parted(client, numbers)
    world.cases["evicted"] = _evicted(world, numbers)
    world.cases["branch"] = _branch(client, variant, numbers)
    counts: Counter[str] = Counter()
    block = replace(linear.draw_block(numbers, 0, HISTORIES), killed=True)
    play = world.facts["histories"] = linear.Play(block, variant.boundary, counts)
    play.start(client)
    world.server.kill()
    for name, buffer in {**variant.altered, "unaltered": ""}.items():
        edit = add_to_value(buffer, 8.0) if buffer else lambda header, payload: None
        rewrite_segment(store, world.cases[name].saved["snapshot_id"], edit, buffer or None)
    if variant.adapters:
        write_adapters(folder, model, {EXCHANGED: len(ADAPTERS)})
    world.server.start()
    play.finish(client)
    return world


def write_adapters(folder: Path, model: Path, seeds: Mapping[str, int]) -> None:
    for name, seed in seeds.items():
        write_tiny_adapter(folder / name, model, seed)


def _adapted(client: Client, numbers: random.Random) -> dict[str, Case]:
    """A conversation under each adapter; the first token of each begins no other request."""
    cases = {}
    for own, name in enumerate(ADAPTERS, start=PRINTABLE_IDS.stop):
        talk = KeyedTalk(lora_path=name)
        for turn, length in enumerate(LENGTHS):
            message = random_ids(numbers, length)
            talk.say(client, message if turn else [own, *message], name)
        cases[name] = save_and_peek(client, numbers, name, talk)
    return cases


def _compared(client: Client) -> tuple[list[Any], list[Any]]:
    """The server's replies to the reference's prompts, asked for one by one and all at once."""
    prompts = prompts_of(SEED)
    alone = [
        client.post("/generate", ask_for([prompt], **ALL_LOG_PROBABILITIES)).json()[0]
        for prompt in prompts
    ]
    batch: list[Any] = client.post("/generate", ask_for(prompts, **ALL_LOG_PROBABILITIES)).json()
    return alone, batch


def _again(client: Client, numbers: random.Random) -> list[tuple[Reply, Reply]]:
    """A prompt and a second turn, each sent twice."""
    prompt = random_ids(numbers, PROMPT)
    first = client.generate(prompt, LONG, "again")
    turn = [*prompt, *first.tokens, *random_ids(numbers, NEXT_LENGTH)]
    second = client.generate(turn, LONG, "again")
    return [(first, client.generate(prompt, LONG)), (second, client.generate(turn, LONG))]


def _parted(client: Client, numbers: random.Random) -> list[tuple[int, Reply, Reply]]:
    """Tokens in common with a longer path, the reply to a prompt that parts there, and the same
    computed from nothing: inside a prompt, inside a reply."""
    prompt = random_ids(numbers, PROMPT)
    path = [*prompt, *client.generate(prompt, 2 * LONG).tokens]
    parted = [
        [*path[:common], *random_ids(numbers, NEXT_LENGTH)] for common in (PROMPT - 10, PROMPT + 50)
    ]
    warm = [client.generate(tokens) for tokens in parted]
    # Not from an empty VRAM: RAM has the end of the turn, and with pages that may be in its prompt.
    cold = [client.generate(tokens, cache_salt=f"cold-{n}") for n, tokens in enumerate(parted)]
    assert [reply.cached for reply in cold] == [0, 0]
    commons = [len(tokens) - NEXT_LENGTH for tokens in parted]
    return list(zip(commons, warm, cold, strict=True))


def _evicted(world: World, numbers: random.Random) -> Case:
    """Asked the same before and after VRAM forgot all, with a restore from RAM in between."""
    client = world.client
    talk = GenerateTalk()
    for length in LENGTHS:
        talk.say(client, talk.message(numbers, length), "evicted")
    case = save_and_peek(client, numbers, "evicted", talk)
    client.flush()
    world.facts["evicted restore"] = client.restore(conversation_id="evicted")
    world.facts["evicted from ram"] = talk.peek(client, case.message)
    return case


def _branch(client: Client, variant: Variant, numbers: random.Random) -> Case:
    """Two replies to one prompt; the one that ends inside the other's path is saved."""
    prompt = random_ids(numbers, PROMPT)
    long = client.generate(prompt, LONG, "long")
    talk = GenerateTalk()
    short = client.generate(prompt, SHORT, "branch")
    assert len(short.tokens) == SHORT < len(long.tokens)
    talk.history = [*prompt, *short.tokens]
    saved = client.save(conversation_id="branch")
    # Up to the last token of a page: the end of the reply to it lies past it, and cannot serve the
    # same message again.
    page = variant.page or 1
    length = next(n for n in count(NEXT_LENGTH) if (len(talk.history) + n + 1) % page == 0)
    message = talk.message(numbers, length)
    return Case("branch", talk, saved, message, talk.peek(client, message))
