"""Tags that follow their words, zero-shot scores, and a report that says what its runs say."""

import copy
import dataclasses
import itertools
import json
import math
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import eval as evaluation
import synth_lang
import train
from alignmlm import BOS, EOS, OBJECTIVES, PAD, SPECIALS
from alignmlm import MaskedLM, Settings, preset, to_hf
from eval import PUBLISHED, PUBLISHED_COLUMNS, SILENT, TASKS, Row, Side

DATA = Path(train.__file__).resolve().parents[1] / "shared" / "data"
SIZES = {
    "--vocab-size": 300, "--layers": 1, "--width": 16, "--heads": 2, "--feed-forward": 32,
    "--positions": 32, "--batch": 8, "--steps": 40, "--warmup": 5, "--tune-epochs": 6,
    "--tune-length": 24, "--tune-batch": 8, "--tune-rate": 0.01,
}  # fmt: skip


def tiny(**changes) -> Settings:
    given = {
        "objective": "mlm", "vocab_size": 60, "layers": 1, "width": 16, "heads": 2,
        "feed_forward": 32, "positions": 16, "batch": 8, "tune_length": 16, "tune_rate": 0.02,
        "tune_batch": 8, "tune_epochs": 4, "dropout": 0.0,
    }  # fmt: skip
    return Settings(**given | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of runs; "one" is trained."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        pretrain(patch, root / "one", "--sentences", 1500, "--objective", "align")
    return root


def command(patch, module, *argv) -> None:
    patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    train.guarded(module.main)


def pretrain(patch, folder: Path, *options) -> None:
    sizes = itertools.chain(*SIZES.items())
    command(patch, train, folder, "--device", "cpu", "--threads", 1, *sizes, *options)


def failure(patch, capfd, *argv) -> str:
    """The only line on stderr, of a command that exits with 2."""
    capfd.readouterr()
    patch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        train.guarded(evaluation.main)
    lines = re.split(r"[\r\n]+", capfd.readouterr().err)
    (line,) = [x for x in lines if x and not re.search(r"sentences? ?\[", x)]
    assert left.value.code == 2 and line.startswith("eval.py: ")
    return line


# --------------------------------------------------------------------------------- correlation


def published(name: str) -> list[float]:
    return [row[PUBLISHED_COLUMNS.index(name)] for row in PUBLISHED.values()]


def published_delta(task: str) -> np.ndarray:
    return np.subtract(published(f"{task} BZ"), published(f"{task} BS"))


@pytest.mark.parametrize("task, rho", [("NLI", -0.727), ("NER", -0.781), ("POS", -0.715)])
def test_the_published_tables_rho(task, rho):
    assert len(PUBLISHED) == 12
    found, p = evaluation.correlation(published("alignment"), list(published_delta(task)))
    assert round(found, 3) == rho
    assert p == pytest.approx({"NLI": 0.007}.get(task, p), abs=5e-4)


def test_the_p_value_of_few_cells_is_a_count_of_pairings():
    rho, p = evaluation.correlation([1, 2, 3, 4], [-1, -2, -3, -4])
    assert (rho, p) == pytest.approx((1, 2 / 24))  # of 24 this one and its reverse


def test_the_papers_rho_for_pos_comes_of_a_tie_that_rounding_made():
    delta = published_delta("POS")
    delta[list(PUBLISHED).index(("transliterate+syntax", "xlm"))] += 0.01
    assert round(evaluation.correlation(published("alignment"), list(delta))[0], 3) == -0.734


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-9, 9)), min_size=3, max_size=20))
def test_rho_is_pearsons_r_of_mean_ranks_and_blind_to_rounding_errors(cells):
    alignment, delta = (np.array(column) / 10 for column in zip(*cells, strict=True))
    if len(set(alignment)) > 1 and len(set(delta)) > 1:
        noisy = delta + 1e-13 * np.arange(len(delta))
        ranks = [scipy.stats.rankdata(values) for values in (alignment, -delta)]
        expected = np.corrcoef(*ranks)[0, 1]
        assert evaluation.correlation(list(alignment), list(noisy))[0] == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-9, 9)), min_size=3, max_size=8))
@settings(max_examples=10, deadline=None)
def test_the_bootstrap_interval_is_of_rho_over_samples_of_the_cells(cells):
    alignment, delta = (np.array(column) / 10 for column in zip(*cells, strict=True))
    rng, values = np.random.default_rng(0), []
    for sample in rng.integers(len(delta), size=(2_000, len(delta))):
        if len(set(alignment[sample])) > 1 and len(set(delta[sample])) > 1:
            ranks = [scipy.stats.rankdata(v[sample]) for v in (alignment, -delta)]
            values.append(np.corrcoef(*ranks)[0, 1])
    if values:
        expected = np.percentile(values, [2.5, 97.5])
        assert evaluation.interval(list(alignment), list(delta)) == pytest.approx(tuple(expected))


# --------------------------------------------------------------------------------------- tasks


@pytest.fixture(scope="module")
def make_languages(folder):
    (tokenizer,) = folder.glob("data-*/tokenizer.model")

    def of(transform):
        s = tiny(vocab_size=300, transform=transform)
        return train.Languages(tokenizer, s, synth_lang.SOV)

    return of


TAGS = ["ADJ", "NOUN", "VERB", "X"]
WORDS = st.text("aeioustrnl", min_size=1, max_size=8)
TAGGED_WORDS = st.lists(st.tuples(WORDS, st.sampled_from(TAGS)), max_size=12)
TRANSFORMS = "transliterate", "transliterate+invert", "transliterate+permute", "invert"


@given(st.lists(TAGGED_WORDS, max_size=4), st.sampled_from(TRANSFORMS), st.integers(3, 40))
@settings(deadline=None)
def test_a_tag_stands_at_its_words_first_sub_word_in_both_languages(
    make_languages, sentences, transform, length
):
    languages, task = make_languages(transform), evaluation.Pos([synth_lang.Sentence([], TAGS)])
    shift = 150 * ("transliterate" in transform)
    given = [
        synth_lang.Sentence([w for w, _ in words], upos=[t for _, t in words])
        for words in sentences
    ]
    for derived in (False, True):
        for index, sentence in enumerate(given):
            (row,) = task.rows(sentence, index, Side(languages, derived, length))
            if derived:
                sentence = languages.derive(sentence, index)
            expected_ids, expected_labels = [BOS], [SILENT]
            for word, tag in zip(sentence.words, sentence.upos, strict=True):
                pieces = [id + derived * shift for id in languages.pieces.encode(word)]
                expected_ids += pieces
                expected_labels += [TAGS.index(tag)] + (len(pieces) - 1) * [SILENT]
            assert row.tokens.tolist() == [*expected_ids[: length - 1], EOS]
            assert row.labels.tolist() == [*expected_labels[: length - 1], SILENT]


@given(st.lists(TAGGED_WORDS, min_size=1, max_size=4), st.sampled_from(TRANSFORMS))
@settings(deadline=None)
def test_each_word_has_the_same_tag_in_both_languages(make_languages, sentences, transform):
    """An oracle that knows nothing of the transformations: words are told by their number."""
    languages, numbers = make_languages(transform), [f"{n:02}" for n in range(12)]
    task, shift = evaluation.Pos([synth_lang.Sentence([], numbers)]), 150 * ("trans" in transform)
    for index, words in enumerate(sentences):
        sentence = synth_lang.Sentence([w for w, _ in words], upos=numbers[: len(words)])
        known = [{}, {}]
        for derived in (False, True):
            (row,) = task.rows(sentence, index, Side(languages, derived, 999))
            for id, label in zip(row.tokens[1:-1], row.labels[1:-1], strict=True):
                number = number if label == SILENT else label  # noqa: F821
                known[derived].setdefault(number, []).append(id - derived * shift)
        assert known[0] == known[1]


BIO = st.lists(st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG"]), max_size=12)


def said(labels: list[int], names: int) -> np.ndarray:
    """Logits (T, names) that say these labels."""
    return np.eye(names)[np.maximum(labels, 0)]


@given(st.lists(st.tuples(BIO, BIO), min_size=1, max_size=6), st.randoms())
def test_entity_f1_is_that_of_seqeval_on_any_taggings(pairs, random):
    task = evaluation.Ner([synth_lang.Sentence([], entities=[f"{b}-{x}" for b in "BI" for x in
                                                            ("PER", "LOC", "ORG")] + ["O"])])
    rows, logits, golds, guesses = [], [], [], []
    for gold, guess in pairs:
        gold, guess = gold[: len(guess)], guess[: len(gold)]
        numbers = [[task.names.index(tag) for tag in tags] for tags in (gold, guess)]
        spread = [[SILENT, *itertools.chain(*([n, SILENT] for n in some))] for some in numbers]
        rows.append(Row(np.zeros(len(spread[0])), np.array(spread[0])))
        logits.append(said(spread[1], len(task.names)))
        golds.append(gold)
        guesses.append(guess)
    (f1,) = task.score(rows, logits)
    with warnings.catch_warnings(action="ignore"):
        assert f1 == pytest.approx(100 * seqeval.metrics.f1_score(golds, guesses, zero_division=0))


def sentence_of(text: str, *spans) -> synth_lang.Sentence:
    return synth_lang.Sentence(text.split(), spans=list(spans))


@pytest.mark.parametrize("transform", ["transliterate+invert", "permute"])
@pytest.mark.parametrize("derived", [False, True])
def test_an_inference_is_said_at_bos_of_premise_and_hypothesis(make_languages, transform, derived):
    languages = make_languages(transform)
    premise, hypothesis = sentence_of("an old house stood near it ."), sentence_of("it stood .")
    examples = [synth_lang.Inference(premise, hypothesis, x) for x in synth_lang.INFERENCES]
    task = evaluation.Nli(examples)
    for length in (999, 12, 5):
        side = Side(languages, derived, length)
        parts = [[id for word in side.encode(part, 3)[1] for id in word]
                 for part in (premise, hypothesis)]
        for example in examples:
            (row,) = task.rows(example, 3, side)
            second = parts[1][: length // 2]
            first = parts[0][: length - 3 - len(second)]
            assert row.tokens.tolist() == [BOS, *first, EOS, *second, EOS]
            assert len(row.tokens) <= length
            assert task.names[row.labels[0]] == example.label
            assert set(row.labels[1:]) == {SILENT}


TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=9), min_size=1, max_size=3)


@given(st.data(), TEXTS, st.integers(12, 60), st.sampled_from(TRANSFORMS), st.booleans())
@settings(deadline=None)
def test_windows_cover_the_context_and_mark_the_answer(
    make_languages, data, texts, length, transform, derived
):
    context = [synth_lang.Sentence(words) for words in texts]
    answer = data.draw(st.sampled_from(context))
    start = data.draw(st.integers(0, len(answer.words) - 1))
    answer.spans.append((start, data.draw(st.integers(start + 1, len(answer.words)))))
    example = synth_lang.Question(sentence_of("who is it ?"), context)
    side, task = Side(make_languages(transform), derived, length), evaluation.Qa([])
    rows = list(task.rows(example, 7, side))
    moved = [side.encode(sentence, 7)[0] for sentence in context]
    words = [word for sentence in moved for word in sentence.words]
    gold = next(s.words[slice(*s.spans[0])] for s in moved if s.spans)
    covered, marked = set(), 0
    for row in rows:
        assert len(row.tokens) <= length and len(row.tokens) == len(row.labels)
        number, inside, answers = row.answer
        assert number == 7 and answers == [gold]
        assert (row.labels != SILENT).sum() == 1 + len(inside)
        covered |= {place for place in range(len(words))
                    if words[place : place + len(inside)] == inside}
        asked = row.labels[row.labels != SILENT]
        assert sorted(asked[asked > 0].tolist()) in ([3], [1, 2])
        if asked[0] == 0:
            marked += 1
            begin = np.flatnonzero(asked & 1)[0]
            assert inside[begin - 1 : np.flatnonzero(asked & 2)[0]] == gold
        else:
            assert asked[0] == 3
    assert rows[0].answer[1] == words[: len(rows[0].answer[1])]
    assert rows[-1].answer[1] == words[len(words) - len(rows[-1].answer[1]) :]
    if len(rows) == 1:
        assert marked == 1


def test_the_likeliest_answer_of_all_windows_is_scored():
    task = evaluation.Qa([])

    def row(words, labels, gold):
        return Row(np.zeros(len(labels)), np.array(labels), (0, words.split(), [gold.split()]))

    rows = [row("the old red house", [0, 0, 1, 0, 2, SILENT], "old red house"),
            row("red house by it", [3, 0, 0, 0, 0, SILENT], "old red house")]  # fmt: skip
    unsure = np.zeros((6, 2))
    right, wrong = unsure.copy(), unsure.copy()
    right[2, 0] = right[4, 1] = 3
    wrong[1, 0] = wrong[2, 1] = 9
    assert task.score(rows, [right, unsure]) == (100, 100)
    assert task.score(rows, [right, wrong]) == pytest.approx((80, 0))  # "red house"
    wrong[0] = 9.5  # "no answer here" is likelier still, but that of a window without one
    assert task.score(rows, [right, wrong])[0] == pytest.approx(100)
    backwards = unsure.copy()
    backwards[4, 0] = backwards[2, 1] = 9  # an answer that ends before it begins is none
    assert task.score(rows, [backwards, wrong])[1] == 0


@pytest.mark.parametrize("words, gold, f1, exact", [
    ("the old house", "Old House", 1, 1), ("house", "old house", 2 / 3, 0), ("a", "the", 1, 1),
    ("x y y", "y y z", 2 / 3, 0), ("the", "house", 0, 0), ("( house ) .", "house", 1, 1),
    ("308", "308", 1, 1), ("6½", "6½", 1, 1), ("U.S.", "us", 1, 1),
])  # fmt: skip
def test_squads_measures(words, gold, f1, exact):
    assert evaluation.overlap(words.split(), gold.split()) == pytest.approx((f1, exact))


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(2, 9))
def test_the_loss_of_qa_is_the_mean_log_loss_of_where_the_answer_begins_and_ends(seed, B, T):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(B, T, 2)))
    labels, losses = np.full((B, T), SILENT), []
    for row in range(B):
        asked = np.sort(rng.choice(T, rng.integers(1, T + 1), replace=False))
        begin, end = np.sort(rng.choice(asked, 2))
        labels[row, asked] = 0
        labels[row, begin] += 1
        labels[row, end] += 2
        for place, bit in ((begin, 0), (end, 1)):
            weights = np.exp(logits[row, asked, bit].numpy())
            losses.append(-np.log(np.exp(float(logits[row, place, bit])) / weights.sum()))
    loss = evaluation.Qa([]).loss(logits, torch.from_numpy(labels))
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


LENGTHS = st.lists(st.integers(2, 20), min_size=1, max_size=60)


def numbered(lengths: list[int]) -> list[Row]:
    """Row i is made of the word SPECIALS + i."""
    return [
        Row(np.array([BOS, *[SPECIALS + i] * (n - 2), EOS]),
            np.array([SILENT, *[i] * (n - 2), SILENT]))
        for i, n in enumerate(lengths)
    ]  # fmt: skip


@given(LENGTHS, st.integers(1, 9), st.none() | st.integers(0, 99))
def test_batches_hold_every_row_once_padded_at_its_end(lengths, size, seed):
    data = numbered(lengths)
    rng = None if seed is None else np.random.default_rng(seed)
    found = list(evaluation.batches(data, size, rng))
    assert len(found) == -(-len(lengths) // size)
    assert sorted(itertools.chain(*(chunk for chunk, *_ in found))) == list(range(len(lengths)))
    for chunk, tokens, labels in found:
        assert tokens.shape == labels.shape and len(tokens) == len(chunk) <= size
        assert (tokens[:, -1] != PAD).any()  # no wider than its longest
        for i, row, label in zip(chunk, tokens.tolist(), labels.tolist(), strict=True):
            end = row.index(EOS) + 1
            assert set(row[end:]) <= {PAD} and set(label[end:]) <= {SILENT}
            assert (row[:end], label[:end]) == (data[i].tokens.tolist(), data[i].labels.tolist())


def test_batches_are_shuffled_anew_in_every_epoch_and_alike_with_the_same_seed():
    def epochs():
        rng = np.random.default_rng(0)
        return [[t.tolist() for _, t, _ in evaluation.batches(data, 4, rng)] for _ in range(2)]

    data = numbered([5] * 100)
    first, second = epochs()
    assert first != second
    assert [first, second] == epochs()


class Parrot(nn.Module):
    """Guesses that a token's tag is its id, if it is asked in the right language."""

    def __init__(self, right):
        super().__init__()
        self.right, self.classifier = right, nn.Linear(1, 1)

    def forward(self, tokens, language):
        assert not self.training
        return nn.functional.one_hot(tokens * (language == self.right), 100).float()


POS = evaluation.Pos([synth_lang.Sentence([], ["even", "odd"])])
PAIRS = st.tuples(st.integers(4, 9), st.integers(4, 9))  # of a word and its tag


@given(st.lists(st.lists(PAIRS), min_size=1), st.booleans())
def test_accuracy_is_the_percentage_of_words_tagged_right(sentences, language):
    pairs = [pair for sentence in sentences for pair in sentence]
    rows = [
        Row(np.array([BOS, *[id for id, _ in sentence], EOS]),
            np.array([SILENT, *[tag for _, tag in sentence], SILENT]))
        for sentence in sentences
    ]  # fmt: skip
    if pairs:
        right = 100 * sum(id == tag for id, tag in pairs) / len(pairs)
        assert evaluation.measure(Parrot(language), POS, rows, language)[0] == pytest.approx(right)
        assert evaluation.measure(Parrot(not language), POS, rows, language) == (0,)


def parity(rows: int, seed: int) -> list[Row]:
    """Words tagged by whether their id is even."""
    words = np.random.default_rng(seed).integers(SPECIALS, 30, (rows, 8))
    return [
        Row(np.array([BOS, *row, EOS]), np.array([SILENT, *(row % 2), SILENT])) for row in words
    ]


def test_a_tagger_reads_padded_sentences_in_the_language_asked_for():
    s = tiny(languages=2)
    torch.manual_seed(0)
    encoder = MaskedLM(s)
    tagger = evaluation.Tagger(encoder, 3).eval()
    tokens = torch.tensor([[BOS, 9, 8, EOS, PAD], [BOS, 7, 6, 5, EOS]])
    for language in (0, 1):
        tags = tagger(tokens, language)
        alone = encoder.encode(tokens[:1, :4], torch.full((1, 4), language))
        torch.testing.assert_close(tags[:1, :4], tagger.classifier(alone))


@pytest.mark.parametrize("freeze", [False, True])
def test_fine_tuning_learns_and_leaves_the_encoder_as_it_was(freeze):
    s = tiny(freeze_embeddings=freeze)
    torch.manual_seed(0)
    encoder = MaskedLM(s)
    before = copy.deepcopy(encoder.state_dict())
    tagger = evaluation.fine_tune(encoder, POS, parity(150, seed=0), 0)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    tuned = tagger.encoder.state_dict()
    moved = {name for name in before if not torch.equal(before[name], tuned[name])}
    unused = {name for name in before if name.startswith("head_")}
    assert moved == before.keys() - unused - ({"word_embeddings.weight"} if freeze else set())
    assert evaluation.measure(tagger, POS, parity(50, seed=1), 0)[0] > 95

    again = evaluation.fine_tune(encoder, POS, parity(150, seed=0), 0)
    assert torch.equal(again.classifier.weight, tagger.classifier.weight)


# ----------------------------------------------------------------------------------- whole runs


@pytest.fixture
def few_sentences(monkeypatch):
    for task in TASKS.values():
        monkeypatch.setattr(task, "built_in", (150, 60))


@pytest.mark.parametrize("task", TASKS)
def test_from_text_to_scores_on_the_built_in_language(
    task, folder, few_sentences, monkeypatch, capsys
):
    command(monkeypatch, evaluation, task, folder / "one")
    cell = json.loads((folder / "one" / f"{task}.json").read_text())
    assert json.loads(capsys.readouterr().out) == cell
    assert cell["task"] == task and (cell["objective"], cell["transform"], cell["seed"]) == (
        "align", "transliterate+invert", 0,
    )  # fmt: skip
    assert cell["Delta"] == cell["BZ"] - cell["BS"]
    for score in (cell["source"], cell["BS"], cell["BZ"], *cell["alignment"].values()):
        assert 0 <= score <= 100
    for other in cell["other measures"].values():
        assert other["Delta"] == other["BZ"] - other["BS"]
    if task == "pos":
        assert cell["source"] > 15 and cell["BS"] > 15  # a guess has 6
    assert len(list(folder.glob("data-*"))) == 1  # the tokenised text is found again


def test_zero_shot_is_trained_on_the_original_and_tested_on_the_derived(
    folder, few_sentences, monkeypatch
):
    def fine_tune(model, task, rows, language):
        assert len(rows) == 150
        side = language, rows[0].tokens[1] >= 150
        return SimpleNamespace(encoder=copy.deepcopy(model), side=side)

    def measure(tagger, task, rows, language):
        assert len(rows) == 60
        turned = bool((tagger.encoder.word_embeddings.weight[150:] == 7).all())
        assert not (tagger.encoder.word_embeddings.weight[:150] == 7).any()
        sides = *tagger.side, language, rows[0].tokens[1] >= 150, turned
        return ({(0, 0, 0, 0, 0): 1.0, (0, 0, 1, 1, 0): 2.0, (1, 1, 1, 1, 0): 3.0,
                 (0, 0, 0, 1, 1): 5.0}[sides],)  # fmt: skip

    def rotate(model, pairs):
        weight = torch.full_like(model.word_embeddings.weight, 7)
        return SimpleNamespace(word_embeddings=SimpleNamespace(weight=weight))

    monkeypatch.setattr(evaluation, "fine_tune", fine_tune)
    monkeypatch.setattr(evaluation, "measure", measure)
    monkeypatch.setattr(evaluation, "rotate", rotate)
    monkeypatch.setattr(evaluation, "alignment_of", lambda model: {})
    cell = evaluation.evaluate(folder / "one", "pos", (None, None), "cpu")
    assert [cell[k] for k in ("source", "BZ", "BS", "Delta", "BZ rotated")] == [1, 2, 3, -1, 5]


def test_where_counterparts_are_alike_zero_shot_costs_nothing(
    folder, few_sentences, monkeypatch, capsys
):
    """Embeddings frozen, one script after another: every number must be the source's own."""
    place = folder / "alike"
    pretrain(monkeypatch, place, "--sentences", 1500, "--objective", "align",
             "--transform", "transliterate", "--freeze-embeddings", "--steps", 2)  # fmt: skip
    model, *_ = evaluation.read_run(place)
    weight = model.word_embeddings.weight.data
    weight[model.settings.shift + SPECIALS :] = weight[SPECIALS : model.settings.shift]
    to_hf(model, place / "model")
    for task in TASKS:
        cell = evaluation.evaluate(place, task, (None, None), "cpu")
        assert {cell[k] for k in ("BZ", "BS", "BZ rotated")} == {cell["source"]}
        assert cell["Delta"] == 0
        assert set(cell["alignment"].values()) == {100}


def test_what_only_a_rotation_hides_is_found_with_the_dictionary(
    folder, few_sentences, monkeypatch, capsys
):
    place = folder / "turned"
    pretrain(monkeypatch, place, "--sentences", 1500, "--objective", "xlm", "--steps", 2,
             "--transform", "transliterate", "--freeze-embeddings",
             "--tune-rate", 0.01)  # fmt: skip
    model, *_ = evaluation.read_run(place)
    s, weight = model.settings, model.word_embeddings.weight.data
    language = model.language_embeddings.weight.data
    rotation, _ = torch.linalg.qr(torch.randn(s.width, s.width))
    weight[s.shift :] = (weight[: s.shift] + language[0]) @ rotation - language[1]
    to_hf(model, place / "model")
    cell = evaluation.evaluate(place, "pos", (None, None), "cpu")
    assert cell["BZ"] < cell["source"] == pytest.approx(cell["BZ rotated"], abs=0.5)


def write_conllu(path: Path, sentences, upos=None) -> Path:
    lines = []
    for x in sentences:
        for i, row in enumerate(zip(x.words, x.upos, x.heads, x.deprels, strict=True), start=1):
            word, tag, head, deprel = row
            lines.append(f"{i}\t{word}\t_\t{upos or tag}\t_\t_\t{head}\t{deprel}\t_\t_\n")
        lines.append("\n")
    path.write_text("".join(lines))
    return path


def test_a_tag_that_training_never_had_is_one_line_that_names_it(
    folder, tmp_path, monkeypatch, capfd
):
    training = write_conllu(tmp_path / "a.conllu", synth_lang.generate(20, 1))
    test = write_conllu(tmp_path / "b.conllu", synth_lang.generate(5, 2), upos="NEVER")
    line = failure(
        monkeypatch, capfd, "pos", folder / "one", "--train", training, "--test", test
    )
    assert "'NEVER'" in line and "b.conllu" in line and "a.conllu" in line


@pytest.mark.parametrize("text", ["", "\n\n", "1\tone\n", "caf\xe9"])
def test_a_damaged_treebank_is_one_line_that_names_it(text, folder, tmp_path, monkeypatch, capfd):
    (tmp_path / "bad.conllu").write_text(text, encoding="latin-1")
    good = write_conllu(tmp_path / "good.conllu", synth_lang.generate(20, 1))
    for pair in (tmp_path / "bad.conllu", good), (good, tmp_path / "bad.conllu"):
        line = failure(
            monkeypatch, capfd, "pos", folder / "one", "--train", pair[0], "--test", pair[1]
        )
        assert "bad.conllu" in line


def remove_model(run: Path) -> None:
    (run / "model" / "model.safetensors").unlink()


def cut_model(run: Path) -> None:
    path = run / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def settings_with(content: str):
    return lambda run: (run / "settings.json").write_text(content)


def with_source(**changes):
    def damage(run: Path) -> None:
        record = json.loads((run / "settings.json").read_text())
        record["source"] |= changes
        (run / "settings.json").write_text(json.dumps(record))

    return damage


@pytest.mark.parametrize(
    "damage, name",
    [
        (lambda run: (run / "settings.json").unlink(), "settings.json"),
        (settings_with("{"), "settings.json"),
        (settings_with("[]"), "settings.json"),
        (settings_with('{"settings": {"unknown": 1}, "source": {}}'), "settings.json"),
        (settings_with('{"settings": {"width": "wide"}, "source": {}}'), "settings.json"),
        (with_source(corpus=7), "settings.json"),
        (with_source(sentences=None), "settings.json"),
        (with_source(unknown=1), "settings.json"),
        (remove_model, "model.safetensors"),
        (cut_model, "model.safetensors"),
    ],
)
def test_an_unfinished_or_damaged_run_is_one_line_that_names_the_file(
    damage, name, folder, tmp_path, monkeypatch, capfd
):
    run = tmp_path / "one"
    for path in (folder / "one").rglob("*"):
        if path.is_file():
            copied = run / path.relative_to(folder / "one")
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
    damage(run)
    (run / "pos.json").unlink(missing_ok=True)
    assert str(run) in (line := failure(monkeypatch, capfd, "pos", run)) and name in line
    assert not (run / "pos.json").exists()


def squad_part(folder: Path) -> Path:
    squad = json.loads((DATA / "qa" / "xquad.en.json").read_text())
    (folder / "squad.json").write_text(json.dumps({"data": squad["data"][:2]}))
    return folder / "squad.json"


def test_natural_text_from_treebank_to_report(tmp_path, monkeypatch):
    if not DATA.exists():
        pytest.skip("the data is not here")
    treebank = (DATA / "ud" / "en_ewt-ud-dev.conllu").read_text(encoding="utf-8")
    blocks = treebank.split("\n\n")
    (tmp_path / "train.conllu").write_text("\n\n".join(blocks[:300]) + "\n\n", encoding="utf-8")
    (tmp_path / "test.conllu").write_text("\n\n".join(blocks[:50]) + "\n\n", encoding="utf-8")
    text = (DATA / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")[:60_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(train, "BLOCK", 50)
    run, files = tmp_path / "runs" / "one", [tmp_path / f"{x}.conllu" for x in ("train", "test")]
    pretrain(monkeypatch, run, "--corpus", tmp_path / "text.txt", "--treebank", files[0])
    with pytest.raises(ValueError, match="--train"):
        evaluation.evaluate(run, "pos", (None, None), "cpu")
    cell = evaluation.evaluate(run, "pos", tuple(map(str, files)), "cpu")
    assert cell["source"] > 15 and cell["BS"] > 15
    for task, data in ("ner", DATA / "ner" / "en_ewt-ud-dev.iob2"), ("qa", squad_part(tmp_path)):
        assert 0 <= evaluation.evaluate(run, task, (str(data),) * 2, "cpu")["BZ"] <= 100
    assert "| ALIGN-MLM |" in evaluation.report(run.parent, run.parent)


# --------------------------------------------------------------------------------------- report


def settings_of(objective: str, transform: str, seed: int, **changes) -> dict:
    s = preset("tiny", objective=objective, transform=transform, seed=seed, **changes)
    return dataclasses.asdict(s)


def write_cells(root: Path, order=lambda cells: cells) -> list[dict]:
    """Two seeds of every objective, under two transformations."""
    rng = np.random.default_rng(0)
    cells = []
    for transform, objective, seed in itertools.product(
        ("transliterate+invert", "transliterate"), OBJECTIVES, (0, 1)
    ):
        source, bs, bz, rotated, everywhere, outside = rng.uniform(0, 100, 6)
        cells.append({
            "task": "pos", "objective": objective, "transform": transform, "seed": seed,
            "source": source, "BZ": bz, "BS": bs, "Delta": bz - bs, "BZ rotated": rotated,
            "other measures": {},
            "alignment": {"all": everywhere, "outside": outside, "outside rotated": None},
            "settings": settings_of(objective, transform, seed), "text": {"corpus": []},
            "files": [None, None], "seconds": 1.0,
        })  # fmt: skip
    for cell in order(cells):
        place = root / f"{cell['transform']}-{cell['objective']}-{cell['seed']}"
        place.mkdir(parents=True)
        (place / "pos.json").write_text(json.dumps(cell))
    return cells


def test_the_table_has_the_mean_and_spread_of_the_seeds(tmp_path):
    cells = write_cells(tmp_path)
    text = evaluation.report(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "report.md").read_text() == text
    rows = [re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and len(rows) == 2 + 8
    assert [row[1] for row in rows[2:]] == 2 * ["MLM", "XLM", "DICT-MLM", "ALIGN-MLM"]
    for row in rows[2:]:
        same = [
            c for c in cells
            if (c["transform"], evaluation.NAMES[c["objective"]]) == (row[0], row[1])
        ]  # fmt: skip
        assert len(same) == 2 and row[2] == "2"
        columns = [[c[k] for c in same] for k in evaluation.SCORES]
        columns += [[c["alignment"][k] for c in same] for k in ("all", "outside")]
        assert row[10] == "-"
        for entry, (one, other) in zip(row[3:10], columns, strict=True):
            mean, deviation = (one + other) / 2, abs(one - other) / 2**0.5
            assert entry == f"{mean:.1f} ± {deviation:.1f}"
        objective = next(o for o, name in evaluation.NAMES.items() if name == row[1])
        assert [float(x) for x in row[11:]] == list(PUBLISHED[row[0], objective][4:])
    values = [[c["alignment"]["all"] for c in cells], [-c["Delta"] for c in cells]]
    means = np.reshape(values, (2, 8, 2)).mean(-1)  # over seeds, which are no cells of their own
    assert f"{scipy.stats.spearmanr(*means).statistic:.3f} (" in text and "8 rows" in text


def test_one_seed_has_no_spread_and_another_transformation_no_published_row(tmp_path):
    cell = {
        "objective": "xlm", "condition": "permute", "seed": 0, "source": 1.0, "BS": 2.0, "BZ": 3.0,
        "Delta": 1.0, "BZ rotated": 5.0,
        "alignment": {"all": 4.0, "outside": None, "outside rotated": 0.5},
        "other measures": {"exact match": {"BZ": 9.0}},
    }  # fmt: skip
    lines = evaluation.table("qa", [cell]).splitlines()
    assert lines[0] == "QA, F1:" and lines[-1] == "exact match, BZ: XLM 9.0."
    row = "| permute | XLM | 1 | 1.0 | 2.0 | 3.0 | 1.0 | 5.0 | 4.0 | - | 0.5 | - | - | - |"
    assert lines[-3] == row


@pytest.mark.parametrize("change", [{}, {"text": {"corpus": ["x"]}}, {"files": ["a", "b"]}])
def test_cells_of_another_text_are_no_seeds_of_the_same(change, tmp_path, monkeypatch, capfd):
    cell = write_cells(tmp_path)[0]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "pos.json").write_text(json.dumps(cell | change))
    if "text" in change:
        evaluation.report(tmp_path, tmp_path / "out")
        text = (tmp_path / "out" / "report.md").read_text()
        assert sum(line.startswith("| transliterate") for line in text.splitlines()) == 9
    else:
        assert "more than once" in failure(monkeypatch, capfd, "report", tmp_path)


def test_an_ablations_cells_are_told_apart_by_what_varies(tmp_path):
    for alpha, seed in itertools.product((0.1, 10.0), range(3)):
        cell = write_cells(tmp_path / f"{alpha}{seed}")[0] | {"seed": seed}
        cell["settings"] = settings_of("mlm", "transliterate+invert", seed, alpha=alpha)
        (tmp_path / f"cell-{alpha}-{seed}").mkdir()
        (tmp_path / f"cell-{alpha}-{seed}" / "pos.json").write_text(json.dumps(cell))
    table = evaluation.report(tmp_path, tmp_path / "out").splitlines()
    rows = [line.split(" | ")[:3] for line in table if line.startswith("| transliterate")]
    assert rows == [
        [f"| transliterate+invert, alpha {alpha}", "MLM", "3"] for alpha in (0.1, 10.0)
    ]


def test_the_report_is_the_same_byte_for_byte_in_whatever_order_runs_finished(tmp_path):
    outputs = []
    for name, order in (("a", list), ("b", lambda cells: cells[::-1])):
        write_cells(tmp_path / name, order)
        evaluation.report(tmp_path / name, tmp_path / name / "out")
        outputs.append({p.name: p.read_bytes() for p in (tmp_path / name / "out").iterdir()})
    assert outputs[0] == outputs[1]
    assert outputs[0].keys() == {"results.json", "report.md", "delta.png", "alignment.png"}
    for name in ("delta.png", "alignment.png"):
        assert outputs[0][name].startswith(b"\x89PNG") and len(outputs[0][name]) > 5_000
    cells = json.loads(outputs[0]["results.json"])
    keys = [(c["transform"], OBJECTIVES.index(c["objective"]), c["seed"]) for c in cells]
    assert keys == sorted(keys) and len(keys) == 16


def test_runs_are_sorted_by_number_of_seed(tmp_path):
    for seed in (10, 9, 2):
        (tmp_path / f"{seed}").mkdir()
        cell = write_cells(tmp_path / f"other{seed}")[0] | {"seed": seed}
        (tmp_path / f"{seed}" / "pos.json").write_text(json.dumps(cell))
    assert [cell["seed"] for cell in evaluation.read_cells(tmp_path)] == [2, 9, 10]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "7", "\xff", '{"objective": "mlm"}'])
def test_a_cell_that_is_none_is_one_line_that_names_it(content, tmp_path, monkeypatch, capfd):
    write_cells(tmp_path)
    path = tmp_path / "transliterate-mlm-0" / "pos.json"
    path.write_text(content, encoding="latin-1")
    assert str(path) in failure(monkeypatch, capfd, "report", tmp_path)
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "results.json").exists()


KEYS = *evaluation.SCORES, "seed", "alignment", "transform", "settings", "task"


@pytest.mark.parametrize("key", KEYS)
def test_a_cell_without_a_number_is_one_line_that_names_it(key, tmp_path, monkeypatch, capfd):
    (cell, *_) = write_cells(tmp_path)
    for value in (None, {}) if key in ("transform", "settings", "task") else (None, {}, "much"):
        path = tmp_path / "transliterate+invert-mlm-0" / "pos.json"
        path.write_text(json.dumps(cell | {key: value}))
        assert str(path) in failure(monkeypatch, capfd, "report", tmp_path)


def test_a_folder_without_a_finished_run_is_one_line_that_names_it(tmp_path, monkeypatch, capfd):
    (tmp_path / "unfinished").mkdir()
    assert str(tmp_path) in failure(monkeypatch, capfd, "report", tmp_path)
    assert str(tmp_path / "no") in failure(monkeypatch, capfd, "report", tmp_path / "no")


def test_the_grid_runs_every_cell_keeps_the_finished_and_reports(tmp_path, monkeypatch, capfd):
    files = [write_conllu(tmp_path / f"{n}.conllu", synth_lang.generate(n, n)) for n in (40, 1500)]
    argv = [
        "grid", "--out", tmp_path / "runs", "--objectives", "xlm", "--seeds", 1, "--jobs", 2,
        "--treebank", files[1], "--train", files[0], "--test", files[0],
        *itertools.chain(*SIZES.items()), "--device", "cpu",
    ]  # fmt: skip
    command(monkeypatch, evaluation, *argv)
    out = capfd.readouterr().out
    cells = [json.loads(p.read_text()) for p in sorted((tmp_path / "runs").glob("*/pos.json"))]
    assert [(c["objective"], c["seed"]) for c in cells] == [("xlm", 0)]
    assert out.count("| XLM |") == 1
    (result,) = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert result["condition"] == result["transform"] and result["BZ"] == cells[0]["BZ"]

    monkeypatch.setattr(evaluation, "run_cell", None)  # a cell run again would fail
    command(monkeypatch, evaluation, *argv)
    assert out.endswith(capfd.readouterr().out)

    other = write_conllu(tmp_path / "other.conllu", synth_lang.generate(5, 5))
    argv[argv.index("--test") + 1] = other
    assert "pos.json" in failure(monkeypatch, capfd, *argv)
    (tmp_path / "runs" / "transliterate+invert-xlm-0" / "pos.json").write_text("[")
    assert "pos.json" in failure(monkeypatch, capfd, *argv)


def grid_arguments(monkeypatch, *argv) -> dict[Path, Settings]:
    """The cells of a command line."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "grid", lambda args: found.append(evaluation.grid_cells(args)))
        command(patch, evaluation, "grid", "--out", "here", *argv)
    return found[0]


def test_a_grid_is_every_objective_transformation_value_and_seed(monkeypatch):
    cells = grid_arguments(
        monkeypatch, "--objectives", "align", "xlm", "--seeds", 3, "--vary", "alpha", "0.1", "10",
        "--transforms", "transliterate", "permute", "--steps", 7, "--warmup", 3,
    )  # fmt: skip
    assert len(cells) == 2 * 3 * 2 * 2
    kinds = {(s.objective, s.transform, s.alpha, s.seed, s.languages) for s in cells.values()}
    assert kinds == {
        (o, t, a, seed, 1 + (o == "xlm"))
        for o in ("align", "xlm") for t in ("transliterate", "permute") for a in (0.1, 10)
        for seed in range(3)
    }  # fmt: skip
    assert {s.steps for s in cells.values()} == {7}
    assert {path.parent for path in cells} == {Path("here")}
    steps = grid_arguments(monkeypatch, "--vary", "steps", "5", "--seeds", 1)
    assert {s.steps for s in steps.values()} == {5}


@pytest.mark.parametrize("argv", [
    ["--vary", "alpha"], ["--vary", "transform", "invert"], ["--vary", "no", "1"],
    ["--vary", "alpha", "much"], ["--vary", "steps", "1.5"], ["--vary", "alpha", "1", "--alpha", 2],
    ["--seed", 1], ["--train", "a", "b"], ["--seeds", 0], ["--threads", -1], ["--jobs", "x"],
    ["--vary", "seed", 1], ["--vary", "languages", 2], ["--train", "missing", "--test", "missing"],
    ["--corpus", __file__], ["--mask-share", 0.01], ["--tune-length", 1],
    ["--tasks", "pos", "ner", "--test", "a"], ["--minutes", 0], ["--minutes", "nan"],
    ["--transforms", "invart"], ["--tasks", "sum"],
])  # fmt: skip
def test_a_grid_that_cannot_be_is_one_line(argv, tmp_path, monkeypatch, capfd):
    failure(monkeypatch, capfd, "grid", "--out", tmp_path / "runs", *argv)
    assert not (tmp_path / "runs").exists()


def hold(folder: Path, ready) -> None:
    with train.claim(folder) as mine:
        ready.put(mine)
        time.sleep(60)


def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capfd):
    argv = [
        "grid", "--out", tmp_path / "runs", "--objectives", "mlm", "--seeds", 1, "--jobs", 1,
        "--sentences", 1500, *itertools.chain(*SIZES.items()), "--device", "cpu",
        "--vary", "rate", "1e6", "0.003",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
    with pytest.raises(SystemExit) as left:
        train.guarded(evaluation.main)
    assert left.value.code == 2 and "1 cells failed" in capfd.readouterr().err
    assert len(list((tmp_path / "runs").glob("*/pos.json"))) == 1


def test_a_claim_is_one_processs_until_that_is_dead(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Queue()
    owner = context.Process(target=hold, args=(tmp_path / "cell", ready))
    owner.start()
    assert ready.get(timeout=60)
    with train.claim(tmp_path / "cell") as mine:
        assert not mine
    assert evaluation.run_cell(
        tmp_path / "cell", None, None, {}, "cpu", 1, math.inf, {}
    ) is None  # fmt: skip
    owner.kill()
    owner.join()
    for _ in range(2):
        with train.claim(tmp_path / "cell") as mine:
            assert mine
            (tmp_path / "cell" / "settings.json").touch()
    with train.claim(tmp_path / "empty"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["cell"]


ORPHAN = """
import multiprocessing, os, sys, time
sys.path.insert(0, sys.argv[1])
import train

def work():
    train.follow_parent()
    time.sleep(600)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    print(process.pid, flush=True)
    time.sleep(600)
"""


def test_a_worker_ends_with_its_parent_even_by_sigkill(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    command = [sys.executable, tmp_path / "orphan.py", Path(train.__file__).parent]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        worker = Path("/proc", parent.stdout.readline().strip(), "cmdline")
        assert worker.read_text()
        parent.kill()
    deadline = time.monotonic() + 120
    while worker.exists() and worker.read_text():  # a zombie's is empty
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_cell_whose_time_is_over_is_saved_and_goes_on_to_the_same_numbers(
    few_sentences, tmp_path, monkeypatch
):
    given = {k.strip("-").replace("-", "_"): v for k, v in SIZES.items()} | {"steps": 60}
    s, source = preset("tiny", objective="mlm", **given), train.Source(sentences=1500)
    options = {"save_every": 1000, "accumulate": 1, "compiled": False, "keep_every": 0}
    tasks = {"pos": (None, None)}
    train.prepare(source, s, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")

    def cell(name, seconds):
        folder = tmp_path / name / "cell"
        until = time.time() + seconds
        return evaluation.run_cell(folder, s, source, tasks, "cpu", 1, until, options)

    whole = cell("whole", math.inf)
    draw = train.make_batch

    def slow(*args):
        time.sleep(0.1)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_batch", slow)
        assert cell("cut", 2) is None
    assert list((tmp_path / "cut" / "cell").glob("checkpoint-*"))
    for a, b in zip(whole, cell("cut", math.inf), strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}


def test_the_curve_is_of_the_models_kept_along_pre_training(
    few_sentences, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "one"
    pretrain(monkeypatch, run, "--sentences", 1500, "--keep-every", 20)
    command(monkeypatch, evaluation, "curve", run)
    points = json.loads((run / "curve.json").read_text())
    assert [point["step"] for point in points] == [20, 40]
    cell = evaluation.evaluate(run, "pos", (None, None), "cpu")
    for key in ("objective", "transform", "seed", "source", "BZ", "alignment"):
        assert points[-1][key] == cell[key]  # the last one is the model of the end
    evaluation.report(tmp_path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "curves.json").read_text()) == [points]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_kept_no_models_has_no_curve(folder, monkeypatch, capfd):
    assert "--keep-every" in failure(monkeypatch, capfd, "curve", folder / "one")
