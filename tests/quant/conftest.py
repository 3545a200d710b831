"""Settings for drawn tests: shared machines are too uneven for time limits per example."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
