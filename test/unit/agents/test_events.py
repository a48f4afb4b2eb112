"""Events go to who may hear and wants them, and a slow reader costs a bounded amount."""

import asyncio

from engram.agents.events import (
    MAX_JOINED,
    MAX_QUEUED_BYTES,
    TOPICS,
    Event,
    EventBus,
    Interest,
)


def test_who_hears_what() -> None:
    bus = EventBus()
    readers = {}
    for owner in ("one", "two"):
        for name, interest in {
            "all": Interest(TOPICS),
            "c": Interest(TOPICS, frozenset({"c"})),
            "run": Interest(TOPICS, None, frozenset({"r"})),
            "memory": Interest({"memory_update"}),
            "nothing": Interest(),
        }.items():
            readers[owner, name] = bus.subscribe(owner)
            readers[owner, name].interest = interest

    def heard(event: Event) -> set[tuple[str, str]]:
        bus.publish(event)
        found = {key for key, reader in readers.items() if reader._queue}
        for reader in readers.values():
            reader._queue.clear()
        return found

    assert heard(Event("memory_update", "one", "c")) == {
        ("one", "all"),
        ("one", "c"),
        ("one", "memory"),
    }
    assert heard(Event("memory_update", "two", "d")) == {("two", "all"), ("two", "memory")}
    assert heard(Event("run_event", "one", "d", "r")) == {("one", "all"), ("one", "run")}
    assert heard(Event("tier_transition", None, "c")) == {
        (owner, name) for owner in ("one", "two") for name in ("all", "c")
    }
    assert heard(Event("tier_transition", None)) == {("one", "all"), ("two", "all")}
    bus.unsubscribe(readers["one", "all"])
    assert heard(Event("tool_start", "one", "x")) == set()


def test_a_slow_reader_is_bounded_and_told() -> None:
    async def run() -> None:
        bus = EventBus()
        reader = bus.subscribe("o", limit=4)
        reader.interest = Interest(TOPICS)
        for number in range(10):
            bus.publish(Event("tool_start", "o", data={"number": number}))
        assert [(await reader.next())["number"] for _ in range(4)] == [0, 1, 2, 3]
        told = await reader.next()
        assert (told["type"], told["error"], told["details"]) == (
            "error",
            "events_lost",
            {"lost": 6},
        )
        bus.publish(Event("tool_start", "o", data={"number": 10}))
        assert (await reader.next())["number"] == 10

    asyncio.run(run())


def test_what_waits_is_bounded_in_bytes() -> None:
    """256 events, each with as much as a tool may return or be given, would be gigabytes."""

    async def run() -> None:
        bus = EventBus()
        reader = bus.subscribe("o")
        reader.interest = Interest(TOPICS)

        def publish(size: int) -> None:
            bus.publish(Event("tool_result", "o", data={"result": "x" * size}))

        for _ in range(2):
            publish(2 * MAX_QUEUED_BYTES)  # alone it is told of, however large
            publish(1)
            assert len((await reader.next())["result"]) == 2 * MAX_QUEUED_BYTES
            assert (await reader.next())["details"] == {"lost": 1}
        for _ in range(64):
            publish(1 << 20)
        heard = 0
        while (told := await reader.next())["type"] != "error":
            heard += 1
        assert heard == 15
        assert told["details"] == {"lost": 64 - 15}

    asyncio.run(run())


def test_parts_of_a_reply_are_joined_for_a_slow_reader() -> None:
    async def run() -> None:
        bus = EventBus()
        reader = bus.subscribe("o", limit=4)
        reader.interest = Interest(TOPICS)

        def write(run_id: str, step: int, offset: int, text: str) -> None:
            data = {"step": step, "offset": offset, "text": text}
            bus.publish(Event("run_tokens", "o", "c", run_id, data))

        for offset in range(0, 1000, 2):
            write("r", 0, offset, "ab")
        write("s", 0, 0, "other run")
        write("r", 1, 0, "next reply")
        heard = [await reader.next() for _ in range(3)]
        assert heard[0]["text"] == "ab" * 500
        assert [(one["run_id"], one["step"], one["text"]) for one in heard[1:]] == [
            ("s", 0, "other run"),
            ("r", 1, "next reply"),
        ]
        for offset in range(0, 8 * MAX_JOINED, 1024):
            write("r", 2, offset, "x" * 1024)
        heard = [await reader.next() for _ in range(5)]
        assert all(len(one["text"]) <= MAX_JOINED for one in heard[:4])
        assert heard[4]["error"] == "events_lost"

    asyncio.run(run())
