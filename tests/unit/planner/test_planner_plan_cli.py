"""`vllm-suite plan` from arguments to report, files and exit status."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from vllm_suite.cli.main import main
from vllm_suite.cli.plan import add_arguments
from vllm_suite.fleet.files import load_fleet
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Parallel, load, with_swiftkv
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan, Slo
from vllm_suite.planner.report import arguments
from vllm_suite.planner.report.fleet import fleet_of
from vllm_suite.planner.report.question import question
from vllm_suite.planner.simulator.setting import Setting

SMALL = ["--model", "Qwen/Qwen3-0.6B", "--gpus", "2xRTX-4090", "--isl", "200", "--osl", "20", "--requests", "200",
         "--space", "pp=1", "tokens=2048", "seqs=256", "--processes", "1"]  # fmt: skip


def plan(*words: str, base: list[str] = SMALL) -> int:
    return main(["plan", *base, *words])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One run that writes everything."""
    folder = tmp_path_factory.mktemp("plan")
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = plan("--ttft", "200ms", "--tpot", "0.02s", "-o", str(folder / "fleet.yaml"), "--json",
                      str(folder / "plan.json"))  # fmt: skip
    assert status == 0
    return folder, out.getvalue(), json.loads((folder / "plan.json").read_text())


def test_the_report_says_what_was_found(made):
    _, text, data = made
    best = data["study"]["best"]
    assert f"Best plan: {best['plan']['name']}" in text
    assert f"{best['goodput']:.4g} requests/s" in text
    assert "TTFT 200 ms, TPOT 20.0 ms for 90% of the requests" in text
    assert "Beside the best disaggregated plan" in text or "Beside the best colocated plan" in text
    assert "Bottleneck" in text
    assert "Error bar: step times +- 25% (roofline with default constants)" in text
    assert "nothing was asked outside the source's range" in text
    assert data["met"] is True


def test_figures_hang_together(made):
    _, _, data = made
    study, best = data["study"], data["study"]["best"]
    assert best["goodput_per_gpu"] == best["goodput"] / 2
    assert study["rate"] == pytest.approx(0.8 * best["goodput"])
    assert best["at_rate"]["attainment"] >= 0.9
    # Slower engines hold less, faster ones more.
    low, high = study["error"]["goodput"]
    assert low < best["goodput"] < high
    assert (
        study["error"]["slow"]["tpot"]["mean"]
        > best["at_rate"]["tpot"]["mean"]
        > study["error"]["quick"]["tpot"]["mean"]
    )
    rates = {each["factor"]: each["outcome"] for each in study["rates"]}
    assert rates[0.8]["attainment"] >= 0.9 > rates[2.0]["attainment"]
    assert study["beyond"]["outcome"]["attainment"] < 0.9
    colocated, apart = study["colocated"], study["disaggregated"]
    assert best in (colocated, apart)
    assert best["goodput"] == max(each["goodput"] for each in (colocated, apart) if each)
    found = data["search"]
    assert found["plans"] == found["simulated"] + found["bounded"] + found["left"]


def test_the_fleet_file_is_one_that_up_takes(made, capsys):
    folder, _, data = made
    path = folder / "fleet.yaml"
    spec = load_fleet(path)
    assert spec.model == "Qwen/Qwen3-0.6B"
    assert (spec.slo.ttft, spec.slo.tpot) == (200.0, 20.0)
    pools = {entry["role"]: entry for entry in data["study"]["best"]["plan"]["pools"]}
    for role, pool in spec.pools.items():
        engine = spec.engine.overridden_by(pool.engine)
        assert pool.replicas == pools[role]["engines"]
        assert (engine.tensor_parallel_size or 1) == pools[role]["tp"]
        assert engine.max_num_batched_tokens == 2048
    assert main(["up", str(path), "--dry-run"]) == 0
    assert "--max-num-batched-tokens 2048" in capsys.readouterr().out


def test_a_target_that_no_plan_meets_is_named_with_what_can_be_had(capsys, tmp_path):
    status = plan(
        "--ttft", "200ms", "--tpot", "0.1ms", "--json", str(tmp_path / "no.json"), "-o", str(tmp_path / "f.yaml")
    )
    out = capsys.readouterr().out
    assert status == 1
    assert "No plan meets the TPOT of 0.100 ms: even alone, 90% of the requests are within" in out
    assert "TTFT of" not in out
    assert not (tmp_path / "f.yaml").exists()
    data = json.loads((tmp_path / "no.json").read_text())
    assert data["met"] is False
    assert data["impossible"]["fails"] == ["tpot"]
    # What it names can be had, and the plan that it calls nearest was simulated.
    assert data["impossible"]["least_tpot"] > 0.0001
    assert data["impossible"]["at_rate"]["tpot"]["mean"] == pytest.approx(data["impossible"]["least_tpot"], rel=0.3)


def test_a_rate_that_is_not_met_says_how_much_is(capsys, tmp_path):
    status = plan("--ttft", "200ms", "--tpot", "20ms", "--rate", "100000", "-o", str(tmp_path / "f.yaml"))
    out = capsys.readouterr().out
    assert status == 1
    assert "The rate that was asked for, 1e+05 requests/s, is not met: the best plan holds" in out
    assert not (tmp_path / "f.yaml").exists()


def test_cost_takes_no_more_accelerators_than_the_rate_needs(capsys, tmp_path):
    base = [word if word != "2xRTX-4090" else "8xRTX-4090" for word in SMALL]
    path = tmp_path / "p.json"
    status = plan(
        "--ttft", "200ms", "--tpot", "20ms", "--rate", "20", "--objective", "cost", "--json", str(path), base=base
    )
    assert status == 0
    data = json.loads(path.read_text())
    assert data["study"]["best"]["plan"]["gpus"] == 1
    assert data["study"]["rate"] == 20
    assert "at 20 requests/s (asked for)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ttft", "200"], "--ttft: not a duration with a unit (us, ms, s, m, h), for example 300ms: '200'"),
        (["--ttft", "0ms"], "--ttft: 0ms is not above 0"),
        ([], "give a target: --ttft, --tpot or both"),
        (
            ["--ttft", "1s", "--attainment", "90"],
            "--attainment is a share above 0 and below 1, for example 0.9",
        ),
        (["--ttft", "1s", "--rate", "-3"], "--rate is requests per second above 0, not -3"),
        (["--ttft", "1s", "--objective", "cost"], "--objective cost compares plans at one rate: give --rate"),
        (["--ttft", "1s", "--images", "2"], "--images: Qwen/Qwen3-0.6B has no encoder that is known"),
        (["--ttft", "1s", "--source", "guess"], "no source 'guess'; there are roofline, tables=FOLDER"),
        (["--ttft", "1s", "--source", "tables=/no/such"], "tables: no folder /no/such"),
        (["--ttft", "1s", "--source", "calibrated=/no/such"], "calibrated: no file /no/such"),
        (["--ttft", "1s", "--trace", "/no/such", "--osl", "3"], "--trace has lengths of its own"),
        (["--ttft", "1s", "--model", "nobody/Nothing-1B"], "no model 'nobody/Nothing-1B'"),
        (["--ttft", "1s", "--gpus", "8"], "hardware is written as 8xH200, not '8'"),
        (["--ttft", "1s", "--gpus", "8xH900"], "no hardware 'H900'; known: A100-80G"),
        (["--ttft", "1s", "--space", "tp=none"], "space: tp is whole numbers above 0, not none"),
        (["--ttft", "1s", "--space", "tp=7"], "no plan of Qwen/Qwen3-0.6B fits on 2 x RTX-4090: vLLM accepts no cut"),
        (["--ttft", "1s", "--requests", "5"], "--requests 5: fewer than 100"),
        (["--ttft", "1s", "--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["--ttft", "1s", "--isl", "50000", "--max-model-len", "100"], "do not fit into 100"),
        (["--tpot", "20ms"], "--tpot alone lets requests wait for their first token without end: give --ttft too"),
        (["--ttft", "1s", "--isl", "0"], "--isl is mean tokens, at least 1, not 0"),
        (["--ttft", "1s", "--osl", "nan"], "--osl is mean tokens, at least 1, not nan"),
        (["--ttft", "1s", "--cv", "-1"], "--cv is a deviation over a mean, at least 0, not -1"),
        (["--ttft", "1s", "--arrival-cv", "inf"], "--arrival-cv is a deviation over a mean, at least 0, not inf"),
        (["--ttft", "1s", "--rate", "inf"], "--rate is requests per second above 0, not inf"),
        (["--ttft", "1s", "--processes", "0"], "--processes is a whole number, at least 1, not 0"),
        (["--ttft", "1s", "--seed", "-1"], "--seed is a whole number, at least 0, not -1"),
        (["--ttft", "1s", "--max-model-len", "0"], "--max-model-len is a whole number, at least 2, not 0"),
        (["--ttft", "1s", "--format", "apex"], "--format is of a trace: give --trace FILE, or leave it"),
        (["--ttft", "1s", "--image-size", "9x9"], "--image-size is of pictures: say how many a request has"),
        (
            ["--ttft", "1s", "--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--images", "1", "--image-size", "0x9"],
            "--image-size is WIDTHxHEIGHT in pixels, for example 1024x1024, not 0x9",
        ),
        (["--ttft", "1s", "--gpus", "H200x8"], "hardware is written as 8xH200, not 'H200x8'"),
        (["--ttft", "1s", "--gpus", "00xH200"], "hardware is written as 8xH200, not '00xH200'"),
        (["--ttft", "1s", "--gpus", "8xH200-SXM"], "did you mean H200? Others"),
        (["--ttft", "1s", "--gpus", "8xH200-SXM"], "Others: a file of your own, --hardware FILE"),
        (["--ttft", "1s", "--model", "Qwen/Qwen3-8"], "did you mean Qwen/Qwen3-8B?"),
        (["--ttft", "1s", "--model", "qwen/qwen3-80b"], "did you mean Qwen/Qwen3-8B or"),
        (["--ttft", "1s", "--model", "/"], "/config.json: there is no such file; --model takes a checkpoint's folder"),
        (["--ttft", "1s", "--space", "pp=2"], "space: pp is given twice; write all its values in one"),
        (["--ttft", "1s", "--space", "kinds=epd"], "plans with encoders need requests with pictures: give --images N"),
        (["--ttft", "1s", "--space", "schemes=apex"], "space: schemes=apex says how engines are cut; leave pp"),
        (["--ttft", "1s", "--placement", "high"], "--placement: DistServe's algorithms need both targets"),
        (
            ["--ttft", "1s", "--tpot", "9ms", "--placement", "low", "--space", "kinds=colocated"],
            "--placement chooses a plan with prefill and decode; --space kinds=colocated has none",
        ),
        (["--ttft", "1s", "--json", "."], "--json .: is a folder; name a file in it"),
        (["--ttft", "1s", "--json", "new.x", "-o", "new.x"], "--json new.x: -o names the same file"),
        (["--ttft", "1s", "--watch-looks", "3"], "--watch-looks goes with --watch URL or --watch-file FILE"),
        (["--ttft", "1s", "--watch-metrics-port", "0"], "--watch-metrics-port goes with --watch URL"),
        (["--ttft", "1s", "--watch", "http://a", "--watch-metrics-port", "70000"], "at most 65535, not 70000"),
        (["--ttft", "1s", "--watch", "localhost:9090"], "such as http://localhost:9090, not localhost:9090"),
        (["--ttft", "1s", "--watch", "http://a", "--images", "1"], "watch without --images"),
        (["--ttft", "1s", "--watch-file", "/no/such.json"], "/no/such.json"),
        (["--ttft", "1s", "--watch-file", "a", "--watch-selector", "b"], "--watch-selector is for --watch"),
    ],
)
def test_bad_input_says_what_and_what_to_do(words, says, capsys):
    assert plan(*words) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.startswith("vllm-suite plan: ")
    assert captured.out == ""


def test_options_of_lengths_beside_a_trace_are_refused(tmp_path, capsys):
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,100,10\n")
    base = ["--model", "Qwen/Qwen3-0.6B", "--gpus", "1xH200", "--trace", str(trace), "--ttft", "1s"]
    for words, says in (
        (["--cv", "1"], "--trace has lengths and arrivals of its own: leave --cv"),
        (["--arrival-cv", "1"], "leave --arrival-cv"),
        (["--json", str(trace)], "would overwrite the file of --trace"),
        (["--format", "azur"], "no format azur; known are auto, azure"),
    ):
        assert plan(*words, base=base) == 2
        assert says in capsys.readouterr().err
    assert trace.stat().st_size > 60


def test_what_an_option_needs_is_asked_for_before_the_search(monkeypatch, capsys):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    for words, says in (
        (["--html", "r.html"], "--html needs matplotlib for its pictures: pip install 'vllm-suite[pictures]'"),
        (["--method", "optuna"], "--method optuna needs Optuna: pip install 'vllm-suite[search]'"),
    ):
        assert plan("--ttft", "1s", *words) == 2
        assert says in capsys.readouterr().err


def test_a_search_that_is_stopped_before_it_finds_anything_does_not_call_it_impossible(capsys):
    assert plan("--ttft", "1s", "--tpot", "50ms", "--time-limit", "1us") == 1
    said = capsys.readouterr().out
    assert "before a plan was found that meets the targets; at no load they can be met. Give it more time" in said
    assert "No plan meets" not in said


def test_a_tuned_model_is_read_as_the_one_it_was_made_of():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [word if word != "Qwen/Qwen3-0.6B" else "meta-llama/Llama-3.1-8B-Instruct" for word in SMALL]
    case = question(parser.parse_args([*words, "--ttft", "1s"]))
    base, _ = load("meta-llama/Llama-3.1-8B")
    assert case.name == "meta-llama/Llama-3.1-8B-Instruct"  # that is what the fleet serves
    assert (case.model.layers, case.model.name) == (base.layers, base.name)
    assert "taken to be cut as meta-llama/Llama-3.1-8B;" in case.model.assumed[0]


def test_a_bad_line_of_a_trace_is_named(tmp_path, capsys):
    trace = tmp_path / "t.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00.0,100,10\n2023-11-16 18:00:01.0,x,10\n"
    )
    base = ["--model", "Qwen/Qwen3-0.6B", "--gpus", "1xH200", "--trace", str(trace), "--ttft", "1s"]
    assert plan(base=base) == 2
    assert f"{trace}:3:" in capsys.readouterr().err


def test_help_needs_no_numpy():
    code = (
        "import sys, vllm_suite.cli.main as m\n"
        "try: m.main(['plan', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('numpy', 'pydantic', 'rich', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--attainment" in done.stdout


def setting(name: str, gpus: str = "8xH200", swiftkv: bool = False) -> Setting:
    model, quant = load(name)
    model = with_swiftkv(model, 16, 1) if swiftkv else model
    return Setting(model, quant, cluster(gpus), lambda pool: pytest.fail("no source is asked"))


def test_pools_cuts_and_formats_reach_the_engines():
    own = setting("Qwen/Qwen3-30B-A3B")
    fp8 = own.quant.named("bfloat16", "fp8", "fp8")
    made = Plan(
        (PoolPlan("prefill", 2, Parallel(tp=2), fp8, 64, 4096), PoolPlan("decode", 1, Parallel(tp=1, dp=4, ep=True)))
    )
    spec = fleet_of(made, own, Slo(0.3, None), model="m", longest=8192)
    pools = dict(spec.pools.items())
    prefill, decode = (spec.engine.overridden_by(pools[role].engine) for role in ("prefill", "decode"))
    words = " ".join(prefill.flags())
    assert "--tensor-parallel-size 2" in words
    assert "--quantization fp8" in words
    assert "--kv-cache-dtype fp8" in words
    assert "--max-num-seqs 64 --max-num-batched-tokens 4096" in words
    assert "--max-model-len 8192" in words
    words = " ".join(decode.flags())
    assert "--data-parallel-size 4" in words
    assert "--enable-expert-parallel" in words
    assert "fp8" not in words
    assert spec.slo.ttft == 300.0
    assert spec.slo.tpot is None
    assert spec.router.disaggregation.min_prompt_tokens == own.serving.min_prompt_tokens


def test_encoders_and_swiftkv_bring_their_plugins():
    made = Plan((PoolPlan("encode", 3), PoolPlan("any", 1, Parallel(tp=2))))
    assert fleet_of(made, setting("OpenGVLab/InternVL2-26B"), Slo(1.0, 0.1), model="m").plugins == ("disagg", "epd")
    late = Plan((PoolPlan("prefill", 1, late_kv_only=True), PoolPlan("decode", 1)))
    spec = fleet_of(late, setting("meta-llama/Llama-3.1-8B", swiftkv=True), Slo(1.0, 0.1), model="m")
    assert spec.plugins == ("disagg", "swiftkv")
    assert spec.pools.prefill.engine.additional_config == {"suite": {"swiftkv": {"prefill_only": True}}}


def test_a_format_that_vllm_cannot_make_is_refused():
    own = setting("meta-llama/Llama-3.1-8B")
    made = Plan((PoolPlan("any", 1, quant=own.quant.named("bfloat16", "int4")),))
    with pytest.raises(PlanError, match="vLLM cannot make int4 of a checkpoint in bf16"):
        fleet_of(made, own, Slo(1.0, 0.1), model="m")


def test_a_known_folder_is_what_the_fleet_serves(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
              "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000,
              "max_position_embeddings": 4096}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [str(folder / "config.json") if word == "Qwen/Qwen3-0.6B" else word for word in SMALL]
    case = question(parser.parse_args([*words, "--ttft", "1s"]))
    assert case.name == str(folder)
    assert case.model.hidden == 512


def test_the_length_aware_order_is_simulated_and_in_the_fleet(tmp_path, capsys):
    path = tmp_path / "f.yaml"
    assert plan("--ttft", "200ms", "--tpot", "20ms", "--dler", "--cv", "1", "-o", str(path)) == 0
    assert load_fleet(path).plugins == ("disagg", "dler")
    capsys.readouterr()
