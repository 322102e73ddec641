"""The report as text: plain lines that read the same on a terminal and in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from vllm_suite.planner.outcome import Outcome
from vllm_suite.planner.plan import Plan, Role, Slo
from vllm_suite.planner.report.study import BEYOND, Compared, Study
from vllm_suite.planner.report.why import Impossible
from vllm_suite.planner.search.case import Case
from vllm_suite.planner.search.search import SearchResult
from vllm_suite.planner.search.simulated import parts


def report(case: Case, result: SearchResult, found: Study) -> str:
    """The whole report of a search that found a plan."""
    lines = [*_question(case), "", *_best(case, found), "", *_against(case, found), "", *_bottleneck(case, found), ""]
    lines += [*_what_if(case, found), "", *_error(case, found), "", *_front(case, found), "", *_searched(result)]
    if found.cut:
        lines.append(f"The report is not whole: {found.cut} of its simulations were left out when the time was over.")
    return "\n".join(lines) + "\n"


def no_plan(case: Case, result: SearchResult, why: Impossible) -> str:
    """The report of a search that found none."""
    slo, lines = case.slo, [*_question(case), ""]
    share = f"{slo.attainment:.0%} of the requests"
    for target in why.fails:
        if target == "ttft":
            assert slo.ttft is not None
            lines.append(
                f"No plan meets the TTFT of {_time(slo.ttft)}: even alone, {share} are within {_time(why.ttft)} at best"
                f" ({why.ttft / slo.ttft:.2g} times the target), with {why.ttft_plan.name}."
            )
        elif target == "tpot":
            assert slo.tpot is not None
            lines.append(
                f"No plan meets the TPOT of {_time(slo.tpot)}: even alone, {share} are within {_time(why.tpot)} at best"
                f" ({why.tpot / slo.tpot:.2g} times the target), with {why.tpot_plan.name}."
            )
        elif target == "both":
            lines.append(
                f"Each target can be met, both together by no plan: TTFT down to {_time(why.ttft)} with"
                f" {why.ttft_plan.name}, TPOT down to {_time(why.tpot)} with {why.tpot_plan.name}."
            )
        elif result.stopped:
            lines.append(f"Stopped ({result.stopped}) before a plan was found that meets the targets; at no load they"
                         " can be met. Give it more time, or a narrower --space.")  # fmt: skip
        else:
            rate = f" at {case.rate:g} requests/s" if case.rate else ""
            lines.append(f"No plan meets the targets{rate}; at no load they can be met.")
    lines += ["", f"Nearest at no load: {why.nearest.name}, one request after the other:"]
    if why.outcome is not None:
        lines += _indent(_table([_head(case), _figures("", why.outcome, case.slo)]))
    return "\n".join([*lines, "", *_searched(result)]) + "\n"


def _question(case: Case) -> Iterator[str]:
    slo, workload = case.slo, case.workload
    yield f"{case.name} on {case.cluster.gpus} x {case.cluster.device.name}"
    rate = "" if case.rate is None else f", {case.rate:.4g} requests/s"
    means = f"{workload.mean_prompt:.0f} tokens in, {workload.mean_output:.0f} out on average"
    yield f"workload: {workload.name}: {means}{rate}"
    targets = [
        f"{name} {_time(value)}" for name, value in (("TTFT", slo.ttft), ("TPOT", slo.tpot)) if value is not None
    ]
    yield f"targets:  {', '.join(targets) or 'none'} for {slo.attainment:.0%} of the requests; sought: {case.goal}"
    measured = case.setting.measured
    for note in (*workload.notes, *case.model.assumed, *(() if measured is None else measured.notes)):
        yield f"note:     {note}"


def _best(case: Case, found: Study) -> Iterator[str]:
    best = found.best
    yield f"Best plan: {best.found.plan.name} ({_kind(best.found.plan)})"
    yield from _indent(_pools(case, best.found.plan))
    if not math.isnan(best.found.goodput):
        per_gpu = best.found.goodput / case.cluster.gpus
        yield f"  holds the targets up to {best.found.goodput:.4g} requests/s, {per_gpu:.3g} per accelerator"
    outcome = best.outcome
    if outcome is None:
        return
    if parts(best.found.plan) > 1:
        yield f"  simulated as one of its {parts(best.found.plan)} equal parts"
    yield f"  at {found.rate:.4g} requests/s ({'asked for' if found.rate == case.rate else '80 % of that'}):"
    yield from _indent(_spreads(outcome), 4)
    yield (f"    {outcome.attainment:.1%} within both targets (95 % interval {outcome.low:.1%} to {outcome.high:.1%},"
           f" {outcome.counted} requests counted)")  # fmt: skip
    loads = [f"{role} in steps {load.utilisation:.0%} of the time" + (f", cache {load.kv_mean:.0%} full" if load.kv_mean
             else "") for role, load in outcome.pools.items()]  # fmt: skip
    yield f"    {'; '.join(loads)}"
    yield f"    {outcome.tokens_per_s:.0f} tokens/s{_energy(outcome)}{_money(outcome)}"
    if not outcome.steady:
        yield f"    not settled ({outcome.trend}): a longer run may say otherwise"


def _kind(plan: Plan) -> str:
    """What the pools do, in a word or two."""
    encoders = " behind encoders" if plan.pool("encode") is not None else ""
    return f"{'colocated' if plan.pool('any') is not None else 'disaggregated'}{encoders}"


def _pools(case: Case, plan: Plan) -> list[str]:
    rows = [["pool", "engines", "TP", "PP", "DP", "EP", "seqs", "tokens", "cache tokens", "first GPUs"]]
    for pool in plan.pools:
        cut, first = pool.parallel, ",".join(map(str, pool.ranks[:8])) + (",…" if len(pool.ranks) > 8 else "")
        sizes = [str(pool.count), str(cut.tp), str(cut.pp), str(cut.dp), "yes" if cut.ep else "no"]
        if pool.role == "encode":
            rows.append([pool.role, *sizes, "-", "-", "-", first])
            continue
        limits = case.setting.limits(pool, encoder=case.setting.encodes(plan, pool) and pool.role != "decode")
        seqs, tokens = pool.max_num_seqs, pool.max_num_batched_tokens
        rows.append([pool.role, *sizes, str(seqs), str(tokens), str(limits.blocks * limits.block_size), first])
    return _table(rows)


def _spreads(outcome: Outcome) -> list[str]:
    rows = [["", "mean", "p50", "p90", "p99"]]
    for name, each in (("TTFT", outcome.ttft), ("TPOT", outcome.tpot), ("latency", outcome.latency)):
        rows.append([name, *(_time(value) for value in (each.mean, each.p50, each.p90, each.p99))])
    return _table(rows)


def _against(case: Case, found: Study) -> Iterator[str]:
    best = found.best
    if found.colocated is None and found.disaggregated is None:
        return
    kind = best.found.candidate.kind
    other = found.disaggregated if kind == "any" else found.colocated
    name = "disaggregated" if kind == "any" else "colocated"
    if other is None:
        tried = [kind for kind in case.choices.kinds if (kind == "any") == (name == "colocated")]
        if not tried:
            yield f"Beside it: no {name} plan was tried (--space kinds=...)."
            return
        yield f"Beside it: no {name} plan meets the targets."
        return
    yield f"Beside the best {name} plan, {other.found.plan.name}:"
    rows = [["", "highest rate", *_head(case)[1:]]]
    for label, each in (("this plan", best), (name, other)):
        rate = "-" if math.isnan(each.found.goodput) else f"{each.found.goodput:.4g}/s"
        figures = ["", *["-"] * 4] if each.outcome is None else _figures("", each.outcome, case.slo)
        rows.append([label, rate, *figures[1:]])
    yield from _indent(_table(rows))
    yield from (f"  {line}" for line in _reasons(best, other, name))


def _reasons(best: Compared, other: Compared, name: str) -> Iterator[str]:
    mine, theirs = best.found.goodput, other.found.goodput
    if mine and theirs:
        yield f"{mine / theirs:.2f} times its highest rate"
    if best.outcome is None or other.outcome is None:
        return
    for label, key in (("TTFT", "ttft"), ("TPOT", "tpot")):
        a, b = getattr(best.outcome, key).at_share, getattr(other.outcome, key).at_share
        if a and b and not 0.9 < a / b < 1.1:
            yield f"{label} {_time(a)} against {_time(b)} of the {name} plan, at the same rate"
    gap, theirs_gap = best.outcome.longest_gap.p99, other.outcome.longest_gap.p99
    if gap and theirs_gap and not 0.8 < gap / theirs_gap < 1.25:
        yield f"longest gap between two tokens, p99: {_time(gap)} against {_time(theirs_gap)}"


def _bottleneck(case: Case, found: Study) -> Iterator[str]:
    beyond, slo = found.beyond, case.slo
    if beyond is None:
        return
    rate = beyond.rate
    yield f"Bottleneck, seen at {rate:.4g} requests/s ({BEYOND - 1:.0%} above the highest rate):"
    shares = []
    if slo.ttft is not None:
        shares.append(f"{beyond.ttft_met:.1%} within TTFT")
    if slo.tpot is not None:
        shares.append(f"{beyond.tpot_met:.1%} within TPOT")
    yield f"  {', '.join(shares)}, {beyond.attainment:.1%} within both"
    stages = [f"{name.replace('_', ' ')} {_time(value)}" for name, value in beyond.stages.items()]
    yield f"  mean seconds of a request: {', '.join(stages)}"
    loads = [f"{role} in steps {load.utilisation:.0%} of the time" + (f", cache up to {load.kv_max:.0%} full"
             if load.kv_max else "") for role, load in beyond.pools.items()]  # fmt: skip
    yield f"  {'; '.join(loads)}"
    if found.faster:
        worst = max(found.faster, key=lambda role: found.faster[role])
        if found.faster[worst] - beyond.attainment < 0.005:
            yield "  no pool alone: none being a fifth faster changes that"
        else:
            gains = [f"{role} {share:.1%}" for role, share in found.faster.items()]
            yield f"  within both with engines a fifth faster: {', '.join(gains)}"
            if len(gains) > 1:
                yield f"  so it is {_role(worst)} that gives way first"


def _role(role: Role) -> str:
    return {"any": "the engines", "prefill": "prefill", "decode": "decode", "encode": "the encoders"}[role]


def _what_if(case: Case, found: Study) -> Iterator[str]:
    yield f"What if, from {found.edge:.4g} requests/s:"
    rows = [_head(case)]
    rows += [_figures(f"rate x {factor:g}", each, case.slo) for factor, each in found.rates]
    for prompt, output, each in found.lengths:
        rows.append(_figures(f"prompts x {prompt:g}" if prompt != 1 else f"outputs x {output:g}", each, case.slo))
    yield from _indent(_table(rows))


def _error(case: Case, found: Study) -> Iterator[str]:
    yield f"Error bar: step times +- {found.error:.0%} ({found.error_origin})"
    if found.goodputs is not None:
        low, high = found.goodputs
        yield f"  highest rate {low:.4g} to {high:.4g} requests/s"
    slow, quick = found.slow, found.quick
    if slow is not None and quick is not None:
        # A small change of all times may reorder queues: an end is never inside of what is in the middle.
        own = found.best.outcome or slow
        ttft, tpot = (
            f"{name} {_time(min(times))} to {_time(max(times))}"
            for name, times in (("TTFT", [each.ttft.at_share for each in (own, quick, slow)]),
                                ("TPOT", [each.tpot.at_share for each in (own, quick, slow)]))
        )  # fmt: skip
        yield f"  at {found.rate:.4g} requests/s {ttft}, {tpot} for {case.slo.attainment:.0%} of the requests;"
        least, most = f"{slow.attainment:.1%}", f"{quick.attainment:.1%}"
        yield f"  {least if least == most else f'{least} to {most}'} of them within both"
    yield f"  source: {', '.join(case.sources.names)}"
    if found.outside is None:
        return
    if not found.outside:
        yield "  nothing was asked outside the source's range"
    for axis, entry in found.outside.items():
        reach = f"{entry['steps']} steps in {axis}, up to {entry['furthest']:g}"
        yield f"  outside the source's range: {reach}; taken at the edge"


def _front(case: Case, found: Study) -> Iterator[str]:
    yield f"Plans that none beats in highest rate, latency and energy together, at {found.rate:.4g} requests/s:"
    priced = any(each.outcome is not None and each.outcome.money_per_million is not None for each in found.front)
    rows = [["plan", "highest rate", "mean latency", "J/token", *(["money/M tokens"] if priced else [])]]
    names = [each.found.plan.name for each in found.front]
    for each in found.front:
        outcome, name = each.outcome, each.found.plan.name
        if names.count(name) > 1:
            name += f" ({_limits(each.found.plan)})"
        rate = "-" if math.isnan(each.found.goodput) else f"{each.found.goodput:.4g}/s"
        if outcome is None:
            rows.append([name, rate, *["-"] * (len(rows[0]) - 2)])
            continue
        joules = "-" if outcome.joules_per_token is None else f"{outcome.joules_per_token:.3g}"
        money = "-" if outcome.money_per_million is None else f"{outcome.money_per_million:.3g}"
        row = [name, rate, _time(outcome.latency.mean), joules]
        rows.append([*row, money] if priced else row)
    yield from _indent(_table(rows))
    if not priced:
        yield (f"  no cost in money: {case.cluster.device.name} has no price here; give one in a file of your own,"
               " --hardware FILE with price_per_hour")  # fmt: skip


def _limits(plan: Plan) -> str:
    """What tells plans of equal cuts apart."""
    return " | ".join(f"{pool.max_num_seqs} seqs, {pool.max_num_batched_tokens} tokens" for pool in plan.pools
                      if pool.role != "encode")  # fmt: skip


def _searched(result: SearchResult) -> Iterator[str]:
    parts = [
        f"{result.space} plans",
        f"{result.simulated} simulated in {result.trials} runs",
        f"{result.bounded} ruled out by bounds",
    ]
    if result.left:
        parts.append(f"{result.left} not looked at, less likely by their estimates")
    yield "Searched: " + ", ".join(parts)
    if result.note:
        yield f"Of {result.note}."
    if result.stopped:
        yield f"Stopped early ({result.stopped}): the best so far."


def _head(case: Case) -> list[str]:
    share = f"p{case.slo.attainment * 100:g}"
    return ["", "within both", f"TTFT {share}", f"TPOT {share}", "queued"]


def _figures(label: str, outcome: Outcome | None, slo: Slo) -> list[str]:
    if outcome is None:
        return [label, "cannot be served", "-", "-", "-"]
    queued = outcome.stages.get("queue", math.nan)
    grows = " (grows)" if outcome.trend == "growing" else ""
    return [
        label,
        f"{outcome.attainment:.1%}",
        _time(outcome.ttft.at_share),
        _time(outcome.tpot.at_share),
        _time(queued) + grows,
    ]


def _energy(outcome: Outcome) -> str:
    return "" if outcome.joules_per_token is None else f", {outcome.joules_per_token:.3g} J/token"


def _money(outcome: Outcome) -> str:
    return "" if outcome.money_per_million is None else f", {outcome.money_per_million:.3g} per million tokens"


def _time(seconds: float) -> str:
    """Three figures with a unit."""
    if seconds != seconds:
        return "-"
    if seconds and seconds < 1:
        return f"{_three(seconds * 1000)} ms"
    return f"{_three(seconds)} s"


def _three(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first one to the left, the others to the right."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def _indent(lines: Sequence[str], by: int = 2) -> list[str]:
    return [" " * by + line for line in lines]
