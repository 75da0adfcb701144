"""Real components that some tests need: missing here means skipped here, but never in CI."""

import os
import shutil

import pytest


def require(program: str, apt: str) -> str:
    """Path of ``program``; ``apt`` names the Debian packages that have it. Where it is missing: see ``missing``."""
    return shutil.which(program) or missing(f"{program} is not on PATH; get it with: apt-get install -y --no-install-recommends {apt}")


def missing(message: str) -> None:
    """Skips the test, or fails it where ``CI`` is set. The message says how to get what is missing."""
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        pytest.fail(message)
    pytest.skip(message)
