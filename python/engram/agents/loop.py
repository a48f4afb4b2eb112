"""The loop of one run: a reply, its tool calls, their results, the next reply.

It keeps nothing that is not in the journal, so it goes on from there after a crash:

- a reply that was not written down is asked for again; it has had no effect;
- a call that has not begun is made;
- a call whose outcome is written down is not made again;
- a call that had begun is made again only if its tool is idempotent or the client says so, and
  reported to the model as unknown otherwise.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from engram.agents.continuing import tokens_after
from engram.agents.draft import Draft
from engram.agents.execution import ToolExecutor
from engram.agents.journal import Call, Journal, Run, Step
from engram.agents.ports import ChatEngine, ChatReply
from engram.agents.requests import RunRequest
from engram.agents.tool import ToolContext
from engram.conversation.turns import Tag
from engram.core.ids import DEFAULT_BRANCH
from engram.errors import (
    EngramError,
    InvalidRequestError,
    OutcomeUnknownError,
    UnsupportedError,
)

SaveTurn = Callable[[str, str, float | None], Awaitable[str]]
"""Makes the turn of a conversation that a request was durable, for so many seconds or for as long
as retention says; the snapshot's id."""
Told = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Limits:
    """What a run may do at most; the flags of the server."""

    max_iterations: int
    max_tool_calls_per_iteration: int


EXPLORED_SECONDS: Final = 7 * 86400.0
"""How long the snapshots of a branch last of which nobody has said that it is to be kept."""


class RunLoop:
    """Carries out one run, from wherever its journal ends."""

    def __init__(
        self,
        run: Run,
        journal: Journal,
        executor: ToolExecutor,
        engine: ChatEngine,
        save_turn: SaveTurn,
        limits: Limits,
        told: Told,
        draft: Draft | None = None,
    ) -> None:
        self._run = run
        self._journal = journal
        self._executor = executor
        self._engine = engine
        self._save_turn = save_turn
        self._told = told
        self._draft = draft or Draft()
        self._request = RunRequest.model_validate(run.request)
        asked = self._request
        self._max_iterations = asked.max_iterations or limits.max_iterations
        self._max_calls = asked.max_tool_calls_per_iteration or limits.max_tool_calls_per_iteration
        specs = executor.specs()
        if asked.tools is not None:
            specs = [executor.spec(name) for name in dict.fromkeys(asked.tools)]
        self._tools = [spec.as_function() for spec in specs]
        self._names = {spec.name for spec in specs}

    @property
    def _conversation(self) -> str:
        return self._run.conversation_id or self._run.run_id

    async def go_on(self, *, repeat: bool) -> tuple[str, dict[str, Any]]:
        """Run to the end: the status then, and the result."""
        if self._run.steps:
            step = self._run.steps[-1]
            if self._request.checkpoint and not step.reply.keys() & {
                "snapshot_id",
                "checkpoint_error",
            }:
                # It ended before this was known; if the turn is lost, that has to be told.
                await self._checkpoint(step)
            await self._calls_of(step, repeat=repeat)
        while True:
            last = self._run.steps[-1] if self._run.steps else None
            if last is not None and not last.calls:
                return "completed", self._result(last)
            if len(self._run.steps) >= self._max_iterations:
                assert last is not None
                return "limit_reached", self._result(last)
            step = await self._reply()
            await self._calls_of(step, repeat=False)

    def _result(self, last: Step) -> dict[str, Any]:
        return {
            "content": last.reply["message"].get("content"),
            "finish_reason": last.reply["finish_reason"],
            "iterations": len(self._run.steps),
            "tool_calls": sum(len(step.calls) for step in self._run.steps),
        }

    # ---- replies ----

    async def _reply(self) -> Step:
        number = len(self._run.steps)
        choice = self._request.choice(number)
        body: dict[str, Any] = {
            **self._request.sampling(),
            "messages": self._messages(),
            "conversation_id": self._conversation,
        }
        if self._tools:
            body |= {
                "tools": self._tools,
                "tool_choice": choice,
                "parallel_tool_calls": self._request.parallel_tool_calls,
            }
        if self._request.response_format is not None and (not self._tools or choice == "none"):
            body["response_format"] = self._request.response_format
        known, added = self._known_prompt()
        if known is not None:
            body["input_ids"] = [*known, *added]
        elif self._request.continue_from is not None:
            body |= self._beginning(number)
        self._draft.begin(number)
        # A stateful request finds out by itself which turn it is.
        turn = None if "stateful" in body else self._turn(number)
        reply = await self._engine.complete(body, turn, self._write)
        step = Step(number, self._written(reply, None if known is None else added))
        for position, call in enumerate(reply.message.get("tool_calls") or ()):
            function = call["function"]
            call_id = f"{self._run.run_id}.{number}.{position}"
            step.calls.append(
                Call(position, call_id, function["name"], function["arguments"] or "{}")
            )
        event = {
            "event": "run_step",
            "step": number,
            "message": reply.message,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": len(reply.prompt_ids),
            "completion_tokens": len(reply.output_ids),
            "cached_tokens": reply.cached_tokens,
        }
        await self._journal.add_step(self._run.run_id, step, event)
        self._run.steps.append(step)
        self._told(event)
        if self._request.checkpoint:
            await self._checkpoint(step)
        return step

    def _beginning(self, number: int) -> dict[str, Any]:
        """How the first reply of a run goes on from a recorded turn."""
        if number:
            raise UnsupportedError(
                "this model's chat template writes a message in another way once others follow it, "
                "and the messages before the turn that the run goes on from are not known",
                hint="begin the run with the whole history, without continue_from",
                details={"field": "continue_from"},
            )
        assert self._request.continue_from is not None
        return {
            "stateful": True,
            "branch_name": self._request.branch_name,
            "continue_from": self._request.continue_from.model_dump(exclude_none=True),
        }

    def _turn(self, number: int) -> Tag | None:
        """Which turn a reply is, where it is not just the next one of `main`."""
        asked = self._request
        if asked.branch_name is None and asked.continue_from is None:
            return None
        # Turns that were not saved are not counted any more after a restart.
        begun = 0 if asked.continue_from is None else (asked.continue_from.turn_number or 0)
        return Tag(
            self._conversation,
            asked.branch_name or DEFAULT_BRANCH,
            after_turn=begun + number if begun else 0,
        )

    def _write(self, text: str) -> None:
        at = self._draft.add(text)
        self._told({"event": "run_tokens", "step": at.step, "offset": at.offset, "text": text})

    def _written(self, reply: ChatReply, added: list[int] | None) -> dict[str, Any]:
        return {
            "rid": reply.rid,
            "message": reply.message,
            "finish_reason": reply.finish_reason,
            "rendered": added is None,
            "prompt_ids": reply.prompt_ids if added is None else added,
            "output_ids": reply.output_ids,
            "prompt_tokens": len(reply.prompt_ids),
            "completion_tokens": len(reply.output_ids),
            "cached_tokens": reply.cached_tokens,
        }

    async def _checkpoint(self, step: Step) -> None:
        """Make the state at the end of a reply durable; a run whose state is not goes on."""
        try:
            lasts = None if self._run.exploration is None else EXPLORED_SECONDS
            snapshot = await self._save_turn(self._conversation, step.reply["rid"], lasts)
            step.reply["snapshot_id"] = snapshot
            event = {"event": "run_checkpoint", "step": step.number, "snapshot_id": snapshot}
        except EngramError as error:
            step.reply["checkpoint_error"] = error.to_dict()
            event = {"event": "run_checkpoint", "step": step.number, "error": error.to_dict()}
        await self._journal.set_reply(self._run.run_id, step, event)
        self._told(event)

    def _messages(self) -> list[dict[str, Any]]:
        messages = list(self._request.messages)
        for step in self._run.steps:
            messages.append(step.reply["message"])
            messages += _answers(step)
        return messages

    def _known_prompt(self) -> tuple[list[int] | None, list[int]]:
        """The tokens up to the end of the last reply, and those that follow; None if not known."""
        if not self._run.steps:
            return None, []
        last = self._run.steps[-1]
        added = tokens_after(self._engine, last.reply["output_ids"], _answers(last), self._tools)
        return (None, []) if added is None else (tokens_of(self._run.steps), added)

    # ---- calls ----

    async def _calls_of(self, step: Step, *, repeat: bool) -> None:
        """Make the calls of a reply whose outcome is not known yet."""
        calls = [call for call in step.calls if call.state != "done"]
        if self._request.parallel_tool_calls and len(calls) > 1:
            tasks = [asyncio.ensure_future(self._call(step, call, repeat=repeat)) for call in calls]
            try:
                await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise
        else:
            for call in calls:
                await self._call(step, call, repeat=repeat)

    async def _call(self, step: Step, call: Call, *, repeat: bool) -> None:
        told = {"step": step.number, "tool": call.tool, "call_id": call.call_id}
        try:
            # First: a call that had begun was permitted then, whatever has changed since.
            if call.state == "started" and not self._repeatable(call, asked=repeat):
                raise OutcomeUnknownError(
                    f"the server ended while {call.tool} was at work; whether it had its effect "
                    "is not known, and it was not called again",
                    details={"tool": call.tool, "call_id": call.call_id},
                )
            arguments = self._permitted(call)
            call.state = "started"
            event = {"event": "tool_start", **told, "arguments": arguments}
            await self._journal.set_call(self._run.run_id, step.number, call, event)
            self._told(event)
            result = await self._executor.execute(call.tool, arguments, self._context(call, told))
            call.outcome = {"result": result.value}
            event = {"event": "tool_result", **told, **call.outcome, "output": result.output}
        except EngramError as error:
            call.outcome = {"error": error.to_dict()}
            event = {"event": "tool_error", **told, **call.outcome["error"]}
        call.state = "done"
        await self._journal.set_call(self._run.run_id, step.number, call, event)
        self._told(event)

    def _repeatable(self, call: Call, *, asked: bool) -> bool:
        """Whether a call of unknown outcome may be made again; not if its tool is there no more."""
        if call.tool not in self._names or call.number >= self._max_calls:
            return False
        return asked or self._executor.spec(call.tool).idempotent

    def _permitted(self, call: Call) -> dict[str, Any]:
        """The arguments of a call that may be made."""
        if call.number >= self._max_calls:
            raise InvalidRequestError(
                f"only {self._max_calls} tools may be called in one reply; call {call.tool} again"
            )
        if call.tool not in self._names:
            raise InvalidRequestError(
                f"there is no tool {call.tool[:100]!r}",
                hint=f"there are: {', '.join(sorted(self._names))}"[:2000],
            )
        try:
            arguments = json.loads(call.arguments)
            # Python reads more than can be written down and sent: NaN, half a surrogate pair.
            json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"the arguments are not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise InvalidRequestError("the arguments are no JSON object")
        return arguments

    def _context(self, call: Call, told: dict[str, Any]) -> ToolContext:
        def progress(fraction: float, message: str) -> None:
            # Not in the journal: of use only to who watches.
            self._told({"event": "tool_progress", **told, "fraction": fraction, "message": message})

        return ToolContext(
            call.call_id, self._run.owner, self._conversation, self._run.run_id, progress
        )


def tokens_of(steps: Sequence[Step]) -> list[int]:
    """All tokens of a run, prompt and replies, up to the end of its last reply."""
    tokens: list[int] = []
    for step in steps:
        if step.reply["rendered"]:
            tokens = []
        tokens += step.reply["prompt_ids"]
        tokens += step.reply["output_ids"]
    return tokens


def _answers(step: Step) -> list[dict[str, Any]]:
    """The messages that tell a model the outcomes of its calls."""
    asked = step.reply["message"].get("tool_calls") or ()
    return [
        {
            "role": "tool",
            "tool_call_id": asked[call.number]["id"],
            "content": json.dumps(_for_model(call.outcome), ensure_ascii=False),
        }
        for call in step.calls
    ]


def _for_model(outcome: dict[str, Any] | None) -> Any:
    """What a model reads of an outcome: the result, or what an error says without its details."""
    assert outcome is not None
    if "result" in outcome:
        return outcome["result"]
    error = outcome["error"]
    return {name: error[name] for name in ("error", "message", "hint") if error[name]}
