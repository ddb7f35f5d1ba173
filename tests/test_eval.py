"""Tags that follow their words, zero-shot scores, and a report that says what its runs say."""

import copy
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import eval as evaluation
import synth_lang
import train
from alignmlm import BOS, EOS, OBJECTIVES, PAD, SPECIALS
from alignmlm import MaskedLM, Settings, to_hf
from eval import PUBLISHED, PUBLISHED_COLUMNS, UNTAGGED, Tagged

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


# --------------------------------------------------------------------------------- POS tagging


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
    languages, tags = make_languages(transform), TAGS
    given = [
        synth_lang.Sentence([w for w, _ in words], upos=[t for _, t in words])
        for words in sentences
    ]
    for derived in (False, True):
        data = evaluation.encode_tagged(given, tags, languages, derived, length)
        assert data.language == derived
        assert len(data.tokens) == len(data.tags) == len(given)
        for index, (sentence, ids, labels) in enumerate(
            zip(given, data.tokens, data.tags, strict=True)
        ):
            if derived:
                sentence = languages.derive(sentence, index)
            expected_ids, expected_labels = [BOS], [UNTAGGED]
            for word, tag in zip(sentence.words, sentence.upos, strict=True):
                pieces = [id + derived * languages.shift for id in languages.pieces.encode(word)]
                expected_ids += pieces
                expected_labels += [tags.index(tag)] + (len(pieces) - 1) * [UNTAGGED]
            assert ids.tolist() == [*expected_ids[: length - 1], EOS]
            assert labels.tolist() == [*expected_labels[: length - 1], UNTAGGED]


@given(st.lists(TAGGED_WORDS, min_size=1, max_size=4), st.sampled_from(TRANSFORMS))
@settings(deadline=None)
def test_each_word_has_the_same_tag_in_both_languages(make_languages, sentences, transform):
    """An oracle that knows nothing of the transformations: words are told by their number."""
    languages, tags = make_languages(transform), [str(n) for n in range(12)]
    given = [
        synth_lang.Sentence([w for w, _ in words], upos=[str(n) for n in range(len(words))])
        for words in sentences
    ]
    original, derived = (
        evaluation.encode_tagged(given, tags, languages, side, 999) for side in (False, True)
    )
    for index in range(len(given)):
        words = [{}, {}]
        for known, data in zip(words, (original, derived), strict=True):
            for id, label in zip(data.tokens[index][1:-1], data.tags[index][1:-1], strict=True):
                number = number if label == UNTAGGED else label  # noqa: F821
                known.setdefault(number, []).append(id)
        shifted = {n: [id + languages.shift for id in ids] for n, ids in words[0].items()}
        assert words[1] == shifted


LENGTHS = st.lists(st.integers(2, 20), min_size=1, max_size=60)


def numbered(lengths: list[int]) -> Tagged:
    """Sentence i is made of the word SPECIALS + i."""
    return Tagged(
        [np.array([BOS, *[SPECIALS + i] * (n - 2), EOS]) for i, n in enumerate(lengths)],
        [np.array([UNTAGGED, *[i] * (n - 2), UNTAGGED]) for i, n in enumerate(lengths)],
        0,
    )


@given(LENGTHS, st.integers(1, 9), st.none() | st.integers(0, 99))
def test_batches_hold_every_sentence_once_padded_at_its_end(lengths, size, seed):
    data = numbered(lengths)
    rng = None if seed is None else np.random.default_rng(seed)
    pairs = list(evaluation.batches(data, size, rng))
    assert len(pairs) == -(-len(lengths) // size)
    rows = []
    for tokens, tags in pairs:
        assert tokens.shape == tags.shape and len(tokens) <= size
        assert (tokens[:, -1] != PAD).any()  # no wider than its longest
        for row, labels in zip(tokens.tolist(), tags.tolist(), strict=True):
            end = row.index(EOS) + 1
            assert set(row[end:]) <= {PAD} and set(labels[end:]) <= {UNTAGGED}
            rows.append((row[:end], labels[:end]))
    expected = zip(data.tokens, data.tags, strict=True)
    assert sorted(rows) == sorted((t.tolist(), labels.tolist()) for t, labels in expected)


def test_batches_are_shuffled_anew_in_every_epoch_and_alike_with_the_same_seed():
    def epochs():
        rng = np.random.default_rng(0)
        return [[t.tolist() for t, _ in evaluation.batches(data, 4, rng)] for _ in range(2)]

    data = numbered([5] * 100)
    first, second = epochs()
    assert first != second
    assert [first, second] == epochs()


class Parrot(nn.Module):
    """Guesses that a token's tag is its id, if it is asked in the right language."""

    def __init__(self, right):
        super().__init__()
        self.right, self.weight = right, nn.Parameter(torch.zeros(1))

    def forward(self, tokens, language):
        assert not self.training
        return nn.functional.one_hot(tokens * (language == self.right), 100).float()


PAIRS = st.tuples(st.integers(4, 9), st.integers(4, 9))  # of a word and its tag


@given(st.lists(st.lists(PAIRS), min_size=1), st.booleans())
def test_accuracy_is_the_percentage_of_words_tagged_right(sentences, language):
    pairs = [pair for sentence in sentences for pair in sentence]
    data = Tagged(
        [np.array([BOS, *[id for id, _ in sentence], EOS]) for sentence in sentences],
        [np.array([UNTAGGED, *[tag for _, tag in sentence], UNTAGGED]) for sentence in sentences],
        int(language),
    )
    if pairs:
        right = 100 * sum(id == tag for id, tag in pairs) / len(pairs)
        assert evaluation.accuracy(Parrot(language), data) == pytest.approx(right)
        assert evaluation.accuracy(Parrot(not language), data) == 0


def parity(rows: int, seed: int) -> Tagged:
    """Words tagged by whether their id is even."""
    words = np.random.default_rng(seed).integers(SPECIALS, 30, (rows, 8))
    return Tagged(
        [np.array([BOS, *row, EOS]) for row in words],
        [np.array([UNTAGGED, *(row % 2), UNTAGGED]) for row in words],
        0,
    )


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
    tagger = evaluation.fine_tune(encoder, parity(150, seed=0), 2, s)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    tuned = tagger.encoder.state_dict()
    moved = {name for name in before if not torch.equal(before[name], tuned[name])}
    unused = {name for name in before if name.startswith("head_")}
    assert moved == before.keys() - unused - ({"word_embeddings.weight"} if freeze else set())
    assert evaluation.accuracy(tagger, parity(50, seed=1)) > 95

    again = evaluation.fine_tune(encoder, parity(150, seed=0), 2, s)
    assert torch.equal(again.classifier.weight, tagger.classifier.weight)


# ----------------------------------------------------------------------------------- whole runs


@pytest.fixture
def few_sentences(monkeypatch):
    monkeypatch.setattr(evaluation, "TUNE_SENTENCES", 150)
    monkeypatch.setattr(evaluation, "TEST_SENTENCES", 60)


def test_from_text_to_scores_on_the_built_in_language(folder, few_sentences, monkeypatch, capsys):
    command(monkeypatch, evaluation, "pos", folder / "one")
    cell = json.loads((folder / "one" / "pos.json").read_text())
    assert json.loads(capsys.readouterr().out) == cell
    assert (cell["objective"], cell["transform"], cell["seed"]) == (
        "align", "transliterate+invert", 0,
    )  # fmt: skip
    assert cell["Delta"] == cell["BZ"] - cell["BS"]
    for score in (cell["source"], cell["BS"], cell["BZ"], *cell["alignment"].values()):
        assert 0 <= score <= 100
    assert cell["source"] > 15 and cell["BS"] > 15  # a guess has 6
    assert len(list(folder.glob("data-*"))) == 1  # the tokenised text is found again


def test_zero_shot_is_trained_on_the_original_and_tested_on_the_derived(
    folder, few_sentences, monkeypatch
):
    def fine_tune(model, data, tags, s):
        assert len(data.tokens) == evaluation.TUNE_SENTENCES
        return data.language

    def accuracy(trained_on, data):
        assert len(data.tokens) == evaluation.TEST_SENTENCES
        return {(0, 0): 1.0, (0, 1): 2.0, (1, 1): 3.0}[trained_on, data.language]

    monkeypatch.setattr(evaluation, "fine_tune", fine_tune)
    monkeypatch.setattr(evaluation, "accuracy", accuracy)
    cell = evaluation.pos(folder / "one", None, None, "cpu")
    assert [cell[k] for k in ("source", "BZ", "BS", "Delta")] == [1, 2, 3, -1]


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
    cell = evaluation.pos(place, None, None, "cpu")
    assert cell["source"] == cell["BZ"] == cell["BS"] and cell["Delta"] == 0
    assert cell["alignment"] == {"all": 100, "outside": 100}


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
        evaluation.pos(run, None, None, "cpu")
    cell = evaluation.pos(run, *map(str, files), "cpu")
    assert cell["source"] > 15 and cell["BS"] > 15
    assert "| ALIGN-MLM |" in evaluation.report(run.parent, run.parent)


# --------------------------------------------------------------------------------------- report


def write_cells(root: Path, order=lambda cells: cells) -> list[dict]:
    """Two seeds of every objective, under two transformations."""
    rng = np.random.default_rng(0)
    cells = []
    for transform, objective, seed in itertools.product(
        ("transliterate+invert", "transliterate"), OBJECTIVES, (0, 1)
    ):
        source, bs, bz, everywhere, outside = rng.uniform(0, 100, 5)
        cells.append({
            "objective": objective, "transform": transform, "seed": seed, "source": source,
            "BZ": bz, "BS": bs, "Delta": bz - bs,
            "alignment": {"all": everywhere, "outside": outside}, "seconds": 1.0,
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
        columns = [[c[k] for c in same] for k in ("source", "BS", "BZ", "Delta")]
        columns += [[c["alignment"][k] for c in same] for k in ("all", "outside")]
        for entry, (one, other) in zip(row[3:9], columns, strict=True):
            mean, deviation = (one + other) / 2, abs(one - other) / 2**0.5
            assert entry == f"{mean:.1f} ± {deviation:.1f}"
        objective = next(o for o, name in evaluation.NAMES.items() if name == row[1])
        assert [float(x) for x in row[9:]] == list(PUBLISHED[row[0], objective][4:])
    alignment, delta = [c["alignment"]["all"] for c in cells], [c["Delta"] for c in cells]
    rho = scipy.stats.spearmanr(alignment, [-d for d in delta]).statistic
    assert f"{rho:.3f}" in text


def test_one_seed_has_no_spread_and_another_transformation_no_published_row(tmp_path):
    cell = {
        "objective": "xlm", "transform": "permute", "seed": 0, "source": 1.0, "BS": 2.0, "BZ": 3.0,
        "Delta": 1.0, "alignment": {"all": 4.0, "outside": None}, "seconds": 1.0,
    }  # fmt: skip
    row = evaluation.table([cell]).splitlines()[-1]
    assert row == "| permute | XLM | 1 | 1.0 | 2.0 | 3.0 | 1.0 | 4.0 | - | - | - | - |"


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


@pytest.mark.parametrize("key", ["source", "BS", "BZ", "Delta", "seed", "alignment", "transform"])
def test_a_cell_without_a_number_is_one_line_that_names_it(key, tmp_path, monkeypatch, capfd):
    (cell, *_) = write_cells(tmp_path)
    for value in (None, {}) if key == "transform" else (None, {}, "much"):
        path = tmp_path / "transliterate+invert-mlm-0" / "pos.json"
        path.write_text(json.dumps(cell | {key: value}))
        assert str(path) in failure(monkeypatch, capfd, "report", tmp_path)


def test_a_folder_without_a_finished_run_is_one_line_that_names_it(tmp_path, monkeypatch, capfd):
    (tmp_path / "unfinished").mkdir()
    assert str(tmp_path) in failure(monkeypatch, capfd, "report", tmp_path)
    assert str(tmp_path / "no") in failure(monkeypatch, capfd, "report", tmp_path / "no")


def test_the_grid_runs_every_cell_keeps_the_finished_and_reports(tmp_path, monkeypatch, capsys):
    files = [write_conllu(tmp_path / f"{n}.conllu", synth_lang.generate(n, n)) for n in (40, 1500)]
    argv = [
        "grid", "--out", tmp_path / "runs", "--objectives", "xlm", "--seeds", 1, "--jobs", 2,
        "--treebank", files[1], "--train", files[0], "--test", files[0],
        *itertools.chain(*SIZES.items()), "--device", "cpu",
    ]  # fmt: skip
    command(monkeypatch, evaluation, *argv)
    out = capsys.readouterr().out
    cells = [json.loads(p.read_text()) for p in sorted((tmp_path / "runs").glob("*/pos.json"))]
    assert [(c["objective"], c["seed"]) for c in cells] == [("xlm", 0)]
    assert out.count("| XLM |") == 1
    assert json.loads((tmp_path / "runs" / "results.json").read_text()) == cells

    monkeypatch.setattr(evaluation, "run_cell", None)  # a cell run again would fail
    command(monkeypatch, evaluation, *argv)
    assert out.endswith(capsys.readouterr().out)
