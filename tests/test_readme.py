"""What the README and RESULTS.md say of files and of results is what these are."""

import json
import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "RESULTS.md").read_text()
LABELS = {"MLM": "mlm", "XLM": "xlm", "DICT-MLM": "dict", "ALIGN-MLM": "align"}

def test_the_tables_of_the_readme_are_what_the_results_give():
    tables = re.findall(r"<!-- (\S+\.json) -->(.*?)<!-- end -->", README, re.DOTALL)
    for path, table in tables:
        cells = json.loads((ROOT / path).read_text())
        for label, objective in LABELS.items():
            row = [label]
            for name in ("source", "BS", "BZ", "alignment outside"):
                values = [cell[name] for cell in cells if cell["objective"] == objective]
                row.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}")
            assert f"| {' | '.join(row)} |" in table
    assert len(tables) == 2

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
