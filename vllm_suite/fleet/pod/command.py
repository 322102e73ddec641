"""The command line of `python3 -m vllm_suite.fleet.pod`."""

from __future__ import annotations

import argparse
import http.client
import os
import sys
from collections.abc import Sequence

from vllm_suite.fleet.pod.asking import CLIENT_KEYS, CheckFailed, ask, ready
from vllm_suite.fleet.pod.checking import check
from vllm_suite.fleet.pod.leaving import drain, outlive


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="vllm_suite.fleet.pod", description="What Kubernetes asks a pod.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("ready", "router-ready", "drain"):
        verbs.add_parser(name).add_argument("--url", required=True)
    verbs.choices["ready"].add_argument("--role")
    verbs.choices["ready"].add_argument("--connector")
    verbs.choices["drain"].add_argument("--settle", type=float, required=True)
    verbs.choices["drain"].add_argument("--finish", type=float, required=True)
    stay = verbs.add_parser("outlive")
    stay.add_argument("--port", type=int, required=True)
    stay.add_argument("--limit", type=float, required=True)
    test = verbs.add_parser("check")
    test.add_argument("--router", required=True)
    test.add_argument("--decode", action="append", default=[], help="where instances that decode are; several times")
    test.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for each answer; comes before the verb")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 where the answer is yes; the reason is printed either way."""
    args = parser().parse_args(argv)
    try:
        if args.verb == "ready":
            said = ready(args.url, args.role, args.connector, args.timeout)
        elif args.verb == "router-ready":
            said = ask(args.url, "/ready", CLIENT_KEYS, args.timeout)[:200]
        elif args.verb == "drain":
            said = drain(args.url, args.settle, args.finish)
        elif args.verb == "outlive":
            # Kubernetes does not expand variables in a hook's command.
            said = outlive(f"http://{os.environ['LWS_LEADER_ADDRESS']}:{args.port}", args.limit)
        else:
            said = check(args.router, args.decode, args.prompt_tokens, args.timeout)
    except (CheckFailed, OSError, http.client.HTTPException, ValueError, LookupError) as error:
        print(f"{args.verb}: {str(error) or repr(error)}", file=sys.stderr)
        return 1
    print(said)
    return 0
