"""Break the product in one place at a time, and see that the tests notice.

    python tests/mutate.py            # all mutants, in about MINUTES minutes on two cores
    python tests/mutate.py train.py   # those of one file

A mutant is a line of the product with one thing changed. Each is put into a copy of the project, in
which the tests of its file then run until the first one fails. It prints a line a mutant, and how
many of them were noticed; the exit status is 1 if any was not.
"""

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {
    "alignmlm.py": ["tests/test_alignmlm.py"],
    "train.py": ["tests/test_train.py"],
    "eval.py": ["tests/test_eval.py"],
    "synth_lang.py": ["tests/test_synth_lang.py", "tests/test_readers.py"],
    "kernels/alignment.py": ["tests/test_kernels.py"],
    "kernels/masked_softmax.py": ["tests/test_kernels.py"],
}
MUTANTS = [  # file, what stands there once, what is put in its place
]


def run(number):
    """Whether the tests notice a mutant."""
    name, before, after = MUTANTS[number]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "results"))
        text = (copy / name).read_text()
        if text.count(before) != 1:
            raise ValueError(f"{name}: {before!r} stands there {text.count(before)} times")
        (copy / name).write_text(text.replace(before, after))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS[name]]
        return subprocess.run(command, cwd=copy, capture_output=True).returncode == 1


def main():
    chosen = [n for n, mutant in enumerate(MUTANTS) if mutant[0] in (sys.argv[1:] or TESTS)]
    with ThreadPoolExecutor(2) as pool:
        noticed = list(pool.map(run, chosen))
    for number, red in zip(chosen, noticed, strict=True):
        name, before, after = MUTANTS[number]
        print(f"{'noticed' if red else 'MISSED '}  {name}: {before} -> {after}")
    print(f"{sum(noticed)} of {len(noticed)} mutants were noticed")
    return not all(noticed)


if __name__ == "__main__":
    sys.exit(main())
