"""For all tests: hypothesis sets no time limit, and what a grid switches off does not stay off."""

import os

import pytest
from hypothesis import settings

# A busy machine would not keep a time limit.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

@pytest.fixture(autouse=True)
def progress_bars():
    yield
    # A grid sets it for the processes that it starts.
    os.environ.pop("TQDM_DISABLE", None)
