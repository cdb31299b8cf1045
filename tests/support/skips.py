"""Skip a test for want of what it needs; on CI that is an error."""

from __future__ import annotations

import os

#: With CI=true nothing is skipped for want of a server: what is missing is an error.
CI = os.environ.get("CI", "").lower() in ("1", "true")


def missing(reason: str) -> None:
    """Skip the test, or fail it on CI."""
    import pytest  # the benchmark does without

    if CI:
        pytest.fail(f"on CI this is an error: {reason}", pytrace=False)
    pytest.skip(reason)
