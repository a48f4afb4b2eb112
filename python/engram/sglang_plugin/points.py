"""Where inside a prompt or a reply a recurrent state is kept, beside the end of a turn.

A state exists where a forward pass ends.  So a prompt is prefilled up to a *point* first and its
rest after that, by SGLang's own way to prefill in chunks, which keeps a state at the end of each.
The last point is one token before the prompt's end (with larger pages, the last page boundary
before it): at least one token is always computed, so that is where the same prompt sent again can
start from.  The rule looks at the prompt alone, not at whose it is: the cut decides the shapes of
the matrix products, and a reply's bits must not depend on a tag.

Points in a reply are those where the state is copied anyway (`extra_buffer`) or where a copy is
made (`no_buffer`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def next_point(start: int, prompt: int, page_size: int, interval: int) -> int | None:
    """The first point past token `start` of a prompt of `prompt` tokens; None if there is none.

    `interval` tokens lie between the points before the last; 0 for the last alone.
    """
    last = last_point(prompt, page_size)
    if start >= last:
        return None
    if interval:
        step = _pages(interval, page_size)
        return min((start // step + 1) * step, last)
    return last


def last_point(prompt: int, page_size: int) -> int:
    """The last point of a prompt of `prompt` tokens; 0 if it has none."""
    return (prompt - 1) // page_size * page_size


def is_point(end: int, prompt: int, page_size: int, interval: int) -> bool:
    """Whether a prefill that ends at token `end` ends at a point of the prompt."""
    return end > 0 and next_point(end - 1, prompt, page_size, interval) == end


def _pages(interval: int, page_size: int) -> int:
    """Whole pages that hold at least `interval` tokens."""
    return -(-interval // page_size) * page_size


def admit_to_point(original: Callable[..., Any], adder: Any, req: Any, **kw: Any) -> Any:
    """SGLang's choice of how much of a request the next step prefills, cut at the next point.

    Stands around `PrefillAdder._select_prefill_admission`.
    """
    from sglang.srt.managers.schedule_policy import AddReqResult

    admission = original(adder, req, **kw)
    point_of = getattr(adder.tree_cache, "next_point", None)
    if point_of is None or isinstance(admission, AddReqResult):
        return admission
    # SGLang follows one unfinished prefill at a time, and relies on it to have used up the step's
    # budget.  After a cut there is budget left: a second one would be taken for complete, and the
    # last tokens of the first would never be computed.
    if kw.get("has_chunked_req") or adder.new_chunked_req is not None:
        return AddReqResult.OTHER if admission.is_chunked else admission
    if adder.rem_chunk_tokens is None:
        # --chunked-prefill-size -1: a prefill that was begun could not go on.
        return admission
    point = point_of(req, admission.prefix_len)
    if point is None or point >= admission.prefix_len + admission.extend_len:
        return admission
    return type(admission)(
        prefix_len=admission.prefix_len,
        extend_len=point - admission.prefix_len,
        # Room for the reply stays reserved: others are admitted to this step after it.
        max_new_tokens=admission.max_new_tokens,
        is_chunked=True,
        replay_len=admission.replay_len,
    )


def continue_to_point(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """The same for a prefill that goes on; stands around `PrefillAdder.add_chunked_req`."""
    point_of = getattr(adder.tree_cache, "next_point", None)
    point = point_of(req, req.prefix_len) if point_of is not None else None
    if point is None:
        return original(adder, req)
    before = adder.chunked_req_limit
    limit = point - req.prefix_len
    adder.chunked_req_limit = limit if before is None else min(before, limit)
    try:
        return original(adder, req)
    finally:
        adder.chunked_req_limit = before


def keep_points_of_reply(
    original: Callable[..., Any], processor: Any, req: Any, *args: Any, **kw: Any
) -> Any:
    """Keep the state of a running reply where it is a multiple of the interval.

    Stands around `SchedulerBatchResultProcessor._handle_finish_state_updated_req`, which SGLang
    calls for each token of a reply.
    """
    result = original(processor, req, *args, **kw)
    keep = getattr(processor.tree_cache, "keep_reply", None)
    if keep is not None and not req.finished():
        keep(req)
    return result


def track_whole_pages(original: Callable[[int], int], tree_page: int) -> int:
    """With pages above 1, the last whole page of a reply is what the next turn can start from.

    Stands around `mamba_track_grid`: tokens between the copies that `extra_buffer` makes of the
    state of a running reply.  A copy stays on the device and takes some ten microseconds.
    """
    return original(tree_page) if tree_page == 1 else tree_page
