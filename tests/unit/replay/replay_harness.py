"""A small engine for the tests of the replay."""

from __future__ import annotations

from replay_steps import AffineSteps
from replay_workload import Room

ROOM = Room(blocks=200, seqs=4)
STEPS = AffineSteps(step=9e-3, per_sequence=20e-6, per_kv_token=22e-9, per_prefill_token=22e-6)
