"""The id outlives a restart, the epoch does not, and both are the same in all processes of an instance."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vllm_suite.identity import ENV_EPOCH, ENV_INSTANCE_ID, ENV_ROLE, ROLES, role

SHOW = "import json; from vllm_suite.identity import identity as i; print(json.dumps([vars(i()), vars(i())]))"

SHOW_WITH_CHILD = """
import json, multiprocessing as mp, sys
from vllm_suite.identity import identity, use_port
def child(queue): queue.put(vars(identity()))
if __name__ == "__main__":
    use_port(4321)
    ours = vars(identity())
    context = mp.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(json.dumps([ours, queue.get(timeout=30)]))
    process.join(30)
"""


def run(*argv: str, **env: str) -> list[dict[str, str]]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_SUITE_")}
    done = subprocess.run(
        [sys.executable, *argv], env=clean | env, capture_output=True, text=True, timeout=60, check=True
    )
    result: list[dict[str, str]] = json.loads(done.stdout)
    return result


def test_every_start_has_a_new_epoch_and_calls_agree() -> None:
    first, second = run("-c", SHOW), run("-c", SHOW)
    assert first[0] == first[1]
    assert first[0]["epoch"] != second[0]["epoch"]
    assert len(bytes.fromhex(first[0]["epoch"])) == 8
    assert first[0]["role"] == "any"


def test_what_the_starting_process_left_in_the_environment_is_not_our_epoch() -> None:
    env = {ENV_EPOCH: "00" * 8, "VLLM_SUITE_DERIVED_ID": "another:1", ENV_INSTANCE_ID: "kept", ENV_ROLE: "decode"}
    [me, _] = run("-c", SHOW, **env)
    assert me["epoch"] != "00" * 8
    assert (me["instance_id"], me["role"]) == ("kept", "decode")
    env.pop(ENV_INSTANCE_ID)
    assert run("-c", SHOW, **env)[0]["instance_id"] != "another:1"


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_children_share_id_and_epoch(method: str, tmp_path: object) -> None:
    script = f"{tmp_path}/show.py"
    with open(script, "w", encoding="utf-8") as file:
        file.write(SHOW_WITH_CHILD)
    ours, child = run(script, method)
    assert ours == child
    assert ours["instance_id"].endswith(":4321")


def test_a_ray_worker_belongs_to_the_instance_that_started_it(tmp_path: object) -> None:
    script = f"{tmp_path}/default_worker.py"
    with open(script, "w", encoding="utf-8") as file:
        file.write(SHOW)
    [me, _] = run(script, **{ENV_EPOCH: "ab" * 8, "VLLM_SUITE_DERIVED_ID": "head:8000"})
    assert (me["epoch"], me["instance_id"]) == ("ab" * 8, "head:8000")


@pytest.mark.parametrize("word", ROLES)
def test_roles(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_ROLE, word)
    assert role() == word


def test_an_unknown_role_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_ROLE, "prefil")
    with pytest.raises(ValueError, match="prefill, decode, encode, any"):
        role()
