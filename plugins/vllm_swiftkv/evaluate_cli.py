"""``vllm-suite swiftkv eval``: arguments, the table, and the report."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from vllm_swiftkv.families import SwiftKVError

_TAKEN = ("model", "pretrained", "seed", "kv_sharing_fast_prefill", "worker_extension_cls", "data_parallel_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", required=True, metavar="DIR", help="the checkpoint to measure")
    parser.add_argument("--base", metavar="DIR", help="a checkpoint to compare it with, as a rule the one it came from")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks or groups of lm-evaluation-harness")
    what.add_argument(
        "--preset", choices=("paper",), help="the seven tasks of the SwiftKV paper with its settings, and ifeval"
    )
    parser.add_argument("--include-path", metavar="DIR", help="folder with task files of your own (YAML)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's own)")
    parser.add_argument("--apply-chat-template", action="store_true", help="put prompts through the chat template")
    parser.add_argument("--fewshot-as-multiturn", action="store_true", help="examples as turns of the conversation")
    parser.add_argument("--max-gen-toks", type=int, metavar="N", help="tokens to generate (default: the task's own)")
    parser.add_argument("--limit", type=float, metavar="N", help="only the first N documents of each task (a trial)")
    parser.add_argument("--seed", type=int, default=1234, metavar="N", help="also picks examples (default: 1234)")
    parser.add_argument(
        "--engine-args", default="{}", metavar="JSON", help="""further engine options: '{"tensor_parallel_size": 8}'"""
    )
    parser.add_argument(
        "--timeout", type=float, default=86400.0, metavar="S", help="of one engine run (default: a day)"
    )
    parser.add_argument("--samples", type=Path, metavar="DIR", help="write every document with its answer here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")


def run(args: argparse.Namespace) -> int:
    """0 with a table, 2 for what cannot be done as asked, 1 where an engine run fails."""
    try:
        if importlib.util.find_spec("lm_eval") is None:
            raise SwiftKVError("lm-evaluation-harness is not installed: pip install 'vllm-suite[eval]'")
        return _run(args, _requests(args), _engine(args))
    except SwiftKVError as error:
        return _fail(2, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted")


def _run(args: argparse.Namespace, requests: tuple[Any, ...], engine: dict[str, Any]) -> int:
    from vllm_swiftkv import evaluate
    from vllm_swiftkv.evaluate_report import Evaluation
    from vllm_swiftkv.evaluate_worker import RunSpec

    include = None if args.include_path is None else str(Path(args.include_path).resolve())
    if include is not None and not Path(include).is_dir():
        raise SwiftKVError(f"--include-path {args.include_path}: no such folder")
    models = [args.model] + ([args.base] if args.base else [])
    swiftkv = [evaluate.is_swiftkv(model) for model in models]
    with contextlib.redirect_stdout(sys.stderr):  # the harness and NLTK speak there
        generates = evaluate.prepare(requests, include)
    common = RunSpec(
        model=args.model,
        skip=None,
        requests=requests,
        include_path=include,
        limit=args.limit,
        seed=args.seed,
        engine=engine,
    )
    evaluation, runs = Evaluation(requests), []
    for base, (model, is_ours) in enumerate(zip(models, swiftkv, strict=True)):
        if not base and not is_ours:
            _say(f"{model} is no SwiftKV model: nothing is skipped")

        def done(spec: Any, result: dict[str, Any], base: bool = bool(base)) -> None:
            evaluation.add(result, base)
            if args.samples:
                evaluate.write_samples(args.samples, "base" if base else "model", result)
            runs.append(_summary(spec, result))
            _write(args, evaluation, runs, complete=False)

        try:
            evaluate.execute(list(evaluate.plan(model, is_ours, generates, common)), args.timeout, done, _say)
        except (SwiftKVError, evaluate.RunFailed) as error:
            if evaluation.rows:
                _show(args, evaluation)
            return _fail(2 if isinstance(error, SwiftKVError) else 1, error)
    _show(args, evaluation)
    _write(args, evaluation, runs, complete=True)
    return 0


def _requests(args: argparse.Namespace) -> tuple[Any, ...]:
    from vllm_swiftkv.evaluate_tasks import PRESETS, Request

    if args.preset:
        settings = ("num_fewshot", "apply_chat_template", "fewshot_as_multiturn", "max_gen_toks")
        for given in (name for name in settings if getattr(args, name)):
            raise SwiftKVError(
                f"--{given.replace('_', '-')} goes with --tasks; --preset {args.preset} sets it per task"
            )
        return PRESETS[args.preset]
    names = [name for text in args.tasks for name in text.split(",") if name]
    if args.fewshot_as_multiturn and not args.apply_chat_template:
        raise SwiftKVError("--fewshot-as-multiturn needs --apply-chat-template")
    return tuple(
        Request(
            name=name,
            num_fewshot=args.num_fewshot,
            chat=args.apply_chat_template,
            multiturn=args.fewshot_as_multiturn,
            max_gen_toks=args.max_gen_toks,
        )
        for name in dict.fromkeys(names)
    )


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    from vllm_swiftkv.evaluate_tasks import PRESET_ENGINE

    try:
        given = json.loads(args.engine_args)
    except ValueError as error:
        raise SwiftKVError(f"--engine-args is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise SwiftKVError("""--engine-args must be a JSON object, such as '{"tensor_parallel_size": 8}'""")
    for name in (name for name in _TAKEN if name in given):
        raise SwiftKVError(f"--engine-args: {name!r} is set by this command or cannot be combined with it")
    return {**PRESET_ENGINE.get(args.preset or "", {}), **given}


def _summary(spec: Any, result: dict[str, Any]) -> dict[str, Any]:
    """A run without its samples."""
    requests = {
        name: {
            "counters": request["counters"],
            "harness": {
                key: value for key, value in request["results"].items() if key not in ("samples", "pretty_env_info")
            },
        }
        for name, request in result["requests"].items()
    }
    return {
        "model": spec.model,
        "skip": result["skip"],
        "start_s": result["start_s"],
        "run_s": result["run_s"],
        "engine": spec.engine,
        "requests": requests,
    }


def _write(args: argparse.Namespace, evaluation: Any, runs: list[dict[str, Any]], complete: bool) -> None:
    if args.json is None:
        return
    from vllm_suite.provenance import installed, provenance
    from vllm_swiftkv.evaluate_report import as_json, average

    made = provenance(seed=args.seed)
    made["versions"] |= {name: installed(name) for name in ("lm_eval", "transformers", "datasets")}
    rows = evaluation.joined()
    report = {
        "complete": complete,
        "model": args.model,
        "base": args.base,
        "preset": args.preset,
        "limit": args.limit,
        "requests": [request.model_dump() for request in evaluation.requests],
        "rows": as_json(rows),
        "average": average(rows),
        "runs": runs,
        "provenance": made,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    # The file of an earlier run of this evaluation stays whole until the new one is.
    part = args.json.with_name(args.json.name + ".part")
    part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(args.json)


def _show(args: argparse.Namespace, evaluation: Any) -> None:
    from rich.console import Console

    from vllm_swiftkv.evaluate_report import table

    title = args.model + (f", base {args.base}" if args.base else "")
    if args.limit:
        title += f" (the first {args.limit:g} documents only)"
    console = Console()
    # Piped output has no width of its own; figures must not be cut off there.
    width = console.width if console.is_terminal else 140
    Console(width=width).print(table(evaluation.joined(), title, base=bool(args.base)))


def _say(text: str) -> None:
    sys.stderr.write(f"vllm-suite swiftkv eval: {text}\n")


def _fail(status: int, error: object) -> int:
    sys.stderr.write(f"vllm-suite swiftkv eval: error: {error}\n")
    return status
