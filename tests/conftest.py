"""For all tests: command lines in this process, real data, hypothesis without a time limit."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

import synth_lang

# A busy machine would not keep a time limit.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

def messages(stderr):
    """The lines that are no progress bar."""
    lines = re.split(r"[\r\n]+", stderr)
    return [line for line in lines if line.strip() and not re.search(r"it/s|\?it|s/it", line)]

@pytest.fixture
def command(monkeypatch, capfd):
    """Runs train.py or eval.py in this process; it may end with status 2. Returns .out, what it
    prints, and .messages."""

    def call(module, *arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, arguments)])
        try:
            synth_lang.guarded(module.main)
        except SystemExit as left:
            assert left.code == 2
        printed = capfd.readouterr()
        return SimpleNamespace(out=printed.out, messages=messages(printed.err))

    yield call
    # A grid switches progress bars off, for the processes that it starts.
    os.environ.pop("TQDM_DISABLE", None)

@pytest.fixture(scope="session")
def real_data():
    """The folder of published files, which is not part of the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.exists():
        pytest.skip("no real data is on this machine")
    return folder
