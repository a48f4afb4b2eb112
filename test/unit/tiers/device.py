"""Device pools of a toy hybrid model, on the CPU, and sequences captured from them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import torch

from engram.core.canonical import blake3_hex
from engram.core.tokens import TokenArray, tokens_to_bytes
from engram.tiers.base import BufferPlan, DeviceReader, Segment
from engram.tiers.health import StateCheck
from engram.tiers.manager import TierManager

SLOTS = 64
STATES = 8


def page_keys(tokens: Sequence[int], after: str | None = None) -> list[str]:
    """A chained key for each token (page size 1), those after the key `after`."""
    keys: list[str] = []
    before = bytes.fromhex(after or "")
    for token in tokens:
        keys.append(blake3_hex(before + tokens_to_bytes([token])))
        before = bytes.fromhex(keys[-1])
    return keys


def page_keys_after(tokens: TokenArray, before: str | None) -> list[str]:
    """The same, as `TierManager` asks for them."""
    return page_keys(tokens.tolist(), before)


class FakeDevice:
    """Two KV buffers and one recurrent state of random bits; rows are slots."""

    def __init__(self, rng: Random) -> None:
        generator = torch.Generator().manual_seed(rng.randrange(2**31))

        def random(*shape: int) -> torch.Tensor:
            # Without the exponents' highest bit, in every fourth or second byte: all are numbers.
            found = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            found.view(-1)[1::2] &= 0xBF
            return found

        self.buffers = {
            "k.0": random(SLOTS, 2, 6).view(torch.bfloat16),
            "v.0": random(SLOTS, 2, 6).view(torch.bfloat16),
            "ssm.1": random(STATES, 4, 20).view(torch.float32),
        }

    @staticmethod
    def layout(num_tokens: int, has_state: bool) -> list[BufferPlan]:
        if has_state:
            return [("ssm.1", "F32", (1, 4, 5))]
        return [("k.0", "BF16", (num_tokens, 2, 3)), ("v.0", "BF16", (num_tokens, 2, 3))]

    def rows(self, kv_slots: Sequence[int], state_slot: int) -> dict[str, torch.Tensor]:
        """Copies of the rows in these slots, by buffer."""
        return {
            name: tensor[list(kv_slots) if name[0] in "kv" else [state_slot]].clone()
            for name, tensor in self.buffers.items()
        }

    def reader(self, kv_slots: Sequence[int], state_slot: int) -> DeviceReader:
        def read(
            targets: dict[str, torch.Tensor], first: int, last: int, check: StateCheck
        ) -> None:
            rows = self.rows(kv_slots[first:last], state_slot)
            for name, target in targets.items():
                target.copy_(rows[name])
                if name == "ssm.1":
                    check.look(name, target)

        return read


@dataclass
class TokenRun:
    """A random token sequence cut into segments, and what each segment must hold."""

    tokens: list[int]
    ends: list[int]
    keys: list[str]
    expected: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @property
    def boundary_keys(self) -> list[str]:
        return [self.keys[end - 1] for end in self.ends]


def random_run(rng: Random, lengths: Sequence[int]) -> TokenRun:
    tokens = [rng.randrange(2**32) for _ in range(sum(lengths))]
    ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
    return TokenRun(tokens, ends, page_keys(tokens))


def capture(
    manager: TierManager,
    device: FakeDevice,
    rng: Random,
    run: TokenRun,
    *,
    count: int | None = None,
) -> list[Segment]:
    """Capture a sequence, each part from random slots, and wait for the copies; its boundaries."""
    parent: Segment | None = None
    found: list[Segment] = []
    for number, end in enumerate(run.ends[:count]):
        start = parent.end if parent is not None else 0
        slots, state = rng.sample(range(SLOTS), end - start), rng.randrange(STATES)
        done = threading.Event()
        queued = manager.capture(
            run.keys[start:end],
            start,
            run.tokens[start:end],
            parent,
            device.reader(slots, state),
            on_done=done.set,
        )
        assert queued, number
        assert done.wait(60)
        run.expected.append(device.rows(slots, state))
        boundary = manager.boundary(run.keys[end - 1])
        assert boundary is not None
        boundary.filled.result(60)
        found.append(boundary)
        parent = boundary.parent
    return found


def contents(manager: TierManager, boundary: Segment) -> dict[str, torch.Tensor]:
    """What is in RAM of a boundary: the state, and the rows that end there."""
    assert boundary.parent is not None
    return {**manager.views(boundary.parent), **manager.views(boundary)}


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Equal names, and equal bytes under each: random bits make NaNs, which equal nothing."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[n].contiguous().view(torch.uint8), expected[n].view(torch.uint8))
        for n in expected
    )
