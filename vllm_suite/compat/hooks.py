"""Where the suite meets vLLM's engine arguments: three wrapped methods, none of them copied.

``EngineArgs.add_cli_args``         adds ``--plugins`` and the plugins' own switches, so that they show in ``--help``
                                    and work from ``--config`` files
``EngineArgs.from_cli_args``        sees the API port, from which the default instance id is made
``EngineArgs.create_engine_config`` is where every path (command line, YAML, ``LLM(...)``) passes once all options
                                    are known and before anything reads them
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_suite.catalog import PLUGINS, Flag, SelectionError, landed_names
from vllm_suite.compat.settings import OPTIONS, flag

OPTION = "--plugins"
# Options switched off in so many words; the parser of the main process writes it, API server processes read it.
ENV_REFUSED = "VLLM_SUITE_REFUSED_OPTIONS"
_MARK = "_vllm_suite"
_DEST = "vllm_suite_"

OnSelection = Callable[[str], None]
"""Gets the text of ``--plugins``; raises SelectionError where it cannot be honoured."""

OnFlag = Callable[[Flag], None]
"""Gets a plugin's switch that the command line turns on."""

OnEngineArgs = Callable[[Any, Any], None]
"""Gets vLLM's `EngineArgs` and its usage context, just before the engine configuration is built."""


def install(
    on_selection: OnSelection, on_flag: OnFlag, on_port: Callable[[int | None], None], on_engine_args: OnEngineArgs
) -> bool:
    """Wrap the three methods where `EngineArgs` is already imported; never import it.

    Returns False, and wraps nothing, where `EngineArgs` does not look as it does in the supported versions.
    """
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is None:
        return True  # a worker: nothing parses arguments here
    engine_args = getattr(arg_utils, "EngineArgs", None)
    own = getattr(engine_args, "__dict__", {})
    shapes = (
        isinstance(own.get("add_cli_args"), staticmethod),
        isinstance(own.get("from_cli_args"), classmethod),
        callable(own.get("create_engine_config")),
    )
    if engine_args is None or not all(shapes):
        return False
    _wrap_add_cli_args(engine_args, on_selection, on_flag)
    _wrap_from_cli_args(engine_args, on_port)
    _wrap_create_engine_config(engine_args, on_engine_args)
    return True


def _wrap_add_cli_args(engine_args: type, on_selection: OnSelection, on_flag: OnFlag) -> None:
    original = engine_args.add_cli_args  # type: ignore[attr-defined]
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        if OPTION not in parser._option_string_actions:
            add_option(parser, on_selection, on_flag)
        note_refusals(parser)
        return parser

    setattr(add_cli_args, _MARK, True)
    engine_args.add_cli_args = staticmethod(add_cli_args)  # type: ignore[attr-defined]


def _wrap_from_cli_args(engine_args: type, on_port: Callable[[int | None], None]) -> None:
    original = engine_args.__dict__["from_cli_args"].__func__
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def from_cli_args(cls: type, args: Any, *rest: Any, **kwargs: Any) -> Any:
        on_port(getattr(args, "port", None))
        return original(cls, args, *rest, **kwargs)

    setattr(from_cli_args, _MARK, True)
    engine_args.from_cli_args = classmethod(from_cli_args)  # type: ignore[attr-defined]


def _wrap_create_engine_config(engine_args: type, on_engine_args: OnEngineArgs) -> None:
    original = engine_args.create_engine_config  # type: ignore[attr-defined]
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, usage_context: Any = None, *args: Any, **kwargs: Any) -> Any:
        on_engine_args(self, usage_context)
        return original(self, usage_context, *args, **kwargs)

    setattr(create_engine_config, _MARK, True)
    engine_args.create_engine_config = create_engine_config  # type: ignore[attr-defined]


def add_option(parser: Any, on_selection: OnSelection, on_flag: OnFlag) -> None:
    """Declare ``--plugins`` and the switches on a vLLM parser, in a group so that the short help names them.

    Their values go to the environment, which is what child processes read. The namespace keeps the defaults: vLLM's
    Rust front end is handed every other value and knows no such options.
    """

    class Select(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            try:
                on_selection(values)
            except SelectionError as error:
                raise argparse.ArgumentError(self, str(error)) from error

    names = ", ".join(landed_names())
    group = parser.add_argument_group(
        title="vllm-suite", description=f"Plugins of vllm-suite, selected with {OPTION} NAME[,NAME...] ({names})."
    )
    group.add_argument(
        OPTION,
        action=Select,
        dest=f"{_DEST}plugins",
        metavar="NAME[,NAME...]",
        default=None,
        help=f"Plugins of vllm-suite to run, separated by commas: {names}. Overrides VLLM_SUITE_PLUGINS.",
    )
    for flag_ in flags():
        dest = _DEST + flag_.option.strip("-").replace("-", "_")
        group.add_argument(flag_.option, action=_switch(flag_, on_flag), nargs=0, dest=dest, help=flag_.help)


def _switch(flag_: Flag, on_flag: OnFlag) -> type[argparse.Action]:
    class Switch(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
            on_flag(flag_)

    return Switch


def flags() -> tuple[Flag, ...]:
    """The switches of the plugins that have landed."""
    return tuple(item for plugin in PLUGINS.values() if plugin.landed for item in plugin.flags)


class _Noting(argparse.BooleanOptionalAction):
    """An on/off option that remembers ``--no-...``, which leaves the same value behind as saying nothing."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, values, option_string)
        others = refused() - {self.dest}
        names = others | {self.dest} if (option_string or "").startswith("--no-") else others
        os.environ.pop(ENV_REFUSED, None)
        if names:
            os.environ[ENV_REFUSED] = ",".join(sorted(names))


def note_refusals(parser: Any) -> None:
    """Let `refused` know of options that the suite may set and the user switches off."""
    for option in OPTIONS:
        action = parser._option_string_actions.get(flag(option, off=True))
        if type(action) is argparse.BooleanOptionalAction:
            action.__class__ = _Noting


def refused() -> frozenset[str]:
    """Options, by their name in `EngineArgs`, that the command line or its ``--config`` file switched off."""
    return frozenset(name for name in os.environ.get(ENV_REFUSED, "").split(",") if name)


def start_refusals(argv: Sequence[str]) -> None:
    """Begin with what ``--config FILE`` of this command line switches off; call before arguments are parsed.

    Drops what an unrelated process left in the environment. vLLM passes over ``option: false`` in such a file, since
    the parser that reads it does not know the options of ``serve``; a file that cannot be read is vLLM's to report.
    """
    os.environ.pop(ENV_REFUSED, None)
    path, _ = find_option(argv, "--config")
    if not path:
        return
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return
    found = config if isinstance(config, dict) else {}
    off = sorted({o for o in OPTIONS if any(found.get(key) is False for key in (o, o.replace("_", "-")))})
    if off:
        os.environ[ENV_REFUSED] = ",".join(off)


def find_option(argv: Sequence[str], option: str = OPTION) -> tuple[str | None, list[str]]:
    """The value of an option in a command line (the last one given; None where absent) and the rest of it."""
    value: str | None = None
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == option:
            value = next(words, "")
        elif word.startswith(option + "="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def take_flags(argv: Sequence[str], on_flag: OnFlag) -> list[str]:
    """``argv`` without the plugins' switches, after ``on_flag`` has seen those that were in it."""
    known = {item.option: item for item in flags()}
    end = list(argv).index("--") if "--" in argv else len(argv)
    for word in argv[:end]:
        if word in known:
            on_flag(known[word])
    return [word for place, word in enumerate(argv) if place >= end or word not in known]


def is_vllm_command(main: ModuleType | None, argv: Sequence[str]) -> bool:
    """Whether this process is ``vllm ...`` or ``python -m vllm...``, whose arguments are vLLM's to define."""
    spec = getattr(main, "__spec__", None)
    if spec is not None and str(spec.name).startswith("vllm."):
        return True
    return bool(argv) and argv[0].replace("\\", "/").rpartition("/")[2] in ("vllm", "vllm.exe")
