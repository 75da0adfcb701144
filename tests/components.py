"""Real components that some tests need: missing here means skipped here, but never in CI."""

import os
import shutil

import pytest


def require(program: str, apt: str) -> str:
    """Path of ``program``. Skips the test where it is missing, fails where ``CI`` is set, and says which Debian packages (``apt``) have it."""
    path = shutil.which(program)
    if path is None:
        message = f"{program} is not on PATH; install it with: apt-get install -y --no-install-recommends {apt}"
        if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
            pytest.fail(message)
        pytest.skip(message)
    return path
