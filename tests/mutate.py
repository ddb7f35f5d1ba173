"""Break the product in one place at a time, and see that the tests notice.

    python tests/mutate.py            # all mutants, in about twenty minutes on two cores
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
MUTANTS = [  # the file, what stands there once, and what is put in its place
    ("alignmlm.py", "drawn[tokens < SPECIALS] += 1", "drawn[tokens < PAD] += 1"),
    ("alignmlm.py", "fate < 0.8", "fate < 0.7"),
    ("alignmlm.py", "s.shift * of_derived", "0 * of_derived"),
    ("alignmlm.py", "translation[dictionary] = dictionary[:, ::-1]", "translation[dictionary] = dictionary"),
    ("alignmlm.py", "batch.masked[row, column]] ^= 1", "column] ^= 1"),
    ("alignmlm.py", "return model.settings.alpha * kernels", "return kernels"),
    ("alignmlm.py", "self.attention_norm(hidden + F.dropout(mixed, p))", "self.attention_norm(F.dropout(mixed, p))"),
    ('alignmlm.py', '"outside": aligned[~known]', '"outside": aligned'),
    ("alignmlm.py", "(0, 0, HF_UNUSED_POSITIONS, 0)", "(0, 0, 0, HF_UNUSED_POSITIONS)"),
    ("alignmlm.py", "ids < SPECIALS, ids", "ids < UNK, ids"),
    ("train.py", "if index // BLOCK % 2 == 0:", "if index // BLOCK % 3 == 0:"),
    ("train.py", "cut <= max(2, cut.min())", "cut <= 9"),
    ("train.py", "np.random.default_rng([s.seed, step])", "np.random.default_rng([step])"),
    ("train.py", "2.0315 * gram @ gram", "2.5 * gram @ gram"),
    ('train.py', '{"params": vectors, "weight_decay": 0.0}', '{"params": vectors}'),
    ("train.py", "torch.manual_seed(hash((s.seed, step, RANK)))", "torch.manual_seed(hash((s.seed, start, RANK)))"),
    ("train.py", "min(rising, 1, falling)", "min(rising, 1)"),
    ("train.py", "made.chmod(0o755)", "made.chmod(0o700)"),
    ("eval.py", "get_entities(gold)), set", "get_entities(sum(gold, []))), set"),
    ("eval.py", "return 200 * len", "return 100 * len"),
    ('eval.py', 'cell["BZ"] = measure(zero_shot, task, test_rows[1], names)', 'cell["BZ"] = measure(supervised, task, test_rows[1], names)'),
    ('eval.py', 'cell["BZ"] - cell["BS"]', 'cell["BS"] - cell["BZ"]'),
    ("eval.py", "[label] + [None] * (len(ids) - 1)", "[None] * (len(ids) - 1) + [label]"),
    ("eval.py", "requires_grad_(not s.freeze_embeddings)", "requires_grad_(True)"),
    ("synth_lang.py", "places.append(places.pop(0))", "places.append(places.pop())"),
    ('synth_lang.py', 'prefix = "I" if numbers[old] == last else "B"', 'prefix = "I" if numbers[old] >= last else "B"'),
    ("synth_lang.py", "[new[head] for head in moved.heads]", "[head for head in moved.heads]"),
    ("synth_lang.py", "in reversed(steps)", "in steps"),
    ('synth_lang.py', 'random.Random(f"{seed}/{index}")', 'random.Random(f"{seed}")'),
    ("synth_lang.py", "sorted(family, key=lambda word: -points[family[word]])", "sorted(family, key=lambda word: points[family[word]])"),
    ("synth_lang.py", "chr(0x2800 + byte)", "chr(0x2800 + byte % 128)"),
    ("kernels/alignment.py", "gradient + j * D + d, (cosine * unit_j - unit_i)", "gradient + j * D + d, (cosine * unit_j + unit_i)"),
    ("kernels/alignment.py", "tl.maximum(tl.sum(row_j * row_j, axis=0), 1e-16)", "tl.maximum(tl.sum(row_j * row_j, axis=0), 1e-2)"),
    ("kernels/masked_softmax.py", "label_logits[chunk] - offsets, sums", "label_logits[chunk], sums"),
    ("kernels/masked_softmax.py", "total += tl.load(dbias + v", "total = tl.load(dbias + v"),
    ("kernels/masked_softmax.py", "rounded_off[chunk] = scale * (-others - at_label)", "rounded_off[chunk] = 0.0"),
]

def run(number):
    """Whether the tests notice a mutant."""
    name, before, after = MUTANTS[number]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        left_out = shutil.ignore_patterns(".git", ".venv", "runs", "results")
        shutil.copytree(ROOT, copy, ignore=left_out)
        text = (copy / name).read_text()
        if text.count(before) != 1:
            raise ValueError(f"{name}: {before!r} stands there {text.count(before)} times")
        (copy / name).write_text(text.replace(before, after))
        command = [sys.executable, "-m", "pytest", "-x", "-q", *TESTS[name]]
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
