"""Bad input: the exit status, and one line a problem that says where it is and what is wrong; never a traceback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from vllm_suite.cli.main import main

MEMBER = 'membership: {static: [{url: "http://a:1"}]}\n'
FILES = {
    "unknown": "{model: m, pools: {decode: {replica: 2}}}",
    "twice": "model: m\nmodel: n\npools: {decode: {}}\n",
    "unit": "{model: m, pools: {decode: {}}, slo: {ttft: 300}}",
    "cut": "{model: [",
    "deep": "model: " + "[" * 500,
    "empty": "",
    "nobody": "{model: m, pools: {}}",
    "predict": "{model: no/such, pools: {any: {}}, roles: {control: true, rule: goodput, predict: {hardware: 8xH100}}}",
    "good": "{model: m, pools: {prefill: {}, decode: {}}}",
    "r-unknown": "prot: 1\n" + MEMBER,
    "r-two": 'port: 70000\nmembership: {static: [{url: "ftp://a"}]}\n',
    "r-key": 'auth: {api_keys: [""]}\n' + MEMBER,
    "r-secret": 'auth: {control_key: "s3cret "}\n' + MEMBER,
    "r-twice": "port: 1\nport: 2\n" + MEMBER,
}
CASES = [
    ("up unknown", 2, "unknown.yaml: pools.decode.replica: unknown key (did you mean 'replicas'?)"),
    ("up twice", 2, "twice.yaml: not YAML: line 2, column 1: key 'model' is given twice"),
    ("up unit", 2, "unit.yaml: slo.ttft: not a duration with a unit"),
    ("up cut", 2, "cut.yaml: not YAML: line 1, column 10"),
    ("up deep", 2, "deep.yaml: not YAML"),
    ("up empty", 2, "empty.yaml: a mapping is expected, found nothing"),
    ("up nobody", 2, "pools: the fleet has no instance"),
    ("up /no/such.yaml", 2, "/no/such.yaml: No such file or directory"),
    ("up BYTES", 2, "not UTF-8 text"),
    ("up predict --dry-run", 1, "roles.predict: no model 'no/such'"),
    ("up good --dry-run --json /proc/none/x", 1, "vllm-suite up: /proc/none: No such file or directory"),
    ("up good --log-dir BYTES", 1, "bytes.yaml: File exists"),
    ("router", 2, "no instances: give --prefill, --decode or --any"),
    ("router --config r-unknown", 2, "r-unknown.yaml: prot: unknown key (did you mean 'port'?)"),
    ("router --config r-two", 2, "port: Input should be less than or equal to 65535"),
    ("router --config r-key", 2, "auth.api_keys.0: a key is not empty"),
    ("router --config r-secret", 2, "auth.control_key: a key"),
    ("router --config r-twice", 2, "line 2, column 1: key 'port' is given twice"),
    ("router --decode localhost:1", 2, "not an http(s) URL: 'localhost:1'"),
    ("status --once --url localhost", 2, "'localhost' is no address like http://HOST:PORT"),
    ("status --once --interval nan", 2, "'nan' is no positive number of seconds"),
    ("status --once --url SERVER/list", 1, "answered, and not as a router does"),
    ("status --once --url SERVER/rows", 1, "answered, and not as a router does"),
    ("status --once --url SERVER/html", 1, "gives no answer"),
    ("top --once --url SERVER/rows", 1, "answered something else"),
    ("roles status --url SERVER/rows", 1, "answered, and not as a router does"),
    ("roles set x decode --timeout 0 --url SERVER", 2, "no positive number of seconds"),
    ("roles set x decoder", 2, "invalid choice: 'decoder'"),
    ("roles control /no/such.yaml", 2, "/no/such.yaml: No such file or directory"),
    ("roles control good --url SERVER --scale deployment/x", 2, "--scale and the section roles.scale go together"),
    ("roles control good --url SERVER --lease x", 2, "this is no pod of a Kubernetes cluster"),
    ("fleet schema /no/such", 2, "/no/such is no chart"),
    ("fleet schemas", 2, "invalid choice: 'schemas'"),
]
ANSWERS: dict[str, object] = {"/list": [], "/rows": {"instances": [{"url": 1}, 3]}, "/html": None}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        found = ANSWERS.get("/" + self.path.split("/")[1])
        body = b"<html>" if found is None else json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    one = HTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=one.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{one.server_port}"
    one.shutdown()
    thread.join()
    one.server_close()


@pytest.mark.parametrize(("command", "status", "says"), CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_said_in_words(
    command: str, status: int, says: str, server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = []
    for word in command.split():
        path = tmp_path / f"{word.lower()}.yaml"
        if word in FILES:
            path.write_text(FILES[word])
        elif word == "BYTES":
            path.write_bytes(b"\xff\xfe")
        words.append(str(path) if path.exists() else word.replace("SERVER", server))
    try:
        found = main(words)
    except SystemExit as end:  # argparse's own
        found = int(str(end.code))
    err = capsys.readouterr().err
    assert (found, says in err) == (status, True), err
    assert "s3cret" not in err
    assert "errors.pydantic.dev" not in err
    lines = [line for line in err.splitlines() if line and not line.startswith(("usage:", " "))]
    assert len(lines) == (2 if "r-two" in command else 1), err


def test_help_says_what_the_exit_status_means(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["status"], ["router"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        assert "Exit status: 0 where" in " ".join(capsys.readouterr().out.split())
