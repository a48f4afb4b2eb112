"""What docs/performance.md says of a benchmark that is not measured in time."""

import json

import pytest
from benchmark.token_accounting.report import FAMILIES, SHOWN, table
from benchmark.token_accounting.talks import REQUESTS, TURNS, talks_of

from repository import ROOT

PAGE = (ROOT / "docs" / "performance.md").read_text()


@pytest.mark.parametrize("families", [1, len(FAMILIES)])
def test_all_conversations_together_have_so_many_turns(families: int) -> None:
    talks = [talk for number in range(families) for talk in talks_of(number, families)]
    assert sum(len(talk.messages) for talk in talks) == REQUESTS
    assert len({talk.name for talk in talks}) == len(talks)
    assert max(len(talk.messages) for talk in talks) == TURNS
    assert f"for {TURNS} turns each, {REQUESTS} requests" in PAGE


def test_the_table_of_the_page_is_what_was_counted() -> None:
    kept = json.loads((ROOT / "benchmark" / "token_accounting" / "results.json").read_text())
    assert table(kept["families"]).split("\n\n")[0] in PAGE
    for rows in kept["families"].values():
        assert {len(row["failures"]) for row in rows.values()} == {0}
        # Every way answers the same prompts, and says the same.
        assert {row["same"] for row in rows.values()} == {rows["no cache"]["requests"]}


def test_the_table_sums_over_families_and_compares_with_no_cache() -> None:
    def row(computed: int, failures: int = 0) -> dict[str, object]:
        part = {"sent": 10, "bytes": 20, "prompt": 100, "computed": computed}
        return {
            "requests": 2,
            "failures": ["no"] * failures,
            "same": 2,
            "before": part,
            "after": part,
        }

    rows = {"no cache": row(100), "cache": row(50, 1), "stateful": row(5)}
    text = table({"granite-hybrid": rows, "mamba2": rows})
    assert f"| {SHOWN['no cache']} | 4 | 0 | 40 | 200 | 200 | 400 | 0.0 % |" in text
    assert f"| {SHOWN['cache']} | 4 | 2 | 40 | 100 | 100 | 200 | 50.0 % |" in text
    assert f"| {SHOWN['stateful']} | 4 | 0 | 40 | 10 | 10 | 20 | 95.0 % |" in text
    assert "| mamba2 (Mamba-2 alone) | 50.0 % | 95.0 % |" in text
    assert SHOWN["history"] not in text
