"""Going on from exactly the tokens of a reply.

To render the whole history again would write a reply's tool calls in another way than the model
did, and the state stored for what it wrote would not match.  So the tokens that were computed stay
as they are, and only what is new is rendered: the text between the end of a reply and the
beginning of the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

from engram.agents.ports import ChatEngine, Message
from engram.errors import EngramError

_ASKED = {"role": "user", "content": "x"}
_ANSWER = "y"
_ANSWERED = {"role": "assistant", "content": _ANSWER}


def tokens_after(
    engine: ChatEngine,
    output_ids: Sequence[int],
    messages: Sequence[Message],
    tools: Sequence[Message],
) -> list[int] | None:
    """What follows a reply when `messages` come next; None where the template cannot tell.

    A template cannot tell if a message's text depends on those after it: then the whole history
    has to be rendered.
    """
    try:
        opened = engine.render([_ASKED], tools, more=True)
        closed = engine.render([_ASKED, _ANSWERED], tools, more=False)
        full = engine.render([_ASKED, _ANSWERED, *messages], tools, more=True)
    except EngramError:
        return None
    if not full.startswith(closed) or not closed.startswith(opened + _ANSWER):
        return None
    rest = engine.encode(full[len(opened) + len(_ANSWER) :])
    # The model has written the end of its reply itself, unless it was cut.
    if rest and output_ids and output_ids[-1] == rest[0]:
        return rest[1:]
    return rest
