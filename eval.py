"""Fine-tune a pre-trained model in one language, test it in both, and report.

    python eval.py pos runs/align         one task (pos, ner, nli, qa) and the alignment of one run
    python eval.py curve runs/align       POS and alignment along its pre-training (--keep-every)
    python eval.py grid --out runs/tiny   every objective, transformation and seed, then the report
    python eval.py report runs/tiny       tables, figures and results.json of those runs

The measures are the paper's. BZ, bilingual zero-shot: fine-tuned on the original language, tested
on the derived one. BS, bilingual supervised: fine-tuned and tested on the derived one. Delta =
BZ - BS is what zero-shot costs. "source": fine-tuned and tested on the original. "BZ rotated": BZ
with the derived words turned onto the original ones (`alignmlm.rotate`).
"""

import argparse
import copy
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.special import log_softmax
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import synth_lang
import train
from alignmlm import BOS, DAMAGE, EOS, OBJECTIVES, PAD, MaskedLM, Settings
from alignmlm import alignment_score, from_hf, make_dictionary, preset, rotate, write_text
from train import Languages, Source, make_optimizer, prepare

SCORES = ("source", "BS", "BZ", "Delta", "BZ rotated")
ALIGNMENTS = ("all", "outside", "outside rotated")
NAMES = {"mlm": "MLM", "xlm": "XLM", "dict": "DICT-MLM", "align": "ALIGN-MLM"}

# The paper's numbers, English: (transformation, objective) -> BS and BZ of NLI (accuracy), of NER
# (entity F1) and of POS (F1), then alignment; all in percent.
PUBLISHED_COLUMNS = ("NLI BS", "NLI BZ", "NER BS", "NER BZ", "POS BS", "POS BZ", "alignment")
PUBLISHED = {
    ("transliterate", "mlm"): (76.4, 74.9, 80.6, 78.0, 95.0, 94.6, 90.0),
    ("transliterate+invert", "mlm"): (73.9, 56.7, 79.2, 35.9, 95.0, 56.5, 0.3),
    ("transliterate+syntax", "mlm"): (73.5, 69.0, 71.3, 52.3, 93.6, 91.6, 57.3),
    ("transliterate", "xlm"): (77.3, 77.5, 80.8, 79.7, 95.0, 94.8, 97.7),
    ("transliterate+invert", "xlm"): (75.4, 67.2, 80.0, 60.7, 95.0, 61.8, 85.6),
    ("transliterate+syntax", "xlm"): (76.1, 74.1, 71.5, 59.6, 93.7, 92.7, 98.6),
    ("transliterate", "dict"): (77.0, 75.9, 79.3, 78.3, 95.1, 94.8, 95.7),
    ("transliterate+invert", "dict"): (74.5, 65.3, 79.1, 59.8, 95.0, 76.0, 64.2),
    ("transliterate+syntax", "dict"): (74.3, 72.2, 71.4, 57.6, 93.6, 92.6, 93.7),
    ("transliterate", "align"): (75.1, 75.5, 79.4, 78.6, 94.9, 94.8, 98.4),
    ("transliterate+invert", "align"): (75.5, 68.8, 80.0, 64.5, 95.0, 92.0, 95.2),
    ("transliterate+syntax", "align"): (74.7, 71.1, 71.3, 58.3, 93.7, 92.9, 98.2),
}

# --------------------------------------------------------------------------------------- tasks
# A task makes rows of its examples and says what the head is to say at which token. POS tagging
# is the plainest; the others differ from it in a method or two.

SILENT = -100  # the label where the head's word does not count


class Row(NamedTuple):
    """An example, or a window of one, as the encoder reads it."""

    tokens: np.ndarray  # (T,) int64, BOS ... EOS
    labels: np.ndarray  # (T,) int64, SILENT where nothing is asked
    answer: tuple = ()  # of QA: the question's number, the words at the labels, the right answers


class Side(NamedTuple):
    """One of the two languages, into which examples are put."""

    languages: Languages
    derived: bool
    length: int  # ids in a row, at most

    def encode(self, sentence: synth_lang.Sentence, index: int):
        """The sentence in this language, and the ids of each of its words."""
        if self.derived:
            sentence = self.languages.derive(sentence, index)
        return sentence, self.languages.encode(sentence.words, self.derived)


class Pos:
    """A tag for each word, said at its first sub-word; what is beyond the row's end is left out."""

    measures = ("accuracy",)  # in percent; with one tag a word also the micro-F1
    generate, read = map(staticmethod, (synth_lang.generate, synth_lang.read_conllu))
    built_in = 6_000, 1_000  # of the built-in language, examples to learn from and to test on

    def __init__(self, examples: list):
        """examples: those to learn from, which have all the labels that there are."""
        self.names = sorted({name for example in examples for name in self.labels_of(example)})

    @staticmethod
    def labels_of(sentence) -> list[str]:
        return sentence.upos

    def rows(self, sentence, index: int, side: Side) -> Iterator[Row]:
        sentence, words = side.encode(sentence, index)
        tokens, labels = [BOS], [SILENT]
        for name, word in zip(self.labels_of(sentence), words, strict=True):
            tokens += word
            labels += [self.names.index(name)] + [SILENT] * (len(word) - 1)
        cut = slice(side.length - 1)
        yield Row(np.array([*tokens[cut], EOS]), np.array([*labels[cut], SILENT]))

    def loss(self, logits, labels):
        """Of logits (B, T, names) and labels (B, T) int64."""
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=SILENT)

    def score(self, rows: list[Row], logits: list[np.ndarray]) -> tuple[float, ...]:
        """The measures, of logits (T, names) for each row."""
        pairs = zip(rows, logits, strict=True)
        right = [(x.argmax(-1) == row.labels)[row.labels != SILENT] for row, x in pairs]
        return (100 * float(np.concatenate(right).mean()),)


class Ner(Pos):
    """Named entities in BIO tags."""

    measures = ("F1",)  # of whole entities, as CoNLL-2003 and seqeval count
    read = staticmethod(synth_lang.read_bio)

    @staticmethod
    def labels_of(sentence) -> list[str]:
        return sentence.entities

    def score(self, rows, logits):
        both = all_of_them = 0
        for row, x in zip(rows, logits, strict=True):
            asked = row.labels != SILENT
            gold, found = (
                entities([self.names[i] for i in labels[asked]])
                for labels in (row.labels, x.argmax(-1))
            )
            both += len(gold & found)
            all_of_them += len(gold) + len(found)
        return (200 * both / all_of_them if all_of_them else 0.0,)


def entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """(type, first word, last word + 1) of the entities in BIO tags, well-formed or not.

    An `I-` that continues nothing of its type begins an entity, as in the CoNLL-2003 scorer.
    """
    found, start = set(), 0
    for place, (last, tag) in enumerate(itertools.pairwise(["O", *tags, "O"])):
        if tag[0] == "B" or tag[2:] != last[2:]:
            if last != "O":
                found.add((last[2:], start, place))
            start = place
    return found


class Nli(Pos):
    """Does the premise entail the hypothesis? Said at BOS of BOS premise EOS hypothesis EOS."""

    built_in = 40_000, 1_000  # 6,000 are learnt by heart
    generate = staticmethod(synth_lang.generate_inferences)
    read = staticmethod(synth_lang.read_inferences)

    @staticmethod
    def labels_of(example) -> list[str]:
        return [example.label]

    def rows(self, example, index, side):
        sides = (side.encode(part, index)[1] for part in (example.premise, example.hypothesis))
        premise, hypothesis = (list(itertools.chain(*words)) for words in sides)
        del hypothesis[side.length // 2 :]
        del premise[side.length - 3 - len(hypothesis) :]
        tokens = np.array([BOS, *premise, EOS, *hypothesis, EOS])
        labels = np.full(len(tokens), SILENT)
        labels[0] = self.names.index(example.label)
        yield Row(tokens, labels)


class Qa(Pos):
    """Extractive question answering: BOS question EOS context EOS, and where the answer is in it.

    Asked are BOS and the context's words, each at its first sub-word; a label's bits say that the
    answer begins (1) or ends (2) there. A context too long for a row becomes several, overlapping
    by half; in those without the whole answer it begins and ends at BOS (Devlin et al. 2019).
    """

    measures = "F1", "exact match"  # as SQuAD defines them
    generate = staticmethod(synth_lang.generate_questions)
    read = staticmethod(synth_lang.read_questions)

    @staticmethod
    def labels_of(example) -> list[str]:
        return ["begins", "ends"]

    def rows(self, example, index, side):
        question = list(itertools.chain(*side.encode(example.question, index)[1]))
        question = question[: side.length // 2]
        room = side.length - 3 - len(question)
        words, ids, spans = [], [], []
        for sentence in example.context:
            sentence, encoded = side.encode(sentence, index)
            spans += [(len(words) + start, len(words) + end) for start, end in sentence.spans]
            words += sentence.words
            ids += [word[:room] for word in encoded]
        answers, (first, last) = [words[start:end] for start, end in spans], spans[0]
        ends = np.cumsum([0, *map(len, ids)])
        begin = end = 0
        while end < len(words):
            end = int(np.searchsorted(ends, ends[begin] + room, "right")) - 1
            inside = begin <= first and last <= end
            tokens, labels = [BOS, *question, EOS], [0 if inside else 3]
            labels += [SILENT] * (len(question) + 1)
            for place in range(begin, end):
                tokens += ids[place]
                label = (place == first) + 2 * (place == last - 1) if inside else 0
                labels += [label] + [SILENT] * (len(ids[place]) - 1)
            yield Row(np.array([*tokens, EOS]), np.array([*labels, SILENT]),
                      (index, words[begin:end], answers))  # fmt: skip
            begin = max(begin + 1, (begin + end) // 2)

    def loss(self, logits, labels):
        logits = logits.float().masked_fill((labels == SILENT)[..., None], -math.inf)
        bits = torch.tensor([1, 2], device=labels.device)
        right = labels.clamp(min=0)[..., None] & bits > 0  # (B, T, 2)
        return -logits.log_softmax(1)[right].mean()

    def score(self, rows, logits):
        best = {}
        for row, x in zip(rows, logits, strict=True):
            number, words, answers = row.answer
            begins, ends = log_softmax(x[row.labels != SILENT], axis=0)[1:].T  # at BOS: no answer
            likely = np.where(np.tri(len(words)).T, begins[:, None] + ends, -math.inf)
            start, end = np.unravel_index(likely.argmax(), likely.shape)
            found = float(likely[start, end]), words[start : end + 1], answers
            best[number] = max(found, best.get(number, found), key=lambda one: one[0])
        pairs = [[overlap(words, gold) for gold in answers] for _, words, answers in best.values()]
        return tuple(100 * float(x) for x in np.mean([np.max(some, axis=0) for some in pairs], 0))


def overlap(words: list[str], gold: list[str]) -> tuple[float, float]:
    """SQuAD's F1 of the words in common, and 1 for an exact match; without case, punctuation and
    articles (Rajpurkar et al. 2016)."""
    words, gold = (
        [w for w in re.sub(r"[!-/:-@[-`{-~]", "", " ".join(some).lower()).split()
         if w not in ("a", "an", "the")]
        for some in (words, gold)
    )  # fmt: skip
    common = (Counter(words) & Counter(gold)).total()
    f1 = 2 * common / (len(words) + len(gold)) if words and gold else float(words == gold)
    return f1, float(words == gold)


TASKS = {"pos": Pos, "ner": Ner, "nli": Nli, "qa": Qa}


def read_task(name: str, files: tuple, source: Source):
    """A task and its examples, to learn from and to test on.

    files: of either; (None, None): examples of the built-in language. Raises ValueError.
    """
    kind = TASKS[name]
    if None in files and (any(files) or source.corpus or source.treebank):
        raise ValueError(f"{name}: text of files: give both --train and --test files")
    examples = [
        list(kind.read(file) if file else kind.generate(count, seed))
        for file, count, seed in zip(files, kind.built_in, (1, 2), strict=True)
    ]
    for file, some in zip(files, examples, strict=True):
        if not some:
            raise ValueError(f"{file}: holds no example: give another file")
    task = kind(examples[0])
    for unknown in {n for e in examples[1] for n in kind.labels_of(e)}.difference(task.names):
        raise ValueError(f"{files[1]}: label {unknown!r} is never in {files[0]}: take it out")
    return task, examples


def load_task(name: str, files: tuple, source: Source, languages: Languages, length: int):
    """A task and its rows, [training, test][original, derived]; as `read_task`."""
    task, examples = read_task(name, files, source)
    sides = [Side(languages, derived, length) for derived in (False, True)]
    return task, [
        [[row for i, e in enumerate(part) for row in task.rows(e, i, side)] for side in sides]
        for part in examples
    ]


# ------------------------------------------------------------------------------- fine-tuning


def batches(rows: list[Row], size: int, rng: np.random.Generator | None = None):
    """Which rows, of about equal length, and their padded tokens and labels; shuffled by an rng."""
    order = np.arange(len(rows)) if rng is None else rng.permutation(len(rows))
    lengths = np.array([len(row.tokens) for row in rows])
    pool = 16 * size  # rows sorted together: little padding, and still shuffled
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    ordered = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
    chunks = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    if rng is not None:
        rng.shuffle(chunks)
    for chunk in chunks:
        tokens = [torch.from_numpy(rows[i].tokens) for i in chunk]
        labels = [torch.from_numpy(rows[i].labels) for i in chunk]
        yield chunk, pad_sequence(tokens, True, PAD), pad_sequence(labels, True, SILENT)


class Tagger(nn.Module):
    """The encoder and a linear layer over its hidden states: the head of every task."""

    def __init__(self, encoder: MaskedLM, names: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.settings.width, names)
        self.dropout = nn.Dropout(encoder.settings.dropout)

    def forward(self, tokens, language: int):
        """tokens (B, T) int64, padded -> (B, T, names)."""
        languages = torch.full_like(tokens, language)
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            hidden = self.encoder.encode(tokens, languages, padded=True)
            return self.classifier(self.dropout(hidden)).float()


def fine_tune(encoder: MaskedLM, task: Pos, rows: list[Row], language: int) -> Tagger:
    """A model of the task trained on rows of a language; the encoder given stays as it was."""
    s, device = encoder.settings, encoder.head_bias.device
    torch.manual_seed(s.seed)
    rng = np.random.default_rng([s.seed, 5])
    tagger = Tagger(copy.deepcopy(encoder), len(task.names)).to(device).train()
    tagger.encoder.word_embeddings.weight.requires_grad_(not s.freeze_embeddings)
    optimizer = make_optimizer(tagger, s)
    steps = s.tune_epochs * -(-len(rows) // s.tune_batch)
    epochs = (batches(rows, s.tune_batch, rng) for _ in range(s.tune_epochs))
    for step, (_, tokens, labels) in enumerate(itertools.chain.from_iterable(epochs)):
        for group in optimizer.param_groups:
            group["lr"] = s.tune_rate * min(1, 10 * (step + 1) / steps) * (1 - step / steps)
        task.loss(tagger(tokens.to(device), language), labels.to(device)).backward()
        torch.nn.utils.clip_grad_norm_(tagger.parameters(), s.clip)
        optimizer.step()
        optimizer.zero_grad()
    return tagger


@torch.no_grad()
def measure(tagger: Tagger, task: Pos, rows: list[Row], language: int) -> tuple[float, ...]:
    """The task's measures, in percent, on rows of a language."""
    tagger.eval()
    logits = [None] * len(rows)
    for chunk, tokens, _ in batches(rows, 64):
        said = tagger(tokens.to(tagger.classifier.weight.device), language).cpu().numpy()
        for i, x in zip(chunk, said, strict=True):
            logits[i] = x[: len(rows[i].tokens)]
    return task.score(rows, logits)


def read_run(folder: Path, model: str = "model") -> tuple[MaskedLM, Source, Languages]:
    """A finished run of train.py. ValueError, naming the file, if it is not one."""
    path = folder / "settings.json"
    try:
        record = json.loads(path.read_text())
        s, source = Settings(**record["settings"]), Source(**record["source"])
        languages = Languages(folder / "tokenizer.model", s, synth_lang.read_order(source.order))
    except DAMAGE as error:
        raise ValueError(f"{path}: not a run of train.py: {error}") from error
    return from_hf(folder / model, s), source, languages


def alignment_of(model: MaskedLM) -> dict[str, float | None]:
    """`alignment_score`, of the model as it is and rotated; None where no word is asked for."""
    pairs = make_dictionary(model.settings)
    alignment = alignment_score(model, pairs)
    rotated = alignment_score(rotate(model, pairs), pairs)
    alignment |= {f"{k} rotated": v for k, v in rotated.items()}
    return {k: None if math.isnan(v) else v for k, v in alignment.items()}


def evaluate(folder: Path, name: str, files: tuple, device: str) -> dict:
    """Fine-tune and test a run on a task, measure its alignment; write folder/NAME.json.

    files: as of `read_task`. Returns the cell, all scores in percent. Raises ValueError.
    """
    started = time.perf_counter()
    model, source, languages = read_run(folder)
    s = model.settings
    task, (training, test) = load_task(name, files, source, languages, s.tune_length)
    model.to(device)
    zero_shot, supervised = (fine_tune(model, task, training[i], i) for i in (0, 1))
    found = {
        "source": measure(zero_shot, task, test[0], 0),
        "BZ": measure(zero_shot, task, test[1], 1),
        "BS": measure(supervised, task, test[1], 1),
    }
    # The map is fitted before fine-tuning, which moves language embeddings (and E, if it is free).
    rotated = rotate(model, make_dictionary(s)).word_embeddings.weight
    zero_shot.encoder.word_embeddings.weight.data[s.pieces :] = rotated[s.pieces :]
    found["BZ rotated"] = measure(zero_shot, task, test[1], 0)  # derived words pass for original
    scores = [{k: v[i] for k, v in found.items()} for i in range(len(task.measures))]
    for score in scores:
        score["Delta"] = score["BZ"] - score["BS"]
    cell = {
        "task": name,
        "objective": s.objective,
        "transform": s.transform,
        "seed": s.seed,
        **scores[0],
        "other measures": dict(zip(task.measures[1:], scores[1:], strict=True)),
        "alignment": alignment_of(model),
        "settings": dataclasses.asdict(s),
        "text": dataclasses.asdict(source),
        "files": files,
        "seconds": time.perf_counter() - started,
    }
    write_text(folder / f"{name}.json", json.dumps(cell, indent=2) + "\n")
    return cell


def curve(folder: Path, files: tuple, device: str) -> list[dict]:
    """POS and alignment of the models kept along a run's pre-training; writes folder/curve.json."""
    points = []
    for path in sorted(folder.glob("model-*")):
        model, source, languages = read_run(folder, path.name)
        s = model.settings
        if not points:
            task, (training, test) = load_task("pos", files, source, languages, s.tune_length)
        model.to(device)
        tagger = fine_tune(model, task, training[0], 0)
        scores = {
            k: measure(tagger, task, test[i], i)[0] for i, k in enumerate(("source", "BZ"))
        }
        run = {"transform": s.transform, "objective": s.objective, "seed": s.seed}
        step = int(path.name.split("-")[1])
        points.append(run | {"step": step, **scores, "alignment": alignment_of(model)})
    if not points:
        raise ValueError(f"{folder}: kept no model of an earlier step: train with --keep-every "
                         "in a new folder")  # fmt: skip
    write_text(folder / "curve.json", json.dumps(points, indent=2) + "\n")
    return points


# -------------------------------------------------------------------------------------- report


def correlation(alignment: list[float], delta: list[float]) -> tuple[float, float]:
    """Spearman's rho between alignment and -Delta, as the paper has it, and its p-value.

    Equal values share a rank. Of up to 8 cells p is the exact permutation test's, of more it is
    from Student's t. The paper's own numbers give its -0.727 for NLI and -0.781 for NER;
    for POS they give -0.715 as they are printed, and its -0.734 once XLM's Delta of -1.0 under
    transliterate+syntax is a little above DICT-MLM's, which rounding has made equal.
    """
    # rounded, so that rounding errors of BZ - BS break no tie
    rho, p = scipy.stats.spearmanr(alignment, -np.round(delta, 6))
    if len(delta) <= 8:
        x, y = (scipy.stats.rankdata(values) for values in (alignment, -np.round(delta, 6)))
        p = scipy.stats.permutation_test(
            (x,), lambda x, axis: ((x - x.mean()) * (y - y.mean())).sum(axis), vectorized=True,
            permutation_type="pairings", n_resamples=math.factorial(8),
        ).pvalue  # fmt: skip
    return float(rho), float(p)


def interval(alignment: list[float], delta: list[float]) -> tuple[float, float]:
    """The middle 95 % of rho over 2,000 bootstrap samples of the cells (Efron 1979)."""
    cells = np.random.default_rng(0).integers(len(delta), size=(2_000, len(delta)))
    values = np.array(alignment), -np.round(delta, 6)
    x, y = (scipy.stats.rankdata(value[cells], axis=1) for value in values)
    x, y = (ranks - ranks.mean(1, keepdims=True) for ranks in (x, y))
    scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    known = scale > 0  # not where a sample's values are all equal
    rho = (x * y).sum(1)[known] / scale[known]
    return tuple(np.percentile(rho, [2.5, 97.5]).tolist()) if known.any() else (math.nan, math.nan)


def read_cell(path: Path) -> dict:
    """A finished cell. ValueError if something of it is missing, unknown or no number."""
    try:
        cell = json.loads(path.read_text())
        # the first and the last of these are there to fail
        TASKS[cell["task"]], NAMES[cell["objective"]], synth_lang.parse_transform(cell["transform"])
        scores = [cell, *cell["other measures"].values()]
        numbers = [score[name] for score in scores for name in SCORES]
        numbers += [x for x in map(cell["alignment"].__getitem__, ALIGNMENTS) if x is not None]
        math.fsum([cell["seed"], cell["settings"]["seed"], cell["alignment"]["all"], *numbers])
        of = {"text": str(cell["text"]), "files": str(cell["files"])}
        return cell | {"settings": dataclasses.asdict(Settings(**cell["settings"])) | of}
    except DAMAGE as error:
        raise ValueError(f"{path}: not a finished cell ({error}): delete it") from error


def read_cells(folder: Path) -> list[dict]:
    """All finished cells right below a folder, in a fixed order; ValueError for one that is not."""
    paths = sorted(path for name in TASKS for path in folder.glob(f"*/{name}.json"))
    if not paths:
        raise ValueError(f"{folder}: holds no finished run: nothing to report")
    places = {name: place for place, name in enumerate((*TASKS, *NAMES))}
    cells = [cell | {"condition": cell["transform"]} for cell in map(read_cell, paths)]
    cells.sort(key=lambda c: (places[c["task"]], c["transform"], places[c["objective"]], c["seed"]))
    told = "objective", "transform", "seed", "languages", "files"
    for name in (name for name in cells[0]["settings"] if name not in told):
        if len({cell["settings"][name] for cell in cells}) > 1:
            for cell in cells:  # an ablation: what varies tells the rows apart
                cell["condition"] += f", {name} {cell['settings'][name]}"
    keys = [(c["task"], c["condition"], c["objective"], c["seed"]) for c in cells]
    if again := [key for key, times in Counter(keys).items() if times > 1]:
        raise ValueError(f"{folder}: holds {again[0]} more than once: put one of them elsewhere")
    return cells


def groups(cells: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Cells that differ in their seed alone."""
    keys = dict.fromkeys((c["condition"], c["objective"]) for c in cells)
    return {k: [c for c in cells if (c["condition"], c["objective"]) == k] for k in keys}


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds; a dash for what is not defined."""
    if None in values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def table(task: str, cells: list[dict]) -> str:
    """The cells of a task in the paper's layout, markdown; the published numbers at the right."""
    lines = [
        f"{task.upper()}, {TASKS[task].measures[0]}:\n",
        f"| transformation | objective | seeds | {' | '.join(SCORES)} | alignment "
        "| outside D | rotated | paper: BS | BZ | alignment |",
        "| --- " * 2 + "| ---: " * 12 + "|",
    ]
    columns = [f"{task.upper()} BS", f"{task.upper()} BZ", "alignment"]
    for (condition, objective), same in groups(cells).items():
        row = [condition, NAMES[objective], str(len(same))]
        row += [spread([c[column] for c in same]) for column in SCORES]
        row += [spread([c["alignment"][over] for c in same]) for over in ALIGNMENTS]
        published = PUBLISHED.get((condition, objective), ())
        published = dict(zip(PUBLISHED_COLUMNS, published, strict=False))
        row += [str(published.get(column, "-")) for column in columns]
        lines.append("| " + " | ".join(row) + " |")
    text = "\n".join(lines) + "\n"
    for measure in cells[0]["other measures"]:
        found = [
            f"{NAMES[objective]} {spread([c['other measures'][measure]['BZ'] for c in same])}"
            for (_, objective), same in groups(cells).items()
        ]
        text += f"\n{measure}, BZ: {', '.join(found)}.\n"
    return text + (f"\n{rho}.\n" if (rho := rho_of(cells)) else "")


def rho_of(cells: list[dict]) -> str:
    """The correlation, over conditions: seeds of one are no independent cells, so it is of their
    means. Empty for two conditions or fewer."""
    points = [
        [np.mean([c["alignment"]["all"] for c in same]), np.mean([c["Delta"] for c in same])]
        for same in groups(cells).values()
    ]
    if len(points) < 3:
        return ""
    values = np.transpose(points)
    (rho, p), (low, high) = correlation(*values), interval(*values)
    return (
        f"Spearman's rho of alignment and -Delta: {rho:.3f} (p = {p:.2g}, {len(points)} rows, "
        f"95 % of bootstrap samples {low:.2f} to {high:.2f})"
    )


def panels(rows: int, columns: int, sharey: bool | str = "row"):
    """A figure, and its rows of axes."""
    figure = Figure(figsize=(1 + 4 * columns, 3.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, sharey=sharey, squeeze=False)


def save(figure, path: Path) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    figure.savefig(part, format="png", dpi=120, metadata={"Software": None})
    part.replace(path)


def draw_delta(tasks: dict[str, list[dict]], path: Path) -> None:
    """BS and BZ of every objective, a row a task, a panel a transformation; a dot is a seed, the
    number Delta."""
    conditions = list(dict.fromkeys(c["condition"] for cells in tasks.values() for c in cells))
    figure, axes = panels(len(tasks), len(conditions))
    for (task, cells), row in zip(tasks.items(), axes, strict=True):
        for condition, axis in zip(conditions, row, strict=True):
            same = {o: g for (c, o), g in groups(cells).items() if c == condition}
            for offset, score, shade, hatch in ((-0.2, "BS", ".85", ""), (0.2, "BZ", ".55", "//")):
                for place, group in enumerate(same.values()):
                    values = [c[score] for c in group]
                    axis.bar(place + offset, np.mean(values), 0.38, color=shade, hatch=hatch,
                             edgecolor="black", label=score if place == 0 else None)
                    axis.plot([place + offset] * len(values), values, "k.", markersize=5)
            for place, group in enumerate(same.values()):
                top, delta = 3 + max(c["BZ"] for c in group), np.mean([c["Delta"] for c in group])
                axis.text(place + 0.2, top, f"{delta:+.0f}", ha="center")
            axis.set_xticks(range(len(same)), [NAMES[o] for o in same])
            axis.set_title(condition)
        row[0].set_ylabel(f"{task.upper()} {TASKS[task].measures[0]}, %, and Delta")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


def draw_alignment(tasks: dict[str, list[dict]], path: Path) -> None:
    """Delta against alignment, a panel a task, a mark a cell; the shape tells the objective."""
    figure, axes = panels(1, len(tasks))
    for (task, cells), axis in zip(tasks.items(), axes[0], strict=True):
        for marker, (objective, name) in zip("os^D", NAMES.items(), strict=True):
            same = [c for c in cells if c["objective"] == objective]
            axis.plot([c["alignment"]["all"] for c in same], [c["Delta"] for c in same], marker,
                      label=name, markerfacecolor="none", markeredgecolor="black")  # fmt: skip
        found = rho_of(cells).replace(" (", "\n(")
        axis.set_title(f"{task.upper()}\n{found}", fontsize="small")
        axis.set_xlabel("alignment, % of the words")
    axes[0][0].set_ylabel("Delta = BZ - BS, points")
    axes[0][0].legend()
    save(figure, path)


def draw_curves(runs: list[list[dict]], path: Path) -> None:
    """BZ, and alignment of all words and of those outside D, over pre-training; a line a run, a
    row a transformation."""
    shown = {
        "POS BZ, %": lambda point: point["BZ"],
        "alignment, % of the words": lambda point: point["alignment"]["all"],
        "alignment outside D, %": lambda point: point["alignment"]["outside"],
    }
    transforms = list(dict.fromkeys(points[0]["transform"] for points in runs))
    figure, axes = panels(len(transforms), len(shown), sharey=False)
    styles = dict(zip(NAMES, ("o-", "s--", "^:", "D-."), strict=True))
    for points in runs:
        objective, steps = points[0]["objective"], [point["step"] for point in points]
        row = axes[transforms.index(points[0]["transform"])]
        for axis, value in zip(row, shown.values(), strict=True):
            axis.plot(steps, list(map(value, points)), styles[objective], color="black",
                      label=NAMES[objective], markerfacecolor="none")  # fmt: skip
    for row, transform in zip(axes, transforms, strict=True):
        row[0].set_ylabel(transform)
        for axis, label in zip(row, shown, strict=True):
            axis.set_title(label)
            axis.set_xlabel("step")
    lines = dict(zip(*reversed(axes[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines))
    save(figure, path)


def report(folder: Path, out: Path) -> str:
    """results.json, report.md and figures of all finished cells; returns the tables."""
    cells = read_cells(folder)
    out.mkdir(parents=True, exist_ok=True)
    found = {name: [c for c in cells if c["task"] == name] for name in TASKS}
    tasks = {name: some for name, some in found.items() if some}
    text = "\n".join(table(*one) for one in tasks.items())
    write_text(out / "results.json", json.dumps(cells, indent=2) + "\n")
    write_text(out / "report.md", text)
    draw_delta(tasks, out / "delta.png")
    draw_alignment(tasks, out / "alignment.png")
    if curves := [json.loads(path.read_text()) for path in sorted(folder.glob("*/curve.json"))]:
        write_text(out / "curves.json", json.dumps(curves, indent=2) + "\n")
        draw_curves(curves, out / "curves.png")
    return text


# ---------------------------------------------------------------------------------------- grid


def run_cell(
    folder: Path, s: Settings, source: Source, tasks: dict, device: str, threads: int, until: float,
    options: dict,
) -> list[dict] | None:  # fmt: skip
    """A cell's run and its tasks, in a process of its own; None if it is another's or unfinished.

    tasks: name -> files. A time that is over stops training as a signal does: saved first.
    """
    torch.set_num_threads(threads)
    if until < math.inf:
        signal.signal(signal.SIGALRM, lambda *_: sys.exit())
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, until - time.time()))
    try:
        with train.claim(folder) as mine:
            if not mine:
                return None
            train.run(folder, s, source, device, **options)
            if time.time() > until:  # it was over in the last step
                return None
            for name, files in tasks.items():
                if not (folder / f"{name}.json").exists():
                    evaluate(folder, name, files, device)
            if options["keep_every"] and not (folder / "curve.json").exists():
                curve(folder, tasks.get("pos", (None, None)), device)
            return [read_cell(folder / f"{name}.json") for name in tasks]
    except SystemExit:  # the alarm's; in training train.run's, when it has saved
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def grid_cells(args: argparse.Namespace) -> dict[Path, Settings]:
    """The folder and the settings of every cell."""
    settings = train.given_settings(args)
    varied, *values = args.vary or ("steps", "")
    told = {"objective", "transform", "seed", "languages"}
    if one := {*told, *(args.vary or ())[:1]}.intersection(settings):
        raise ValueError(f"--{min(one)}: a grid has --objectives, --transforms, --seeds and --vary")
    types = {f.name: f.type for f in dataclasses.fields(Settings) if f.name not in told}
    if types.get(varied) not in (int, float) or not values:
        raise ValueError(f"--vary {varied}: give a setting that is a number, and its values")
    cells = {}
    for transform, objective, value, seed in itertools.product(
        args.transforms, args.objectives, values, range(args.seeds)
    ):
        given = {"transform": transform, "objective": objective, "seed": seed}
        name = f"{transform}-{objective}-{seed}"
        if args.vary:
            try:
                given[varied] = types[varied](value)
            except ValueError as error:
                raise ValueError(f"--vary {varied}: {value!r} is no {types[varied]}") from error
            name += f"-{varied}={value}"
        cells[args.out / name] = preset(args.preset, **(settings | given))
    return cells


def finished(path: Path, files: tuple) -> bool:
    """Whether a task's cell is there. ValueError if it is damaged, or of other files."""
    if not path.exists():
        return False
    if (there := read_cell(path)["files"]) != list(files):
        raise ValueError(f"{path}: of other --train and --test files, {there}: use a new --out")
    return True


def grid(args: argparse.Namespace) -> None:
    """Every objective under every transformation with every seed; what is finished is kept."""
    source, cells = train.source_of(args), grid_cells(args)
    if not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes:g}: give a time above 0")
    files = [args.train or [None] * len(args.tasks), args.test or [None] * len(args.tasks)]
    if {*map(len, files)} != {len(args.tasks)}:
        raise ValueError("--train, --test: give a file for each of --tasks, in their order")
    tasks = dict(zip(args.tasks, zip(*files, strict=True), strict=True))
    for name, given in tasks.items():  # before hours of training
        if any(given) or source.corpus or source.treebank:
            read_task(name, given, source)
        if any(given) and name != "pos" and "syntax" in "+".join(args.transforms):
            raise ValueError(f"{name}: its files have no trees, which syntax needs: leave it out")
    for folder, s in cells.items():
        train.refuse_other(folder / "settings.json", train.record_of(s, source))

    def done(folder: Path) -> bool:
        drawn = args.keep_every == 0 or (folder / "curve.json").exists()
        return all([finished(folder / f"{k}.json", v) for k, v in tasks.items()]) and drawn

    todo = {folder: s for folder, s in cells.items() if not done(folder)}
    for s in {train.corpus_name(source, s): s for s in todo.values()}.values():
        prepare(source, s, args.out)  # once, before processes would do it side by side
    options = {"save_every": args.save_every, "accumulate": args.accumulate,
               "compiled": args.compile, "keep_every": args.keep_every}  # fmt: skip
    until = time.time() + 60 * args.minutes
    threads = args.threads or max(1, os.cpu_count() // args.jobs)
    bar = tqdm(total=len(cells), initial=len(cells) - len(todo), desc="cells", unit="cell")
    os.environ["TQDM_DISABLE"] = "1"  # of the processes to come: this is the one progress bar
    context = multiprocessing.get_context("spawn")
    left, running, failed = iter(todo.items()), set(), []
    with ProcessPoolExecutor(args.jobs, context, train.follow_parent) as pool:
        while True:
            free = args.jobs - len(running) if time.time() < until else 0
            for folder, s in itertools.islice(left, free):
                running.add(pool.submit(run_cell, folder, s, source, tasks, args.device, threads,
                                        until, options))  # fmt: skip
            if not running:
                break
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                if isinstance(error := future.exception(), ValueError):
                    failed.append(str(error))  # the other cells go on
                    bar.write(failed[-1])
                    continue
                found = future.result() or []
                bar.update(bool(found))
                for cell in found:
                    scores = " ".join(f"{k} {cell[k]:.1f}" for k in ("source", "BS", "BZ"))
                    name = f"{cell['transform']} {NAMES[cell['objective']]} {cell['seed']}"
                    bar.write(f"{cell['task']} {name}: {scores}")
    bar.close()
    if missing := sum(not done(folder) for folder in cells):
        print(f"{missing} of {len(cells)} cells are unfinished, another's or failed: the same "
              "command goes on")  # fmt: skip
    if missing < len(cells):
        print(report(args.out, args.results or args.out))
    if failed:
        raise ValueError(f"{len(failed)} cells failed: {failed[0]}")


def main() -> None:
    parser = train.Parser(description=__doc__, epilog=train.EXITS)
    commands = parser.add_subparsers(dest="command", required=True)
    meanings = {name: f"fine-tune and test one run on {name.upper()}" for name in TASKS}
    meanings["curve"] = "POS and alignment along one pre-training"
    for name, meaning in meanings.items():
        single = commands.add_parser(name, help=meaning)
        single.add_argument("folder", type=Path, help="of a run of train.py")
        single.add_argument("--train", metavar="FILE", help="to fine-tune on (built-in language)")
        single.add_argument("--test", metavar="FILE")
        single.add_argument("--threads", type=train.count, help="of the CPU")
        train.add_device(single)
    several = commands.add_parser("report", help="tables and figures of finished runs")
    several.add_argument("folder", type=Path, help="that holds the runs' folders")
    every = commands.add_parser("grid", help="every objective, transformation and seed")
    every.add_argument("--out", type=Path, default=Path("runs/tiny"), help="(%(default)s)")
    every.add_argument("--tasks", nargs="+", choices=TASKS, default=["pos"])
    every.add_argument("--train", nargs="+", metavar="FILE", help="of each task, in their order")
    every.add_argument("--test", nargs="+", metavar="FILE")
    every.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    every.add_argument("--transforms", nargs="+", default=["transliterate+invert"])
    every.add_argument("--seeds", type=train.count, default=2, help="(%(default)s)")
    every.add_argument("--vary", nargs="+", metavar="SETTING VALUE", help="an ablation")
    every.add_argument("--minutes", type=float, default=math.inf, help="then stop, to go on later")
    every.add_argument("--jobs", type=train.count, help="cells at a time (a core each; 1 on a GPU)")
    train.add_options(every)
    for command in (several, every):
        command.add_argument("--results", type=Path, help="folder to write to (the runs' own)")
    args = parser.parse_args()
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    if args.command in TASKS:
        cell = evaluate(args.folder, args.command, (args.train, args.test), args.device)
        print(json.dumps(cell, indent=2))
    elif args.command == "curve":
        print(json.dumps(curve(args.folder, (args.train, args.test), args.device), indent=2))
    elif args.command == "report":
        print(report(args.folder, args.results or args.folder))
    else:
        args.jobs = args.jobs or (os.cpu_count() if args.device == "cpu" else 1)
        grid(args)


if __name__ == "__main__":
    train.guarded(main)
