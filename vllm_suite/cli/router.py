"""`vllm-suite router`: flags and a YAML file into a `RouterConfig`, then serve."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_suite.router.config import RouterConfig

HELP = "route OpenAI requests over prefill and decode instances"

_POLICIES = ("round_robin", "least_tokens", "power_of_two", "prefix_hash")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags override the file."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with a RouterConfig (see docs/router.md)")
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for a free one (default 8080)")
    for role in ("prefill", "decode", "any"):
        parser.add_argument(
            f"--{role}",
            nargs="+",
            action="extend",
            default=[],
            metavar="URL",
            help=f"instances with role {role}" if role != "any" else "instances that say their role themselves",
        )
    parser.add_argument(
        "--state",
        choices=("suite", "stock"),
        help="how instances are asked: suite (default) or stock for a vLLM without the suite's endpoint plugin",
    )
    parser.add_argument("--prefill-policy", choices=_POLICIES, help="default least_tokens")
    parser.add_argument("--decode-policy", choices=_POLICIES, help="default least_tokens")
    parser.add_argument(
        "--min-prompt-tokens", type=int, metavar="N", help="shorter prompts are not disaggregated (default 256)"
    )
    parser.add_argument(
        "--check", action="store_true", help="print the resulting settings as YAML, without keys, and exit"
    )


def _settings(args: argparse.Namespace) -> RouterConfig:
    """The model from file and flags. Raises FleetFileError, a ValueError, with one line a problem."""
    from pathlib import Path

    from vllm_suite.fleet.files import FleetFileError, parse_mapping, read_text, validated
    from vllm_suite.router.config import RouterConfig

    text = read_text(Path(args.config)) if args.config else ""
    data: dict[str, Any] = parse_mapping(text, args.config) if text.strip() else {}

    def put(section: str, name: str, value: object) -> None:
        if value is not None:
            part = data.setdefault(section, {})
            if isinstance(part, dict):
                part[name] = value

    for name in ("host", "port"):
        if getattr(args, name) is not None:
            data[name] = getattr(args, name)
    targets = [{"url": url, "role": role} for role in ("prefill", "decode", "any") for url in getattr(args, role)]
    put("membership", "static", targets or None)
    put("membership", "state", args.state)
    put("policies", "prefill", args.prefill_policy)
    put("policies", "decode", args.decode_policy)
    put("disaggregation", "min_prompt_tokens", args.min_prompt_tokens)
    config = validated(data, RouterConfig, args.config or "arguments")
    members = config.membership
    if not (members.static or members.dns or members.kubernetes):
        raise FleetFileError("no instances: give --prefill, --decode or --any, or membership in the file")
    return config


def run(args: argparse.Namespace) -> int:
    """Exit codes: 0 after a complete drain, 1 where requests were cut off or the port is taken, 2 bad arguments."""
    import logging

    import yaml

    from vllm_suite.kube.client import Kube, NotInCluster
    from vllm_suite.router.auth import KeyFileError, Keys
    from vllm_suite.router.tracing import TracingUnavailable, check

    try:
        config = _settings(args)
        Keys.resolve(config.auth)
        if config.tracing is not None:
            check()
        if config.membership.kubernetes and not args.check:
            Kube.in_cluster()
    except (KeyFileError, NotInCluster, TracingUnavailable, ValueError) as exc:
        for line in str(exc).splitlines():
            print(f"vllm-suite router: {line}", file=sys.stderr)
        return 2
    if args.check:
        print(yaml.safe_dump(config.model_dump(mode="json", exclude={"auth"}), sort_keys=False), end="")
        return 0

    import uvloop

    from vllm_suite.router.server import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        complete = uvloop.run(serve(config, lambda url: print(f"vllm-suite router listening on {url}", flush=True)))
    except OSError as exc:
        print(f"vllm-suite router: cannot listen on {config.host}:{config.port}: {exc}", file=sys.stderr)
        return 1
    return 0 if complete else 1
