"""A few hundred mutants a reader; `make fuzz` tries 100,000 and makes what it finds small."""

import pytest
from fuzz import READERS, attempt, ready, tries


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_read_or_refused_by_name(name, tmp_path):
    with ready(name, tmp_path) as path:
        for seed in READERS[name].seeds:
            assert attempt(READERS[name], path, seed) == ("accepted", "")
    result = tries(name, range(300), seed=1, folder=tmp_path)
    assert not result["findings"]
    assert result["accepted"] + result["refused"] == 300
