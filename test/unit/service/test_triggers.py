"""The trigger policies, as a table and by property."""

from hypothesis import given
from hypothesis import strategies as st

from engram.core.settings import Settings
from engram.service.triggers import Trigger, When, decide


def settings(policy: str, every: int = 5, interval: float = 1.0) -> Settings:
    return Settings.model_validate(
        {
            "snapshot_trigger_policy": policy,
            "snapshot_every_n_turns": every,
            "snapshot_min_interval_seconds": interval,
        }
    )


def test_every_turn() -> None:
    assert decide(settings("every_turn"), 1, None) == Trigger(When.NOW)
    assert decide(settings("every_turn"), 7, 1.0) == Trigger(When.NOW)
    assert decide(settings("every_turn"), 7, 0.25) == Trigger(When.LATER, 0.75)


def test_every_n_turns() -> None:
    due = [
        n for n in range(1, 13) if decide(settings("every_n_turns", 4), n, None).when is When.NOW
    ]
    assert due == [4, 8, 12]


@given(turn=st.integers(1, 10**6), since=st.none() | st.floats(0, 1e6))
def test_manual_policies_never_save(turn: int, since: float | None) -> None:
    for policy in ("manual_only", "on_tool_call"):
        assert decide(settings(policy), turn, since) == Trigger(When.NEVER)
    assert decide(settings("manual_only"), turn, since, tool_calls=True) == Trigger(When.NEVER)


@given(turn=st.integers(1, 10**6), since=st.none() | st.floats(0, 1e6))
def test_tool_calls_save_as_every_turn_does(turn: int, since: float | None) -> None:
    found = decide(settings("on_tool_call"), turn, since, tool_calls=True)
    assert found == decide(settings("every_turn"), turn, since)


@given(
    turn=st.integers(1, 10**6),
    every=st.integers(1, 20),
    interval=st.floats(0, 1e4),
    since=st.none() | st.floats(0, 1e4),
)
def test_the_interval_puts_off_and_never_drops(
    turn: int, every: int, interval: float, since: float | None
) -> None:
    trigger = decide(settings("every_n_turns", every, interval), turn, since)
    if turn % every:
        assert trigger.when is When.NEVER
    elif since is None or since >= interval:
        assert trigger == Trigger(When.NOW)
    else:
        assert trigger == Trigger(When.LATER, interval - since)
        assert 0 < trigger.delay <= interval
