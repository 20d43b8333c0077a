"""Files that tests read."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"
SHARED = REPOSITORY.parent / "shared"  # recorded figures beside the repository, where there are any


def shared(name: str) -> Path:
    """A file of SHARED; the test is skipped where it is missing."""
    if not (SHARED / name).is_file():
        pytest.skip(f"no {SHARED / name}")
    return SHARED / name
