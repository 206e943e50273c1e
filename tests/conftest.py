from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Recordings of what fairseq's moe branch computes on a tiny checkpoint (see its README)."""
    return DATA / "reference"
