"""Mutated files into every reader: each must give a normal result or its documented error.

    python tests/fuzz.py --count 100000          # `make fuzz`, minutes
    python tests/fuzz.py --count 2000 --only bio checkpoint

A mutant is a small valid file after one to three changes: of bytes, of lines and columns, or of the
nodes of its JSON. Accepted: what was read is sound (a label a word, heads a tree, spans inside, the
transformations undone; of a checkpoint, exactly the state that was saved last or before). Refused:
a ValueError of one line that names the file. All else is a finding: another exception, an unsound
result, more than 5 s of CPU for one file. Each is printed once, with the smallest file found that
shows it again, and makes the exit status 1. The same --seed and --count make the same files.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import alignmlm
import eval as evaluation
import synth_lang
import train

SECONDS = 5  # of CPU; a file that takes longer hangs
CHUNK = 500  # files that one task tries
MEMORY = 1 << 30  # bytes that it may take beyond what the process has: no file here needs them

# ------------------------------------------------------------------------------------- mutations

BYTES = [bytes([n]) for n in (0, 9, 10, 13, 32, 34, 45, 92, 255)] + [b"\xc3", b"\xed\xa0\x80"]
BYTES += [s.encode() for s in ("\u2028", "\x85", "\ufeff", "\r\n", "\n\n", "\U0001d7d9", "\u0301")]
NUMBERS = [*b"0 -1 1.5 00 +1 1e9 nan inf 2147483648 99999999999999999999".split(), b"7" * 400]
DEEP = 3000  # levels, beyond what Python descends
JSON = rb'null true [] {} [[]] -1 0 1 0.5 1e400 NaN "x" "" "\ud800" "a\nb\u2028\u0000" {"x":1}'
JSON = [*JSON.split(), b"2147483648", b"9" * 400, b"9" * 5000]
JSON += [b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP]


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, insert, delete, repeat, cut."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 1, 4, 40))
    end, byte = at + rng.randint(1, size), rng.randrange(256)
    middle = rng.choice((b"", data[at:end] * 2, rng.choice(BYTES), rng.choice(BYTES), None))
    if middle is None:
        middle, end = bytes([byte]), at + 1
    if rng.random() < 0.003:  # long enough to tell quadratic time
        middle = (data[at:end] * 20_000)[:20_000]
    return data[:at] + (b"" if rng.random() < 0.05 else middle + data[end:])


def change_number(rng: random.Random, data: bytes) -> bytes:
    places = [found.span() for found in re.finditer(rb"[0-9]+", data)] or [(0, 0)]
    start, end = rng.choice(places)
    return data[:start] + rng.choice(NUMBERS) + data[end:]


def change_lines(rng: random.Random, data: bytes) -> bytes:
    """Drop, repeat, swap, cut."""
    lines = data.splitlines(keepends=True) or [b""]
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    cut = lines[i][: len(lines[i]) // 2]
    lines[i : i + 1] = rng.choice(([], [lines[i]] * 2, [lines[j]], [cut]))
    return b"".join(lines)


def change_columns(rng: random.Random, data: bytes) -> bytes:
    """Drop, repeat, swap or replace one of a line."""
    lines = data.split(b"\n")
    line = rng.randrange(len(lines))
    columns = re.split(rb"([\t ])", lines[line])
    i, j = (2 * rng.randrange(len(columns) // 2 + 1) for _ in range(2))
    new = rng.choice(([], columns[i : i + 2] * 2, [columns[j]], [rng.choice(BYTES)]))
    columns[i : i + rng.randint(1, 2)] = new
    lines[line] = b"".join(columns)
    return b"\n".join(lines)


def change_json(rng: random.Random, data: bytes) -> bytes:
    """A node is replaced, dropped or repeated; of a file of lines, in one of them."""
    try:
        tree, lines, at = json.loads(data), [data], 0
    except (ValueError, RecursionError):  # JSONL, or JSON no more
        lines = data.splitlines(keepends=True)
        at = rng.randrange(len(lines) or 1)
        try:
            tree = json.loads(lines[at])
        except (ValueError, RecursionError, IndexError):
            return change_bytes(rng, data)
    places = []  # (list or dict, index)
    todo = [tree] if isinstance(tree, list | dict) else []
    for node in todo:
        keys = node if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        todo += [node[key] for key in keys if isinstance(node[key], list | dict)]
    if not places or rng.random() < 0.02:
        new = rng.choice(JSON)
    else:
        (node, key), deed, new = rng.choice(places), rng.random(), rng.choice(JSON)
        if deed < 0.15:
            del node[key]
        elif deed < 0.25 and isinstance(node, list):
            node.insert(key, node[key])
        elif deed < 0.35 and isinstance(node, dict):
            node[rng.choice(("", "x", "\ud800", key + "x"))] = node.pop(key)
        elif deed < 0.45:
            node[key] = rng.choice(places)[1]  # a key or a number from elsewhere
        else:
            node[key] = "\0new"
        new = json.dumps(tree).encode().replace(b'"\\u0000new"', new)
    end = b"\n" if lines[at : at + 1] and lines[at].endswith(b"\n") else b""
    return b"".join([*lines[:at], new + end, *lines[at + 1 :]])


def change_header(rng: random.Random, data: bytes) -> bytes:
    """Of a safetensors file: its length of 8 bytes, and the JSON of that length."""
    size = int.from_bytes(data[:8], "little")
    change = rng.choice((change_json, change_json, change_number, change_bytes))
    header = change(rng, data[8 : 8 + size])
    if rng.random() < 0.1:
        kinds = b"F16 BF16 F64 I32 U32 I64 U8 BOOL C64 F8_E4M3 F4".split()
        header = header.replace(b"F32", rng.choice(kinds), 1)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


TEXT = change_bytes, change_number, change_lines, change_columns
DOCUMENT = change_json, change_json, change_bytes, change_number
TENSORS = change_header, change_header, change_bytes

# --------------------------------------------------------------------------------------- readers


@dataclass
class Reader:
    """read(file) reads a mutant of one of the seeds, and asserts that what it got is sound."""

    seeds: tuple[bytes, ...]
    mutations: tuple[Callable, ...]
    read: Callable[[Path], None]
    file: str  # its name
    beside: dict[str, bytes] = field(default_factory=dict)  # other files that it needs
    share: float = 1.0  # of --count


CONLLU = b"""# sent_id = 1
1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_
1\tde\t_\tADP\t_\t_\t3\tcase\t_\t_
2\tle\t_\tDET\t_\tX=1\t3\tdet\t_\t_
3\tmot\t_\tNOUN\t_\t_\t4\tnsubj\t_\t_
3.1\tva\t_\tVERB\t_\t_\t_\t_\t_\t_
4\tva\t_\tVERB\t_\t_\t0\troot\t_\tSpaceAfter=No
5\t.\t_\tPUNCT\t_\t_\t4\tpunct\t_\t_

# sent_id = 2
1\tGo\tgo\tVERB\t_\t_\t0\troot\t_\t_

"""
BIO = (
    b"# id = 1\n1\tAnn\tB-PER\t-\n2\tLee\tI-PER\t-\n3\tleft\tO\t-\n\n1\tYork\tI-LOC\t-\n\n",
    b"-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n. . O O\n\nBonn B-LOC\n",
)


def check_sentence(sentence: synth_lang.Sentence) -> None:
    """A label a word, heads a tree, spans inside; and all transformations can be undone."""
    words = sentence.words
    " ".join(words).encode()  # fails at half of a surrogate pair
    labels = sentence.upos, sentence.heads, sentence.deprels, sentence.entities
    assert all(row is None or len(row) == len(words) for row in labels), "not a label a word"
    assert all(0 <= start < end <= len(words) for start, end in sentence.spans), "a span outside"
    names = ["transliterate", "invert", "permute"]
    if sentence.heads is not None:
        for head in sentence.heads:
            for _ in words:
                head = head and sentence.heads[head - 1]
            assert head == 0, "not a tree"
        names.append("syntax")
    moved, steps = synth_lang.transform(sentence, names)
    assert synth_lang.invert(moved, steps) == sentence, "not undone"


def read_sentences(reader: Callable) -> Callable[[Path], None]:
    return lambda path: [check_sentence(sentence) for sentence in reader(path)] and None


PAIR = {"premise": "A man, 40.", "hypo": "It's \"so\".", "label": "contradictory"}
XNLI = {"sentence1": "A cat.", "sentence2": "No!", "gold_label": "neutral", "language": "en"}
NLI = (
    b"premise\thypo\tlabel\nA man, 40.\tIt's \"so\".\tcontradictory\nOne.\tTwo.\tentailment\n",
    b"language\tgold_label\tsentence1\tsentence2\nen\t-\tA.\tB.\nfr\tx\tA\tB\n"
    b"en\tneutral\tA.\tB.\n",
    b"".join(json.dumps(row).encode() + b"\n" for row in (XNLI, PAIR, XNLI | {"gold_label": "-"})),
)
ANSWERS = [{"text": "Dr. Lee", "answer_start": 0}, {"text": "one. Two", "answer_start": 12}]
QUESTIONS = [
    {"id": "1", "question": "Who saw?", "answers": ANSWERS},
    {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
]
SQUAD = {"data": [{"paragraphs": [{"context": "Dr. Lee saw one. Two left.", "qas": QUESTIONS}]}]}


def read_pairs(path: Path) -> None:
    for pair in synth_lang.read_inferences(path):
        check_sentence(pair.premise)
        check_sentence(pair.hypothesis)
        assert pair.label in synth_lang.INFERENCES, "an unknown label"
        assert pair.premise.words and pair.hypothesis.words, "no words"


def read_answers(path: Path) -> None:
    for question in synth_lang.read_questions(path):
        for sentence in (question.question, *question.context):
            check_sentence(sentence)
            assert sentence.words, "no words"
        assert any(sentence.spans for sentence in question.context), "no answer"


SETTINGS = alignmlm.Settings(
    objective="mlm", vocab_size=12, layers=1, width=16, heads=1, feed_forward=4, positions=8,
    tune_length=8, dropout=0.0,
)  # fmt: skip
LOG = b"".join(b'{"step": %d, "loss": 1.5, "mlm": null}\n' % step for step in (10, 20, 30))
RECORD = train.record_of(SETTINGS, train.Source(sentences=1500))


def read_settings(path: Path) -> None:
    """As the same command finds them again."""
    train.refuse_other(path, RECORD)


def read_run(path: Path) -> None:
    """As eval.py finds them, but without reading the weights and the tokenizer."""
    model, pieces = evaluation.from_hf, train.sentencepiece
    evaluation.from_hf = lambda *_: None
    train.sentencepiece = argparse.Namespace(SentencePieceProcessor=lambda model_file: None)
    try:
        evaluation.read_run(path.parent)
    finally:
        evaluation.from_hf, train.sentencepiece = model, pieces


def read_log(path: Path) -> None:
    """As a run that goes on after step 20 does."""
    train.open_log(path, 20).close()


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """As small a model as there is, after a step of its optimizer."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(2, 1)
    optimizer = train.make_optimizer(model, SETTINGS)
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def state(model, optimizer) -> list[bytes]:
    rows = [optimizer.state[p] | {"weight": p.detach()} for p in model.parameters()]
    return [row[kind].numpy().tobytes() for row in rows for kind in sorted(row)]


SAVED = {step: state(*trained(step)) for step in (1, 2)}
FRESH = trained(3)  # to load into, forgotten each time: another would take a millisecond


def read_checkpoint(path: Path) -> None:
    """Step 2's is the mutant; beside it lies step 1's, whole. Either's state, to the bit."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        model, optimizer = FRESH
        optimizer.state.clear()
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        found = train.load_checkpoint(path.parent, model, optimizer)
    assert found in ((1, 1), (2, 2)), f"went on from {found}"
    assert state(*FRESH) == SAVED[found[0]], "altered"
    said = errors.getvalue()
    assert said.splitlines() == said.split("\n")[:-1], f"more than a line: {said!r}"
    if found[0] == 1:
        raise ValueError(said)  # which names the file: `refused`
    assert not said, f"says {said!r}"


def read_model(path: Path) -> None:
    model = alignmlm.from_hf(path.parent)
    model.logits(torch.zeros(1, model.settings.width))


CELL = {
    "task": "pos", "objective": "mlm", "transform": "invert", "seed": 0, "source": 90.0, "BS": 90.0,
    "BZ": 80.5, "Delta": -9.5, "BZ rotated": 81.5,
    "alignment": {"all": 1.5, "outside": None, "outside rotated": 2.5},
    "other measures": {}, "files": [None, None], "seconds": 3.0, "settings": RECORD["settings"],
    "text": {},
}  # fmt: skip


def read_cell(path: Path) -> None:
    (cell,) = evaluation.read_cells(path.parents[1])
    evaluation.table(cell["task"], [cell])


def read_undo(path: Path) -> None:
    """`synth_lang.py invert` itself: status 0, or 2 and one line that names the file."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = synth_lang.main(["invert", str(path.with_suffix("")), "-o", str(path) + ".back"])
    if status:
        raise synth_lang.InputError(errors.getvalue().removesuffix("\n"))


def written(write: Callable[[Path], None]) -> dict[str, bytes]:
    """The files that it makes in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def derive(folder: Path) -> None:
    (folder / "first.conllu").write_bytes(CONLLU)
    assert not synth_lang.main(["transform", f"{folder}/first.conllu", "-o", f"{folder}/b.conllu"])


def save(folder: Path) -> None:
    for step in (1, 2):
        train.save_checkpoint(folder, step, step, *trained(step))


def readers() -> dict[str, Reader]:
    derived, saved = written(derive), written(save)
    model = written(lambda folder: alignmlm.to_hf(alignmlm.MaskedLM(SETTINGS), folder))
    last, text = max(saved), b"Mr. A. B. left...  Why?\n\n\"No!\" 3.5 so...on -- don't\n"

    record = (json.dumps(RECORD, indent=2).encode(),)

    def whole(files: dict[str, bytes], name: str, *rest, **more) -> Reader:
        return Reader((files[name],), *rest, file=name, beside=files, **more)

    return {
        "text": Reader((text,), TEXT, read_sentences(synth_lang.read_text), "a.txt"),
        "CoNLL-U": Reader((CONLLU,), TEXT, read_sentences(synth_lang.read_conllu), "a.conllu"),
        "BIO": Reader(BIO, TEXT, read_sentences(synth_lang.read_bio), "a.bio"),
        "NLI": Reader(NLI, TEXT + DOCUMENT, read_pairs, "a.tsv"),
        "SQuAD": Reader((json.dumps(SQUAD).encode(),), DOCUMENT, read_answers, "a.json"),
        "undo": whole(derived, "b.conllu.undo", DOCUMENT, read_undo),
        "settings.json, train.py": Reader(record, DOCUMENT, read_settings, "settings.json"),
        "settings.json, eval.py": Reader(record, DOCUMENT, read_run, "settings.json"),
        "log.jsonl": Reader((LOG,), DOCUMENT, read_log, "log.jsonl"),
        "checkpoint": whole(saved, last, TENSORS, read_checkpoint),
        "config.json": whole(model, "config.json", DOCUMENT, read_model, share=0.1),
        "model.safetensors": whole(model, "model.safetensors", TENSORS, read_model, share=0.1),
        "pos.json": Reader((json.dumps(CELL).encode(),), DOCUMENT, read_cell, "run/pos.json"),
    }


# ---------------------------------------------------------------------------------------- trials


class Hang(BaseException):
    """Nothing catches it."""


def hang(*_):
    raise Hang


def attempt(reader: Reader, path: Path, data: bytes) -> tuple[str, str]:
    """`accepted`, `refused` or the kind of finding; and what was said."""
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reader.read(path)
        return "accepted", ""
    except (Exception, Hang) as caught:
        error = caught
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    said = str(error)
    if not isinstance(error, synth_lang.InputError):
        said = " ".join(said.split())  # by train.guarded; an InputError is one line by itself
    if isinstance(error, ValueError) and str(path.parent) in said and len(said.splitlines()) == 1:
        return "refused", said
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).parent == Path(train.__file__).parent] or frames
    last = ours[0 if isinstance(error, Hang) else -1]  # where it is interrupted is chance
    kind = type(error).__name__ + (f" {said}" if isinstance(error, AssertionError) else "")
    return f"{kind[:40]} at {Path(last.filename).name}:{last.lineno} {last.name}", said


@contextlib.contextmanager
def ready(name: str, folder: Path) -> Iterator[Path]:
    """Where the mutants go, in a folder of this process; memory and time limited meanwhile."""
    path = folder / f"{name}-{os.getpid()}" / READERS[name].file
    path.parent.mkdir(parents=True, exist_ok=True)
    for other, content in READERS[name].beside.items():
        (path.parent / other).write_bytes(content)
    before, limit = signal.signal(signal.SIGPROF, hang), resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, limit[1]))
    try:
        yield path
    finally:
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, limit)


def tries(name: str, numbers: range, seed: int, folder: Path) -> dict:
    """These mutants; of each kind of finding its count, the smallest mutant and what was said."""
    reader, result = READERS[name], {"accepted": 0, "refused": 0, "findings": {}, "slowest": 0.0}
    clock = time.perf_counter()
    with ready(name, folder) as path:
        for number in numbers:
            rng = random.Random(f"{seed} {name} {number}")
            data = rng.choice(reader.seeds)
            for _ in range(rng.choice((1, 1, 2, 3))):
                data = rng.choice(reader.mutations)(rng, data)
            began = time.perf_counter()
            verdict, said = attempt(reader, path, data)
            result["slowest"] = max(result["slowest"], time.perf_counter() - began)
            if verdict in result:
                result[verdict] += 1
            else:
                found = {"findings": {verdict: (1, data, said)}}
                result["findings"] = merged(result, found)["findings"]
    return result | {"seconds": time.perf_counter() - clock}


def merged(one: dict, other: dict) -> dict:
    """Of two results of `tries` one; what the second lacks is the first's."""
    both = one | {"findings": dict(one["findings"])}
    for key in ("accepted", "refused", "seconds"):
        both[key] = one.get(key, 0) + other.get(key, 0)
    both["slowest"] = max(one.get("slowest", 0), other.get("slowest", 0))
    for verdict, new in other["findings"].items():
        old = both["findings"].get(verdict, (0, *new[1:]))
        both["findings"][verdict] = old[0] + new[0], *min(old[1:], new[1:], key=lambda x: len(x[0]))
    return both


def shrink(name: str, finding: str, data: bytes, folder: Path) -> bytes:
    """Smaller while the finding stays, for 20 s: large pieces are left out, then smaller ones."""
    until, size = time.monotonic() + 20, len(data) // 2
    with ready(name, folder) as path:
        while size:
            at = 0
            while at < len(data) and time.monotonic() < until:
                less = data[:at] + data[at + size :]
                if attempt(READERS[name], path, less)[0] == finding:
                    data = less
                else:
                    at += size
            size //= 2
    return data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="files a reader (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    args = parser.parse_args()
    results, began, context = {}, time.monotonic(), multiprocessing.get_context("fork")
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory))
    try:
        with ProcessPoolExecutor(args.jobs, context) as pool, tqdm(unit=" files") as bar:
            tasks = []
            for name in args.only:
                numbers = range(round(args.count * READERS[name].share))
                bar.total = (bar.total or 0) + len(numbers)
                for first in numbers[::CHUNK]:
                    part = numbers[first : first + CHUNK]
                    task = pool.submit(tries, name, part, args.seed, folder)
                    tasks.append((name, len(part), task))
            for name, size, task in tasks:
                new = task.result()
                results[name] = merged(results[name], new) if name in results else new
                bar.update(size)
            smallest = {
                (name, finding): pool.submit(shrink, name, finding, data, folder)
                for name, result in results.items()
                for finding, (_, data, _) in result["findings"].items()
            }
    except BrokenProcessPool:
        print(f"a process died; the file that it was reading is below {folder}")
        return 1
    shutil.rmtree(folder)
    print("| reader | inputs | accepted | refused | findings | seconds | slowest ms |")
    print("| --- " + "| ---: " * 6 + "|")
    for name, result in results.items():
        found = [times for times, *_ in result["findings"].values()]
        counts = result["accepted"], result["refused"], sum(found)
        kinds = f" of {len(found)} kinds" if found else ""
        row = [name, *(f"{n:,}" for n in (sum(counts), *counts))]
        row[-1] += kinds
        print("|", " | ".join(row), f"| {result['seconds']:.0f} | {1000 * result['slowest']:.0f} |")
    for (name, finding), task in smallest.items():
        times, _, said = results[name]["findings"][finding]
        print(f"\n{name}: {finding}, {times} times: {said[:300]!r}")
        print(f"    {len(task.result())} bytes: {task.result()[:500]!r}")
    print(f"\nseed {args.seed}, {args.jobs} processes, {time.monotonic() - began:.0f} s")
    return 1 if smallest else 0


torch.set_num_threads(1)
READERS = readers()

if __name__ == "__main__":
    sys.exit(main())
