"""What the README and RESULTS.md say of files and of results is what these are."""

import json
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "RESULTS.md").read_text()
LABELS = {"MLM": "mlm", "XLM": "xlm", "DICT-MLM": "dict", "ALIGN-MLM": "align"}

def test_the_table_of_the_readme_is_what_the_results_give():
    cells = json.loads((ROOT / "results/tiny/results.json").read_text())
    rows = re.findall(r"^\| ((?:\w+-)?MLM|XLM) \| (.*) \|$", README, re.MULTILINE)
    assert [label for label, _ in rows] == list(LABELS)
    for label, row in rows:
        same = [cell for cell in cells if cell["objective"] == LABELS[label]]
        assert len(same) >= 2
        columns = ("source", "BS", "BZ", "alignment outside")
        for name, text in zip(columns, row.split(" | "), strict=True):
            values = [cell[name] for cell in same]
            assert text == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}", (label, name)

def test_every_row_of_results_is_one_that_a_report_wrote():
    written = "".join(path.read_text() for path in ROOT.glob("results/*/report.md"))
    written = re.sub(r" +", " ", written)
    for row in re.findall(r"^\| (?:transliterate|invert|permute|syntax).*$", RESULTS, re.MULTILINE):
        assert re.sub(r" +", " ", row) in written, row

def test_the_texts_keep_their_lengths_and_the_map_its_lines():
    assert len(README.splitlines()) <= 220 and len(RESULTS.splitlines()) <= 250
    rows = re.findall(r"^\| \[([\w/\\]+\.py)\].*?\| (\d+) \|", README, re.MULTILINE)
    assert len(rows) == 8
    for name, lines in rows:
        path = ROOT / name.replace("\\", "")
        assert abs(len(path.read_text().splitlines()) - int(lines)) <= 20, name

def test_every_link_leads_to_a_file():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README + RESULTS):
        assert (ROOT / path).exists(), path
