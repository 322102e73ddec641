"""vLLM's own command line over the commands of the chart's pods.

``python parse_commands.py FOLDER`` with the folder of any model; reads a JSON list of ``{"argv": [...], "env": {...}}``
and prints what vLLM made of each: the parsed arguments that are asked for by ``"want"``, or how it ended.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from cli_command import command


def parsed(one: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: vLLM and the suite read the environment once."""
    from vllm.platforms import current_platform

    from vllm_suite.compat import environment

    seen = command(*one["argv"], env=one["env"])
    if "args" not in seen:
        return {"exit": seen.get("exit"), "err": seen["err"], "out": seen["out"][-500:]}
    environment.declare()
    current_platform.validate_environ(True)  # raises for a variable that vLLM does not know
    args = vars(seen["args"])
    return {name: args.get(name, "not an argument") for name in one["want"]}


def forked(one: dict[str, Any]) -> dict[str, Any]:
    """`parsed` in a fork of this process, which has imported vLLM."""
    source, target = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(source)
        try:
            found = parsed(one)
        except BaseException as error:  # noqa: BLE001  told to the test
            found = {"crash": repr(error)}
        with os.fdopen(target, "w") as out:
            json.dump(found, out, default=str)
        os._exit(0)
    os.close(target)
    with os.fdopen(source) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return dict(json.loads(text))


if __name__ == "__main__":
    print("\n" + json.dumps([forked(one) for one in json.load(sys.stdin)]))
