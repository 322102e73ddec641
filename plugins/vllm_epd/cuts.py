"""Slices of large items on an instance that encodes: what a request asks for, cut, and what is said of it then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from vllm_epd.messages import GaveUp
from vllm_epd.stats import SuiteECStats
from vllm_suite.compat.slices import cut, rules_for
from vllm_suite.encoded import SLICE_KEY, SLICES_KEY, Slice, slice_identifier


class Cuts:
    """What became of the slices that requests named. Called from the engine's thread only.

    An item that cannot be cut is encoded whole under its own name: whoever asked for the slice finds it there. It
    never comes to lie under the slice's name.

    Args:
        tell: sends a message to the workers.
    """

    def __init__(self, model_config: Any, stats: SuiteECStats, tell: Callable[[GaveUp], None]) -> None:
        self._model_config = model_config
        self._stats = stats
        self._tell = tell
        self._made: dict[str, dict[str, Slice]] = {}  # request -> identifier of a slice -> the slice

    def apply(self, request: Any, kept: Callable[[str], bool]) -> None:
        """Replace the features of a request that are to be slices. Call it once, before its first step.

        ``kept`` tells what is stored and needs no encoder.
        """
        wanted = _wanted(request.ec_transfer_params)
        rules = rules_for(self._model_config) if wanted else {}
        made: dict[str, Slice] = {}
        for index, feature in enumerate(request.mm_features):
            piece = wanted.get(feature.identifier)
            if piece is None:
                continue
            rows = request.get_num_encoder_embeds(index)
            rule = rules.get(feature.modality)
            sliced = cut(feature, rule, piece) if rule is not None else None
            if sliced is None and not kept(feature.identifier):
                self._stats.count("slices", "whole")
                self._tell(GaveUp((feature.identifier,)))
                request.mm_features[index] = dataclasses.replace(feature, identifier=piece.of)
                continue
            if sliced is not None:
                request.mm_features[index] = sliced
            self._stats.count("slices", "cut")
            made[feature.identifier] = msgspec.structs.replace(piece, rows=rows)
        if made:
            self._made[request.request_id] = made

    def describe(self, request_id: str, items: Mapping[str, dict[str, Any]]) -> None:
        """Add to an encoder's answer which of its entries are slices. What sizes the whole item is not theirs."""
        for identifier, piece in self._made.pop(request_id, {}).items():
            if (entry := items.get(identifier)) is not None:
                entry[SLICE_KEY] = msgspec.to_builtins(piece)
                entry["metadata"] = {}

    def forget(self, request_id: str) -> None:
        """The request was given up."""
        self._made.pop(request_id, None)


def _wanted(params: Mapping[str, Any]) -> dict[str, Slice]:
    """Slices by identifier; those that are not what their identifier says are left out, and encoded as they come."""
    try:
        named = msgspec.convert(params.get(SLICES_KEY) or {}, dict[str, Slice], strict=True)
    except msgspec.ValidationError:
        return {}
    return {
        name: piece
        for name, piece in named.items()
        if piece.sound and name == slice_identifier(piece.of, piece.index, piece.count)
    }
