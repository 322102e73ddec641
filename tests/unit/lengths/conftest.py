"""Hypothesis without deadlines: an example may take long on a machine that starts engines beside."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("lengths", deadline=None, max_examples=60)
hypothesis.settings.load_profile("lengths")
