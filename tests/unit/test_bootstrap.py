"""What `load` does before vLLM's parser: nothing where nobody asked, and the command line it looks at."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite import bootstrap
from vllm_suite.catalog import NO_LOCAL_ENCODER, Flag, SelectionError
from vllm_suite.compat import hooks
from vllm_suite.compat.versions import SUPPORTED, UnsupportedVersion, check_version, series

NOT_ASKED = """
import sys, time
start = time.process_time()
from vllm_suite.bootstrap import load
load(); load()
spent = time.process_time() - start
heavy = {"torch", "vllm", "numpy", "pydantic", "aiohttp", "rich", "yaml"} & set(sys.modules)
import os
assert not heavy, heavy
assert not [name for name in os.environ if name.startswith("VLLM_")]
assert spent < 0.25, f"{spent:.3f} s of CPU"
"""


def clean_env(**more: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")} | more


def test_a_process_that_did_not_ask_pays_milliseconds_and_sees_no_change() -> None:
    subprocess.run([sys.executable, "-c", NOT_ASKED], env=clean_env(), timeout=60, check=True)


@pytest.mark.parametrize("module", ["vllm_suite", "vllm_suite.catalog", "vllm_suite.identity", "vllm_suite.cli.main"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit(bool({{'torch', 'vllm', 'aiohttp', 'rich', 'pydantic'}} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], env=clean_env(), timeout=60, check=True)


def test_a_library_user_gets_an_exception_and_a_vllm_command_exit_status_2() -> None:
    code = "from vllm_suite.bootstrap import load; load()"
    library = subprocess.run(
        [sys.executable, "-c", code], env=clean_env(VLLM_SUITE_PLUGINS="nope"), capture_output=True, timeout=60
    )
    assert library.returncode == 1
    assert b"SelectionError: VLLM_SUITE_PLUGINS: unknown plugin 'nope'" in library.stderr
    command = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['/bin/vllm', 'serve']; " + code],
        env=clean_env(VLLM_SUITE_PLUGINS="nope"),
        capture_output=True,
        timeout=60,
    )
    assert command.returncode == 2
    assert b"known plugins: disagg" in command.stderr
    assert b"Traceback" not in command.stderr


WORD = st.text(alphabet="abc-=/", min_size=1, max_size=6).filter(lambda w: not w.startswith("--plugins") and w != "--")


@given(st.lists(WORD, max_size=5), st.lists(WORD, max_size=5), st.sampled_from(["a", "a,b", ""]), st.booleans())
def test_the_option_is_found_in_both_spellings(before: list[str], after: list[str], value: str, joined: bool) -> None:
    option = [f"--plugins={value}"] if joined else ["--plugins", value]
    assert hooks.find_option([*before, *option, *after]) == (value, before + after)
    assert hooks.find_option(before + after) == (None, before + after)


def test_the_last_option_wins_and_nothing_behind_the_separator_counts() -> None:
    assert hooks.find_option(["--plugins", "a", "--plugins=b"]) == ("b", [])
    assert hooks.find_option(["x", "--", "--plugins", "a"]) == (None, ["x", "--", "--plugins", "a"])


def test_switches_are_taken_from_a_command_line_that_no_parser_of_ours_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = Flag("--on", "VLLM_SUITE_TEST_ON", "help")
    monkeypatch.setattr(hooks, "flags", lambda: (switch,))
    seen: list[Flag] = []
    argv = ["vllm", "serve", "m", "--on", "--other", "--", "--on"]
    assert hooks.take_flags(argv, seen.append) == ["vllm", "serve", "m", "--other", "--", "--on"]
    assert seen == [switch]
    assert hooks.take_flags(["vllm", "--", "--on"], seen.append) == ["vllm", "--", "--on"]
    assert seen == [switch]


def test_a_switch_without_its_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_switched", {})
    monkeypatch.delenv(NO_LOCAL_ENCODER.env, raising=False)
    bootstrap.switch_on(NO_LOCAL_ENCODER)
    assert NO_LOCAL_ENCODER.on()
    bootstrap._refuse_lonely_switches(("disagg", "epd"))
    with pytest.raises(SelectionError, match="--epd-no-local-encoder is a switch of plugin 'epd'; add --plugins epd"):
        bootstrap._refuse_lonely_switches(("disagg",))
    del os.environ[NO_LOCAL_ENCODER.env]


@pytest.mark.parametrize(
    ("argv0", "expected"), [("/opt/bin/vllm", True), ("vllm", True), ("/x/pytest", False), ("/x/vllm-suite", False)]
)
def test_only_vllm_commands_have_their_arguments_read(argv0: str, expected: bool) -> None:
    assert hooks.is_vllm_command(None, [argv0]) is expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.32.0+cpu", "0.32"), ("0.33.1rc2", "0.33"), ("0.320.0", "0.320"), ("1.0", "1.0"), ("dev", "dev")],
)
def test_series(version: str, expected: str) -> None:
    assert series(version) == expected


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.3.2", "0.330.0", "1.32.0", "0.1.dev1+gabc"])
def test_other_versions_are_refused_with_the_supported_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(UnsupportedVersion, match=rf"{version.split('+')[0]}.*>=0\.32,<0\.34"):
        check_version()


@pytest.mark.parametrize("supported", SUPPORTED)
def test_supported_versions_pass(supported: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{supported}.3")
    assert check_version() == f"{supported}.3"
