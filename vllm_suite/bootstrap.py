"""The general plugin that vLLM loads in every process.

A process that did not ask for the suite gets ``--plugins`` and the plugins' switches on its parser and nothing else.
One that asked, by ``--plugins`` or by ``VLLM_SUITE_PLUGINS``, gets the version gate, the connectors, and vLLM's own
options set where the user gave none.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import Any

from vllm_suite import __version__
from vllm_suite.catalog import ENV_PLUGINS, PLUGINS, Flag, SelectionError, parse_selection

# vLLM configures the logger "vllm" only; a child of it is printed like vLLM's own lines.
_log = logging.getLogger("vllm.suite")

_loaded = False
_from_option = False  # the environment's value came from --plugins
_switched: dict[str, Flag] = {}  # switches given on the command line, by option


def load() -> None:
    """Entry point of ``vllm.general_plugins``. Idempotent.

    Raises only where the suite was asked for and cannot be given: SelectionError in a program that uses vLLM
    as a library, exit status 2 in a ``vllm`` command.
    """
    global _loaded
    if _loaded:
        return
    _loaded = True
    from vllm_suite.compat import hooks

    command = _is_command()
    if multiprocessing.parent_process() is None:
        hooks.start_refusals(sys.argv if command else ())
    hooked = hooks.install(on_selection=select, on_flag=switch_on, on_port=_use_port, on_engine_args=prepare)
    on_argv, rest = hooks.find_option(sys.argv) if command else (None, sys.argv)
    with _exit_status_2():
        if command and not hooked:  # no parser to teach: take the options away before they are called unrecognized
            sys.argv[:] = hooks.take_flags(rest, switch_on)
            if on_argv is not None:
                select(on_argv)
        if on_argv is not None:
            return  # the parser calls `select`
        if os.environ.get(ENV_PLUGINS):
            activate()


def select(text: str) -> None:
    """Take the selection from ``--plugins``: check it, hand it to child processes, make it work here.

    An empty text selects nothing, whatever the environment says.
    """
    global _from_option
    os.environ[ENV_PLUGINS] = ",".join(parse_selection(text))
    _from_option = True
    activate()


def switch_on(flag: Flag) -> None:
    """Turn a plugin's switch on, here and in child processes. `prepare` refuses it without the plugin."""
    os.environ[flag.env] = "1"
    _switched[flag.option] = flag


def selection() -> tuple[str, ...]:
    """The plugins selected for this process. Raises SelectionError where the environment names a bad one."""
    try:
        return parse_selection(os.environ.get(ENV_PLUGINS, ""))
    except SelectionError as error:
        raise SelectionError(f"{ENV_PLUGINS}: {error}") from error


def activate() -> tuple[str, ...]:
    """Make the selected plugins usable in this process; returns their names. May be called again.

    Raises SelectionError for a bad name, an unsupported vLLM or an unknown role.
    """
    names = selection()
    if not names:
        return names
    from vllm_suite import identity
    from vllm_suite.compat import connectors, registry, versions

    versions.check_version()
    try:
        identity.role()
    except ValueError as error:
        raise SelectionError(str(error)) from error
    identity.identity()
    plugins = [PLUGINS[name] for name in names]
    connectors.register_kv_connectors(c for plugin in plugins for c in plugin.kv_connectors)
    registry.register_configs(plugin.configs for plugin in plugins if plugin.configs)
    registry.register_models(c for plugin in plugins for c in plugin.models)
    return names


def prepare(engine_args: Any, usage_context: Any) -> None:
    """Set vLLM's options on ``engine_args`` for the selected plugins; called before vLLM reads them.

    Raises as `load` does.
    """
    from vllm_suite.compat import environment

    with _exit_status_2():
        names = activate()
        _refuse_lonely_switches(names)
        environment.declare()
        if not names:
            return
        from vllm_suite import identity
        from vllm_suite.compat import engine

        applied = engine.prepare(engine_args, usage_context, names, identity.role())
    if applied is not None:
        source = "--plugins" if _from_option else ENV_PLUGINS
        # Several API servers each build the configuration; the main process has said it for all of them.
        level = logging.INFO if multiprocessing.parent_process() is None else logging.DEBUG
        facts = (__version__, ",".join(names), source, identity.role(), applied)
        _log.log(level, "vllm-suite %s: plugins %s (from %s), role %s: %s", *facts)


def _refuse_lonely_switches(names: tuple[str, ...]) -> None:
    for option, flag in _switched.items():
        owner = next(plugin.name for plugin in PLUGINS.values() if flag in plugin.flags)
        if owner not in names:
            raise SelectionError(f"{option} is a switch of plugin {owner!r}; add --plugins {owner}, or leave it out")


def _use_port(port: int | None) -> None:
    if os.environ.get(ENV_PLUGINS):
        from vllm_suite import identity

        identity.use_port(port)


def _is_command() -> bool:
    from vllm_suite.compat import hooks

    # Children see their parent's command line but parse nothing; for them the environment decides.
    main_process = multiprocessing.parent_process() is None
    return main_process and hooks.is_vllm_command(sys.modules.get("__main__"), sys.argv)


@contextlib.contextmanager
def _exit_status_2() -> Iterator[None]:
    """A refusal ends a ``vllm`` command with its text and status 2; a program that uses vLLM gets the exception."""
    try:
        yield
    except SelectionError as error:
        if not _is_command():
            raise
        sys.stderr.write(f"vllm: error: vllm-suite: {error}\n")
        raise SystemExit(2) from error
