"""`engram.Engine` on a store that a server has left: goes on with a conversation, prints JSON."""

import json
import sys
from typing import Any

OPTIONS: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


def main() -> None:
    arguments = json.loads(sys.argv[1])
    from engram import Engine
    from engram.errors import EngramError

    report: dict[str, Any] = {}
    with Engine(**arguments) as engine:
        chat = engine.conversation("own")
        report["restored"] = engine.restore("own", turn_number=1).model_dump()
        with chat.stream("and then", from_turn=1, **OPTIONS) as stream:
            report["pieces"] = list(stream)
            report["next"] = stream.reply.model_dump()
        reply = engine.chat("inside", "hello", **OPTIONS)
        report["inside"] = reply.model_dump()
        # Automatic saves are part of the turn.
        report["saved"] = chat.info().turn_number, engine.conversation("inside").info().token_count
        params = {"temperature": 0, "max_new_tokens": 4}
        ids = list(range(40, 60))
        first = engine.generate(input_ids=ids, sampling_params=params, conversation_id="plain")
        chunks = list(
            engine.generate(
                input_ids=[*ids, *first["output_ids"], 61, 62],
                sampling_params=params,
                conversation_id="plain",
                stream=True,
            )
        )
        report["plain"] = chunks[-1]["meta_info"]["cached_tokens"], engine.save("plain").turn_number
        report["untagged"] = engine.generate("Three", params)["meta_info"]["prompt_tokens"]
        with chat.stream("more", **{**OPTIONS, "max_tokens": 400}, ignore_eos=True) as stream:
            next(iter(stream))
        report["after leaving"] = chat.send("more", **OPTIONS).usage.cached_tokens
        report["turns"] = [one.turn_number for one in chat.tree().snapshots]
        for name, act in {
            "batch": lambda: engine.generate(["a", "b"], params, conversation_id="plain"),
            "nobody": lambda: engine.save("nobody"),
        }.items():
            try:
                act()
            except EngramError as error:
                report[name] = error.code
    try:
        Engine(**arguments, pp_size=2)
    except EngramError as error:
        report["refused"] = error.message
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
