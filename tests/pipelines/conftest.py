"""What the tests of all jobs want."""

from collections.abc import Iterator

import datasets
import pytest


@pytest.fixture(autouse=True, scope="session")
def _quiet_readers() -> Iterator[None]:
    """Has `datasets` draw no bars, which would be taken for output."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
