"""What a space of plans is made of: the sizes, formats and settings that are tried, coarse ones first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from vllm_suite.planner.models import ModelError, Quantization
from vllm_suite.planner.plan import PlanError, Role

Kind = Literal["any", "prefill+decode", "encode+any", "encode+prefill+decode"]
"""Which pools a plan has."""

KINDS: tuple[Kind, ...] = get_args(Kind)
_SHORT: dict[str, Kind] = {
    "colocated": "any",
    "pd": "prefill+decode",
    "ea": "encode+any",
    "epd": "encode+prefill+decode",
}


def roles(kind: Kind) -> tuple[Role, ...]:
    """The roles of a kind, in the order of a request."""
    return tuple(cast(Role, role) for role in kind.split("+"))


@dataclass(frozen=True)
class Settings:
    """An engine's `max_num_seqs` and `max_num_batched_tokens`."""

    seqs: int
    tokens: int


@dataclass(frozen=True)
class Choices:
    """What may be combined. The first of several is what the coarse level of the space uses.

    Attributes:
        kinds: of plans; those with an encode pool are left out for a model or a workload without items.
        tp: None for every divisor of an NVLink domain (of a node without NVLink).
        pp, dp: None for the powers of two up to the number of accelerators. `dp` is for mixtures of experts.
        ep: whether experts are spread whole; for mixtures of experts.
        quants: None for the checkpoint's own.
        any, prefill, decode: settings of the engines of a role. What vLLM serves with by itself on large accelerators
            comes first; more than 256 prompts at a time are of no use to a prefill instance.
        encode_tp: of an encoder.
        wide_tp: tensor parallelism may leave the NVLink domain.
        idle: plans may leave room for another engine unused.
        apex: the plans are APEX's, those that vLLM can start.
        kv_blocks: of the cache of every engine; None for what fits.
    """

    kinds: tuple[Kind, ...] = KINDS
    tp: tuple[int, ...] | None = None
    pp: tuple[int, ...] | None = None
    dp: tuple[int, ...] | None = None
    ep: tuple[bool, ...] = (True, False)
    quants: tuple[Quantization | None, ...] = (None,)
    any: tuple[Settings, ...] = (
        Settings(1024, 8192),
        Settings(1024, 2048),
        Settings(256, 8192),
        Settings(256, 2048),
        Settings(256, 512),
        Settings(64, 2048),
    )
    prefill: tuple[Settings, ...] = (Settings(256, 8192), Settings(256, 2048), Settings(256, 16384))
    decode: tuple[Settings, ...] = (Settings(1024, 8192), Settings(256, 8192))
    encode_tp: tuple[int, ...] = (1,)
    wide_tp: bool = False
    idle: bool = False
    apex: bool = False
    kv_blocks: int | None = None

    def settings(self, role: Role) -> tuple[Settings, ...]:
        """Of the engines of a role; an encoder has one."""
        chosen = {"any": self.any, "prefill": self.prefill, "decode": self.decode, "encode": (Settings(256, 8192),)}
        return chosen[role]

    @classmethod
    def parse(cls, words: Sequence[str], quant: Quantization) -> Choices:
        """From words of a command line, ``tp=1,2``, ``kinds=any,pd``, ``seqs=64,256``, ``quant=fp8,fp8+kv``.

        Args:
            quant: the checkpoint's own, of which `quant` changes the weights, and the cache where it says ``+kv``.

        Raises:
            PlanError: a word that is none of these; it names the word and what is known.
        """
        changes: dict[str, Any] = {}
        given: dict[str, tuple[int, ...]] = {}
        named: set[str] = set()
        for word in words:
            key, equals, text = word.partition("=")
            parts = [part.strip() for part in text.split(",") if part.strip()]
            if not equals or not parts:
                raise PlanError(f"space: {word!r} is not NAME=VALUE,VALUE, for example tp=1,2")
            if key in named:
                raise PlanError(f"space: {key} is given twice; write all its values in one, for example {key}={text}")
            named.add(key)
            if key in ("tp", "pp", "dp", "encode_tp"):
                changes[key] = _numbers(key, parts)
            elif key in ("seqs", "tokens"):
                given[key] = _numbers(key, parts)
            elif key == "kinds":
                changes["kinds"] = tuple(_kind(part) for part in parts)
            elif key in ("ep", "wide_tp", "idle"):
                flags = tuple(_flag(key, part) for part in parts)
                changes[key] = flags if key == "ep" else flags[0]
            elif key == "schemes":
                if parts != ["apex"]:
                    raise PlanError(f"space: schemes is apex, not {','.join(parts)}")
                changes["apex"] = True
            elif key == "quant":
                changes["quants"] = tuple(_quant(part, quant) for part in parts)
            else:
                known = "tp, pp, dp, ep, kinds, seqs, tokens, quant, encode_tp, wide_tp, idle, schemes"
                raise PlanError(f"space: no {key!r}; there are {known}")
        if "apex" in changes:
            if changes.setdefault("kinds", ("any",)) != ("any",):
                raise PlanError("space: schemes=apex has colocated plans alone; leave kinds")
            sizes = sorted(named & {"tp", "pp", "dp", "ep", "wide_tp", "idle"})
            if sizes:
                raise PlanError(f"space: schemes=apex says how engines are cut; leave {', '.join(sizes)}")
        found = replace(cls(), **changes)
        return _with_settings(found, given) if given else found


def _with_settings(choices: Choices, given: dict[str, tuple[int, ...]]) -> Choices:
    """All pairs of the given values, each beside vLLM's default of the other where only one is given."""
    pairs = tuple(
        Settings(seqs, tokens)
        for tokens in given.get("tokens", (8192,))
        for seqs in given.get("seqs", (256,))
        if seqs <= tokens
    )
    if not pairs:
        raise PlanError("space: every max_num_seqs is above every max_num_batched_tokens; vLLM refuses that")
    return replace(choices, any=pairs, prefill=pairs, decode=pairs)


def _numbers(key: str, parts: Sequence[str]) -> tuple[int, ...]:
    if not all(part.isdigit() and int(part) for part in parts):
        raise PlanError(f"space: {key} is whole numbers above 0, not {','.join(parts)}")
    return tuple(int(part) for part in parts)


def _kind(text: str) -> Kind:
    kind = _SHORT.get(text, text)
    if kind not in KINDS:
        raise PlanError(f"space: no kind {text!r}; there are {', '.join(_SHORT)}, or {', '.join(KINDS)}")
    return kind


def _flag(key: str, text: str) -> bool:
    if text not in ("yes", "no"):
        raise PlanError(f"space: {key} is yes or no, not {text!r}")
    return text == "yes"


def _quant(text: str, own: Quantization) -> Quantization | None:
    if text == "own":
        return None
    weights, _, more = text.partition("+")
    if more not in ("", "kv"):
        raise PlanError(f"space: quant {text!r}; write own, fp8 or fp8+kv")
    try:
        found = own if weights == "own" else replace(own, weights=weights)
        return replace(found, kv="fp8") if more else found
    except ModelError as error:
        raise PlanError(f"space: {error}") from error
