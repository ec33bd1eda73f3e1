from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from x_transformers.xpos import provenance

# building a model takes longer than Hypothesis expects of an input, and varies with the machine
common = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}

settings.register_profile("default", max_examples=60, **common)
settings.register_profile("thorough", max_examples=1000, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_sessionstart() -> None:
    """A tree made from other patches than those in the checkout would be tested in their place."""
    messages = provenance.staleness()
    if messages:
        pytest.exit("\n".join(messages), returncode=pytest.ExitCode.USAGE_ERROR)
