"""What the README says of the files and of the results is what they are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_table_is_the_one_that_the_report_wrote():
    report = (ROOT / "results/tiny/report.md").read_text()
    assert report.strip() in README


def test_every_row_of_results_is_one_that_a_report_wrote():
    written = "".join(path.read_text() for path in ROOT.glob("results/*/report.md"))
    for text in (README, (ROOT / "RESULTS.md").read_text()):
        rows = re.findall(r"^\| (?:transliterate|invert|permute|syntax).*$", text, re.MULTILINE)
        assert len(rows) >= 8
        for row in rows:
            assert row in written, row


def test_every_file_of_the_map_has_about_as_many_lines_as_it_says():
    rows = re.findall(r"^\| \[([\w/]+\.py)\].*?\| (\d+) \|", README, re.MULTILINE)
    assert len(rows) == 8
    for name, lines in rows:
        assert abs(len((ROOT / name).read_text().splitlines()) - int(lines)) <= 20, name


def test_every_link_leads_to_a_file():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
