"""Text to arrays, batches, and training that is the same however it is stopped, cut or shared."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import synth_lang
import train
from alignmlm import BOS, EOS, MASK, OBJECTIVES, PAD, SPECIALS
from alignmlm import MaskedLM, Settings, from_hf, make_dictionary

CODE = Path(train.__file__).parent
SOURCE = train.Source(sentences=1500)  # a thousand for the original language, 500 for the derived
SIZES = {
    "vocab_size": 300, "layers": 1, "width": 16, "heads": 2, "feed_forward": 32, "positions": 16,
    "tune_length": 16, "batch": 8, "steps": 50, "warmup": 5, "rate": 3e-3, "dropout": 0.1,
}  # fmt: skip


def tiny(**changes) -> Settings:
    given = {"objective": "mlm"} | SIZES | changes
    return Settings(**{"languages": 1 + (given["objective"] in ("xlm", "dict"))} | given)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Where this file's runs are; they share one tokenised text."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def signals_as_they_were():
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def reference(root):
    """The weights of a run that nothing stopped, by objective."""
    weights = {}

    def of(objective):
        if objective not in weights:
            weights[objective] = run(root / f"whole-{objective}", tiny(objective=objective))
        return weights[objective]

    return of


def run(folder: Path, s: Settings, **options) -> dict[str, torch.Tensor]:
    train.run(folder, s, SOURCE, "cpu", **options)
    return load_file(folder / "model" / "model.safetensors")


def languages_of(source: train.Source, s: Settings, root: Path) -> train.Languages:
    """Of a corpus that is made."""
    tokenizer = root / train.corpus_name(source, s) / "tokenizer.model"
    return train.Languages(tokenizer, s, synth_lang.SOV)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(weights, others, tolerance=0.0):
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], atol=tolerance, rtol=0, msg=name)


# ------------------------------------------------------------------------------ text to arrays


@given(st.lists(st.lists(st.integers(EOS, 99), max_size=30)), st.integers(2, 12))
def test_rows_without_their_bos_are_the_text_however_it_comes(pieces, length):
    text = [*itertools.chain(*pieces)]
    with tempfile.TemporaryDirectory() as folder:
        packer = train.Packer(Path(folder, "rows.bin"), length)
        for piece in pieces:
            packer.add(np.array(piece, np.int64))
        count = packer.close()
        rows = np.fromfile(Path(folder, "rows.bin"), np.int32).reshape(-1, length)
    assert count == len(rows) == len(text) // (length - 1)
    assert (rows[:, 0] == BOS).all()
    assert rows[:, 1:].ravel().tolist() == text[: count * (length - 1)]


@pytest.mark.parametrize("transform", ["transliterate+invert", "transliterate+permute", "syntax"])
def test_the_languages_come_from_different_halves_and_counterparts_stay_in_step(transform, root):
    s = tiny(transform=transform)
    corpus, languages = train.prepare(SOURCE, s, root), languages_of(SOURCE, s, root)
    texts = {"original": [], "derived": [], "counterpart": []}
    for index, sentence in enumerate(synth_lang.generate(1500, seed=0)):
        names = [name for name in transform.split("+") if name != "transliterate"]
        moved, _ = synth_lang.transform(sentence, names, index=index)
        for part, words in {
            "original": [] if 1000 <= index else sentence.words,
            "counterpart": [] if index < 1000 else sentence.words,
            "derived": [] if index < 1000 else moved.words,
        }.items():
            if words:
                ids = languages.encode(words, derived=part == "derived")
                texts[part] += [*itertools.chain(*ids), EOS]
    for part, text in texts.items():
        rows = getattr(corpus, part)
        assert rows[:, 1:].ravel().tolist() == text[: rows[:, 1:].size]
        assert len(text) - rows[:, 1:].size < s.positions
    assert corpus.derived.shape == corpus.counterpart.shape
    ends = corpus.counterpart == EOS
    np.testing.assert_array_equal(corpus.derived == EOS, ends)
    if s.shift:
        shared = np.intersect1d(corpus.original, corpus.derived)
        assert shared.tolist() == [BOS, EOS]


@pytest.fixture(scope="module")
def languages(root):
    train.prepare(SOURCE, tiny(), root)
    return languages_of(SOURCE, tiny(), root)


def test_the_specials_come_first_and_then_the_unknown(languages):
    names = [languages.pieces.id_to_piece(id) for id in range(SPECIALS + 1)]
    assert names == ["<s>", "<pad>", "</s>", "<mask>", "<unk>"]
    assert (BOS, PAD, EOS, MASK, languages.pieces.unk_id()) == (0, 1, 2, 3, SPECIALS)


@given(st.lists(st.one_of(st.text(), st.sampled_from(["", "<s>", "</s>", "<mask>", "<pad>", "▁"]))))
def test_no_word_is_empty_or_special_and_its_counterpart_is_as_long(languages, words):
    original, derived = (languages.encode(words, derived) for derived in (False, True))
    assert len(original) == len(derived) == len(words)
    for ids, moved in zip(original, derived, strict=True):
        assert len(ids) > 0
        assert all(SPECIALS <= id < 150 for id in ids)
        assert moved == [id + 150 for id in ids]


def test_the_text_is_tokenised_once_and_always_alike(root, tmp_path, monkeypatch):
    train.prepare(SOURCE, tiny(), root)
    train.prepare(SOURCE, tiny(), tmp_path)
    monkeypatch.setattr(train, "train_tokenizer", None)  # a second time would fail
    train.prepare(SOURCE, tiny(objective="align", seed=9), tmp_path)
    (mine,) = tmp_path.iterdir()
    for path in mine.glob("*.bin"):
        assert path.read_bytes() == (root / mine.name / path.name).read_bytes(), path.name


def test_of_two_runs_that_tokenise_side_by_side_the_later_takes_the_earliers(tmp_path, monkeypatch):
    first = train.train_tokenizer

    def overtaken(*args):
        monkeypatch.undo()
        train.prepare(SOURCE, tiny(), tmp_path)
        first(*args)

    monkeypatch.setattr(train, "train_tokenizer", overtaken)
    assert len(train.prepare(SOURCE, tiny(), tmp_path).original) > 0
    assert [path.name[:5] for path in tmp_path.iterdir()] == ["data-"]


LONG = train.Source(sentences=9_300)  # blocks enough for each of three workers, the last one cut


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("data-*/*.bin")}


@pytest.mark.parametrize("transform", ["permute", "syntax"])
def test_however_many_work_on_a_text_its_bytes_are_the_same(transform, tmp_path):
    s = tiny(transform=transform)
    for workers in (1, 3):
        train.prepare(LONG, s, tmp_path / str(workers), workers)
    one, three = content(tmp_path / "1"), content(tmp_path / "3")
    assert one == three and len(one) == 3
    languages = languages_of(LONG, s, tmp_path / "1")
    packers = {part: train.Packer(tmp_path / f"{part}.bin", s.positions) for part in train.PARTS}
    for index, sentence in enumerate(LONG.read()):  # and they are these, one by one
        derived = index // 1000 % 2 == 1
        add(packers["counterpart" if derived else "original"], languages, sentence.words, False)
        if derived:
            add(packers["derived"], languages, languages.derive(sentence, index).words, True)
    for part, packer in packers.items():
        packer.close()
        assert (tmp_path / f"{part}.bin").read_bytes() == one[f"{part}.bin"]


def add(packer: train.Packer, languages: train.Languages, words: list[str], derived: bool) -> None:
    packer.add(np.array([*itertools.chain(*languages.encode(words, derived)), EOS]))


def test_few_blocks_are_in_memory_at_a_time(languages):
    read = itertools.count()
    sentences = (next(read) * [] or synth_lang.Sentence(["a", "word"]) for _ in range(60_000))
    parts = train.tokenised(languages, sentences, workers=2)
    for number in range(40):
        next(parts)
        ahead = next(read) - 1000 * number  # asking counts too
        assert ahead <= 1000 * 8 + number + 1
    parts.close()


TOKENISE = """
import sys
sys.path += {paths!r}
import test_train as t
t.train.train_tokenizer = lambda *args: args[-1].write_bytes(t.Path({model!r}).read_bytes())
t.train.prepare(t.train.Source(sentences=10**7), t.tiny(), t.Path({folder!r}), workers=2)
"""


def test_what_a_run_killed_while_tokenising_leaves_goes_with_the_next_one(root, tmp_path):
    train.prepare(SOURCE, tiny(), root)
    model = next(root.glob("data-*/tokenizer.model"))
    paths = [str(CODE), str(Path(__file__).parent)]
    code = TOKENISE.format(paths=paths, model=str(model), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: any(p.stat().st_size for p in tmp_path.glob("making-data-*/*.bin")))
        (left,) = tmp_path.glob("making-data-*")
        train.prepare(SOURCE, tiny(), tmp_path)
        assert left.exists()  # its owner lives
    finally:
        process.kill()
        process.wait()
    for made in tmp_path.glob("data-*"):
        shutil.rmtree(made)

    def taken_away() -> bool:  # once its workers have ended too
        with train.making(tmp_path):
            return not left.exists()

    wait_until(taken_away)


def wait_until(true) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --------------------------------------------------------------------------------------- batches


@given(st.integers(1, 40), st.integers(1, 25), st.integers(0, 9), st.integers(0, 99))
def test_every_epoch_is_a_permutation_wherever_one_starts(rows, count, start, seed):
    drawn = [train.draw(rows, count, step, (seed, 1)) for step in range(start, start + 12)]
    train.shuffled.cache_clear()
    again = [train.draw(rows, count, step, (seed, 1)) for step in range(start + 12)]
    np.testing.assert_array_equal(drawn, again[start:])
    stream = np.concatenate(again)
    for first in range(0, len(stream) - rows + 1, rows):
        assert sorted(stream[first : first + rows]) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [train.draw(50, 50, epoch, (seed, 1)) for epoch in range(3) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def numbered_corpus(s: Settings, sentences: int = 45) -> train.Corpus:
    """Sentence n is the word SPECIALS + n again and again; with BOS it fills half a row."""
    text = np.repeat(SPECIALS + np.arange(sentences), s.positions // 2 - 1)
    text[s.positions // 2 - 2 :: s.positions // 2 - 1] = EOS
    width = s.positions - 1
    rows = text[: len(text) // width * width].reshape(-1, width)
    rows = np.insert(rows, 0, BOS, axis=1).astype(np.int32)
    derived = np.where(rows < SPECIALS, rows, rows + s.shift)
    return train.Corpus(rows, derived, rows, s.positions)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_is_half_original_half_derived_and_masked(objective):
    s = tiny(objective=objective, translate_probability=1.0)
    corpus, pairs = numbered_corpus(s), make_dictionary(s)
    batch, again = (train.make_batch(corpus, s, pairs, step=3) for _ in range(2))
    for name, array in vars(batch).items():
        width = round(0.15 * 16) if name in ("masked", "labels") else 16
        assert array.shape == (8, width) and array.dtype == np.int64
        np.testing.assert_array_equal(array, getattr(again, name))
    other = train.make_batch(corpus, s, pairs, step=4)
    assert not np.array_equal(batch.tokens, other.tokens)
    assert not np.array_equal(batch.masked, other.masked)

    half = 2 if objective == "xlm" else 4
    untouched = np.ones(batch.tokens.shape, bool)
    np.put_along_axis(untouched, batch.masked, False, axis=1)
    derived = batch.tokens >= s.shift
    untouched &= batch.tokens >= SPECIALS
    assert not derived[:half][untouched[:half]].any()
    assert derived[half : 2 * half][untouched[half : 2 * half]].all()
    np.testing.assert_array_equal(derived[untouched], batch.languages[untouched])
    assert (batch.positions[: 2 * half] == np.arange(16)).all()
    assert (batch.positions[2 * half :] == [*range(8), *range(8)]).all()
    asked = np.take_along_axis(batch.languages, batch.masked, axis=1)  # at the masked places
    np.testing.assert_array_equal(batch.labels >= s.shift, asked)
    if objective != "xlm":
        translated = asked != (np.arange(8)[:, None] >= 4)
        expected = np.isin(batch.labels, pairs) & (objective == "dict")
        np.testing.assert_array_equal(translated, expected)


@pytest.mark.parametrize("share, sentences", [(0.01, 1), (0.25, 12), (1.0, 45)])
def test_pairs_are_counterparts_from_the_parallel_share_of_the_text(share, sentences):
    s = tiny(objective="xlm", parallel_share=share)
    corpus, seen = numbered_corpus(s), set()
    for step in range(30):
        batch = train.make_batch(corpus, s, make_dictionary(s), step)
        for row in range(4, 8):
            whole = batch.tokens[row].copy()
            whole[batch.masked[row]] = batch.labels[row]
            (number,) = set(whole[1:7])
            assert whole.tolist() == [BOS, *[number] * 6, EOS, BOS, *[number + s.shift] * 6, EOS]
            seen.add(number - SPECIALS)
    assert seen == set(range(sentences))


@pytest.mark.parametrize("transform", ["transliterate", "transliterate+invert", "syntax"])
def test_pairs_are_sentences_and_their_counterparts_but_for_two_words_at_most(transform, root):
    s = tiny(transform=transform, positions=32)
    corpus = train.prepare(SOURCE, s, root)
    ids = train.derived_ids(s)
    texts = [side[:, 1:].ravel() for side in (corpus.counterpart, corpus.derived)]
    expected = []
    for begin in [0, *np.flatnonzero(texts[0] == EOS) + 1]:
        window = texts[0][begin : begin + 15]
        if len(window) == 15 and EOS in window[-3:]:
            expected.append(begin)
    assert corpus.starts.tolist() == expected and len(expected) >= 20
    original, derived = corpus.pairs(np.arange(len(corpus.starts)))
    for start, one, other in zip(corpus.starts, original, derived, strict=True):
        for text, side in zip(texts, (one, other), strict=True):
            assert side.tolist() == [BOS, *text[start : start + 15]]
        assert np.isin(other[1:], ids[one[1:]]).sum() >= 13


def test_where_no_sentence_ends_near_half_a_row_the_nearest_is_taken():
    text = np.arange(90) % 50 + SPECIALS
    text[[9, 22, 40, 63, 83, 89]] = EOS  # half a row has 7 ids, more than are left after the fifth
    rows = np.insert(text.reshape(-1, 15), 0, BOS, axis=1)
    corpus = train.Corpus(rows, rows, rows, 16)
    assert corpus.starts.tolist() == [0, 10, 23, 41, 64]


@given(st.integers(4, 20), st.integers(4, 20), st.integers(40, 90), st.integers(0, 5))
def test_rows_of_any_length_are_the_running_text_in_some_order(stored, length, size, epoch):
    size -= size % (stored - 1)
    rows = np.insert(np.arange(100, 100 + size).reshape(-1, stored - 1), 0, BOS, axis=1)
    corpus = train.Corpus(rows, rows, rows, length)
    count = size // (length - 1)
    drawn = corpus.rows(rows, count, epoch, (0, 1))
    assert drawn.shape == (count, length) and (drawn[:, 0] == BOS).all()
    text = drawn[np.argsort(drawn[:, 1]), 1:].ravel()
    assert text.tolist() == list(range(100, 100 + count * (length - 1)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_of_short_rows_is_one_of_the_same_text_packed_so(objective, root):
    long, short = tiny(objective=objective, positions=64), tiny(objective=objective, positions=32)
    corpus, packed = train.prepare(SOURCE, long, root), []
    for side in (corpus.original, corpus.derived, corpus.counterpart):
        text = side[:, 1:].ravel()
        text = text[: len(text) // 31 * 31].reshape(-1, 31)
        packed.append(np.insert(text, 0, BOS, axis=1))
    pairs, short = make_dictionary(long), dataclasses.replace(short, batch=2 * long.batch)
    for step in range(3):
        one = train.make_batch(dataclasses.replace(corpus, length=32), long, pairs, step)
        other = train.make_batch(train.Corpus(*packed, 32), short, pairs, step)
        assert one.tokens.shape == (2 * long.batch, 32)
        for name, array in vars(one).items():
            np.testing.assert_array_equal(array, getattr(other, name))


@given(st.integers(1, 50), st.integers(1, 200))
def test_the_rate_rises_to_its_peak_and_falls_to_zero_on_straight_lines(warmup, more):
    s = tiny(warmup=warmup, steps=warmup + more, rate=2.0)
    rates = np.array([train.rate_at(step, s) for step in range(s.steps + 1)])
    np.testing.assert_allclose(rates[:warmup], 2 * np.arange(1, warmup + 1) / warmup)
    np.testing.assert_allclose(rates[warmup:], 2 * np.arange(more, -1, -1) / more)


# -------------------------------------------------------------------------------------- training


class Killed(BaseException):
    """Nothing in train.py catches it, as nothing catches SIGKILL."""


def kill_before(monkeypatch, last: int) -> None:
    """The process dies as it begins step number `last`, counted from 0."""
    rate_at = train.rate_at

    def rate_or_death(step, s):
        if step == last:
            raise Killed
        return rate_at(step, s)

    monkeypatch.setattr(train, "rate_at", rate_or_death)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_killed_and_started_again_ends_with_the_same_bits(
    objective, root, reference, monkeypatch
):
    folder, s = root / f"killed-{objective}", tiny(objective=objective)
    for last in (25, 42):  # saved at 15 and 30, and logged since
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_before(patch, last)
            run(folder, s, save_every=15)
    assert not (folder / "model").exists()
    assert_same(run(folder, s, save_every=15), reference(objective))
    steps = [line["step"] for line in log_of(folder)]
    assert steps == sorted(set(steps)) and steps[-1] == 50
    assert not list(folder.glob("checkpoint-*"))


def test_the_seed_decides_and_a_finished_run_is_left_alone(root, reference):
    other = run(root / "seed-1", tiny(seed=1))
    assert not torch.equal(other["lm_head.bias"], reference("mlm")["lm_head.bias"])
    times = {path: path.stat().st_mtime_ns for path in (root / "seed-1").rglob("*")}
    run(root / "seed-1", tiny(seed=1))
    assert times == {path: path.stat().st_mtime_ns for path in (root / "seed-1").rglob("*")}


def arguments(folder: Path, s: Settings, *more) -> list[str]:
    """Of train.py, every setting named."""
    flags = {True: "--freeze-embeddings", False: "--no-freeze-embeddings"}
    named = {k: v for k, v in vars(s).items() if k != "freeze_embeddings"}
    given = itertools.chain(*((f"--{k.replace('_', '-')}", v) for k, v in named.items()))
    options = "--device", "cpu", "--sentences", SOURCE.sentences, flags[s.freeze_embeddings]
    return [str(x) for x in (folder, *options, *given, *more)]


def start(folder: Path, s: Settings, save_every: int) -> subprocess.Popen:
    command = [sys.executable, CODE / "train.py", *arguments(folder, s, "--threads", 1)]
    return subprocess.Popen([*command, "--save-every", str(save_every)], stderr=subprocess.PIPE)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    def reached() -> bool:
        assert process.poll() is None, process.stderr.read().decode()
        log = folder / "log.jsonl"
        return log.exists() and any(line["step"] >= step for line in log_of(folder))

    wait_until(reached)


def test_real_processes_stopped_by_sigterm_and_by_sigkill_lose_nothing(root):
    s = tiny(objective="dict", steps=400)
    folder = root / "stopped"
    process = start(folder, s, save_every=1000)  # so that only the signal can have saved it
    wait_for_step(process, folder, 20)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and b"Traceback" not in errors
    (saved,) = folder.glob("checkpoint-*")  # at the very step that it was stopped at
    assert int(re.findall(r"\d+", saved.name)[0]) == log_of(folder)[-1]["step"] < 400

    process = start(folder, s, save_every=20)
    wait_for_step(process, folder, log_of(folder)[-1]["step"] + 60)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / "model").exists()
    assert_same(run(folder, s), run(root / "never-stopped", s))
    steps = [line["step"] for line in log_of(folder)]
    assert steps == sorted(set(steps)) and steps[-1] == 400


@pytest.mark.parametrize("accumulate", [1, 4])
def test_short_rows_come_first_and_a_stop_among_them_shows_nowhere(accumulate, root, monkeypatch):
    s = tiny(objective="xlm", positions=64, steps=6, short_steps=4)
    whole = run(root / f"grown-{accumulate}", s, accumulate=accumulate)
    make_batch, shapes = train.make_batch, {}

    def stopped(corpus, s, pairs, step):
        batch = make_batch(corpus, s, pairs, step)
        shapes[step] = batch.tokens.shape
        if step == 5 and len(shapes) == 6:
            raise MemoryError
        return batch

    monkeypatch.setattr(train, "make_batch", stopped)
    options = {"accumulate": accumulate, "save_every": 3}
    with pytest.raises(MemoryError):
        run(root / f"grown-stopped-{accumulate}", s, **options)
    shapes.clear()
    assert_same(run(root / f"grown-stopped-{accumulate}", s, **options), whole)
    assert [shapes[step] for step in (3, 4, 5)] == [(16, 32), (8, 64), (8, 64)]


def with_state(s: Settings, seed: int):
    """A model and an optimizer that has made a step."""
    torch.manual_seed(seed)
    model = MaskedLM(s)
    optimizer = train.make_optimizer(model, s)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def state(model, optimizer) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    return parameters + [t for p in parameters for _, t in sorted(optimizer.state[p].items())]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two of them; the states they hold by their steps."""
    folder, s = tmp_path_factory.mktemp("checkpoints"), tiny(vocab_size=20, feed_forward=16)
    states = {}
    for step in (10, 20, 30):
        trained = with_state(s, seed=step)
        train.save_checkpoint(folder, step, step // 10, *trained)
        states[step] = state(*trained)
    newest = folder / "checkpoint-00000030.safetensors"
    assert {p.name for p in folder.iterdir()} == {newest.name, newest.name.replace("30", "20")}
    return folder, s, states, newest, newest.read_bytes()


def assert_falls_back(checkpoints, content: bytes) -> None:
    """To the one before; or, if the damage is none, to the newest. To either whole."""
    folder, s, states, newest, _ = checkpoints
    newest.write_bytes(content)
    model, optimizer = with_state(s, seed=0)
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        step, skipped = train.load_checkpoint(folder, model, optimizer)
    assert (step, skipped) in ((20, 2), (30, 3))
    for mine, saved in zip(state(model, optimizer), states[step], strict=True):
        assert torch.equal(mine, saved)
    assert errors.getvalue().count("\n") == errors.getvalue().count(newest.name) == (step == 20)


def test_an_undamaged_newest_checkpoint_is_used(checkpoints):
    folder, s, states, newest, whole = checkpoints
    newest.write_bytes(whole)
    trained = with_state(s, seed=0)
    assert train.load_checkpoint(folder, *trained) == (30, 3)
    for mine, saved in zip(state(*trained), states[30], strict=True):
        assert torch.equal(mine, saved)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_checkpoint_with_a_flipped_byte_is_named_and_the_one_before_is_used(checkpoints, data):
    whole = checkpoints[-1]
    header = 8 + int.from_bytes(whole[:8], "little")  # a third of the flips go there
    ranges = st.integers(0, header - 1), st.integers(header, len(whole) - 1), st.integers(0, 200)
    at, bits = data.draw(st.one_of(ranges)), data.draw(st.integers(1, 255))
    content = whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :]
    assert_falls_back(checkpoints, content)


@given(st.floats(0, 0.9999))
@settings(max_examples=25, deadline=None)
def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(checkpoints, share):
    whole = checkpoints[-1]
    assert_falls_back(checkpoints, whole[: int(share * len(whole))])


def test_a_full_disk_costs_no_checkpoint_and_is_one_line(root, reference, capfd, monkeypatch):
    folder = root / "full"
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 25)
        run(folder, tiny(), save_every=20)
    size = (folder / "checkpoint-00000020.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        code, errors = failure(capfd, lambda: run(folder, tiny(), save_every=20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert code == 2 and len(errors) == 1 and "checkpoint-00000040" in errors[0]
    assert (folder / "checkpoint-00000020.safetensors").exists()
    assert_same(run(folder, tiny(), save_every=20), reference("mlm"))
    assert not list(folder.rglob("*.part"))


def unclipped(objective: str) -> Settings:
    """Without dropout, and where a gradient of another length would show."""
    return tiny(objective=objective, dropout=0.0, clip=1e6)


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_slices_of_a_batch_add_up_to_the_whole_batch(objective, accumulate, root):
    s = unclipped(objective)
    whole = run(root / f"slices-1-{objective}", s)
    slices = run(root / f"slices-{accumulate}-{objective}", s, accumulate=accumulate)
    assert_same(whole, slices, tolerance=1e-5)
    for one, other in zip(
        *(log_of(root / f"slices-{n}-{objective}") for n in (1, accumulate)), strict=True
    ):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["mlm"] == pytest.approx(other["mlm"], abs=1e-4)


def poison(monkeypatch, bad, value=math.nan):
    """The loss of the steps in `bad` is multiplied by NaN or infinity."""
    forward, steps = MaskedLM.forward, itertools.count()

    def poisoned(self, batch, dictionary=None):
        loss, mlm = forward(self, batch, dictionary)
        return loss * (value if next(steps) in bad else 1), mlm

    monkeypatch.setattr(MaskedLM, "forward", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_without_finite_gradients_changes_nothing_and_is_counted(value, root, monkeypatch):
    folder, s = root / f"poisoned-{value}", tiny()
    poison(monkeypatch, range(30, 50), value)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 45)
        run(folder, s, save_every=20)
    saved = load_file(max(folder.glob("checkpoint-*")))
    poison(monkeypatch, range(50), value)  # counted anew: all that are left
    model = run(folder, s)
    torch.testing.assert_close(model["lm_head.bias"], saved["head_bias"], atol=0, rtol=0)
    torch.testing.assert_close(
        model["roberta.embeddings.word_embeddings.weight"], saved["word_embeddings.weight"],
        atol=0, rtol=0,
    )  # fmt: skip
    assert [line["skipped"] for line in log_of(folder)] == [0, 10, 20]


def test_after_20_such_steps_in_a_row_the_run_stops_and_says_so(root, monkeypatch, capfd):
    folder = root / "streak"
    poison(monkeypatch, range(20, 99))
    code, errors = failure(capfd, lambda: run(folder, tiny(), save_every=10))
    assert code == 2 and len(errors) == 1
    assert str(folder) in errors[0] and "20 steps" in errors[0] and "step 40" in errors[0]
    assert not (folder / "model").exists()
    model, optimizer = with_state(tiny(), seed=0)
    train.load_checkpoint(folder, model, optimizer)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_row_of_20_that_ends_between_two_lines_of_the_log_stops_it_too(root, monkeypatch, capfd):
    poison(monkeypatch, range(15, 35))
    code, errors = failure(capfd, lambda: run(root / "between", tiny()))
    assert code == 2 and "20 steps in a row, up to step 40" in errors[0]


def test_fewer_in_a_row_do_not_stop_it(root, monkeypatch):
    folder = root / "no-streak"
    poison(monkeypatch, [*range(1, 20), *range(21, 40)])
    run(folder, tiny())
    assert log_of(folder)[-1]["skipped"] == 38


def test_weight_decay_is_for_matrices_alone():
    s = tiny(weight_decay=0.5)
    decayed, others = train.make_optimizer(MaskedLM(s), s).param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.5
    assert {p.ndim for p in others["params"]} == {1} and others["weight_decay"] == 0


SHARED = """
import sys
sys.path += {paths!r}
import test_train as t
t.torch.set_num_threads(1)
for objective in t.OBJECTIVES:
    s = t.unclipped(objective)
    sys.argv[1:] = t.arguments(t.Path({folder!r}, objective), s)
    t.train.main() if objective == "mlm" else t.train.run(t.Path(sys.argv[1]), s, t.SOURCE, "cpu")
"""


def test_two_processes_train_as_one_does(root, tmp_path):
    code = SHARED.format(paths=[str(CODE), str(Path(__file__).parent)], folder=str(tmp_path))
    (tmp_path / "shared.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command.append(tmp_path / "shared.py")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for objective in OBJECTIVES:
        one = run(root / f"slices-1-{objective}", unclipped(objective))
        two = load_file(tmp_path / objective / "model" / "model.safetensors")
        assert_same(one, two, tolerance=1e-5)
        assert [line["step"] for line in log_of(tmp_path / objective)] == [20, 40, 50]


ONE_SIGNALLED = """
import os, signal, sys
sys.path += {paths!r}
import test_train as t
rate_at, s = t.train.rate_at, t.tiny()
def rate(step, s):
    if step == 25 and t.train.RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return rate_at(step, s)
t.train.rate_at = rate
sys.argv[1:] = t.arguments(t.Path({folder!r}), s, "--save-every", 1000)
try:
    t.train.main()
except SystemExit as left:
    t.Path({folder!r}, "left-%d" % t.train.RANK).write_text(str(left.code))
"""


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    folder = tmp_path / "run"
    code = ONE_SIGNALLED.format(paths=[str(CODE), str(Path(__file__).parent)], folder=str(folder))
    (tmp_path / "signalled.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command.append(tmp_path / "signalled.py")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [(folder / f"left-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    (saved,) = folder.glob("checkpoint-*")
    assert saved.name == "checkpoint-00000040.safetensors"  # the next line of the log


def test_models_kept_on_the_way_are_those_of_the_step_and_disturb_nothing(
    root, reference, monkeypatch
):
    folder = root / "kept"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 25)
        run(folder, tiny(), save_every=15, keep_every=10)
    assert {path.name for path in folder.glob("m*")} == {"model-00000010", "model-00000020"}
    times = {path: path.stat().st_mtime_ns for path in folder.glob("model-*/*")}
    (folder / "making-model").mkdir()  # of a run killed as it wrote
    (folder / "making-model" / "config.json").touch()
    assert_same(run(folder, tiny(), save_every=15, keep_every=10), reference("mlm"))
    assert times == {path: path.stat().st_mtime_ns for path in times}
    names = {f"model-{step:08d}" for step in range(10, 51, 10)}
    assert {path.name for path in folder.glob("m*")} == {"model", *names}
    weights = {name: load_file(folder / name / "model.safetensors") for name in (*names, "model")}
    assert_same(weights["model-00000050"], weights["model"])
    assert from_hf(folder / "model-00000020", tiny()).settings == tiny()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 21)
        run(root / "stopped-at-20", tiny(), save_every=20)
    saved = load_file(root / "stopped-at-20" / "checkpoint-00000020.safetensors")
    torch.testing.assert_close(
        weights["model-00000020"]["lm_head.bias"], saved["head_bias"], atol=0, rtol=0
    )


# ------------------------------------------------------------------------------------- benchmark


@pytest.mark.parametrize("changes", [{}, {"layers": 3, "heads": 4}, {"mask_share": 0.5}])
def test_the_operations_of_a_step_are_those_that_torch_counts(changes):
    s = tiny(**changes)  # with dropout, for torch leaves out its fused attention on a CPU
    tokens = np.random.default_rng(0).integers(SPECIALS, s.pieces, (s.batch, s.positions))
    model, corpus = MaskedLM(s), train.Corpus(tokens, tokens, tokens, s.positions)
    batch = train.make_batch(corpus, s, make_dictionary(s), 0).to("cpu")
    with FlopCounterMode(display=False) as counter:
        hidden = model.encode(batch.tokens)
        model.logits(hidden.take_along_dim(batch.masked[..., None], 1))
    assert 3 * counter.get_total_flops() == train.model_flops(s)


@pytest.mark.parametrize("objective", ["dict", "align"])
def test_a_benchmark_prints_its_two_tables_and_writes_nothing(
    objective, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    s = tiny(objective=objective)
    train.benchmark(s, "cpu", compiled=False, repeats=2)
    lines = capfd.readouterr().out.splitlines()
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    steps, parts = {row[0]: row[1:] for row in rows[2:4]}, {row[0]: row[1:] for row in rows[6:]}
    assert set(steps) == {"alignmlm", "transformers"} and steps["transformers"][-1] == "1.00"
    for speed, median, low, high, share, memory, _ in steps.values():
        assert float(low) <= float(median) <= float(high)
        tokens = float(speed.replace(",", "")) * float(median) / 1000
        assert tokens == pytest.approx(s.batch * s.positions, rel=0.1)
        assert share.endswith("%") and int(memory) >= 0
    assert len(parts) == 5 + (objective == "align")
    assert sum(float(percent) for _, percent in parts.values()) == pytest.approx(100, abs=0.5)
    assert not list(tmp_path.iterdir())


def test_a_benchmark_without_transformers_is_one_line(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["train.py", "--bench"])
    code, (line,) = failure(capfd, train.main)
    assert code == 2 and "pip install transformers" in line


@pytest.mark.parametrize("there", [{}, {"gcc"}, {"clang", "triton"}, {"gcc", "triton"}])
def test_a_step_is_compiled_unasked_on_a_gpu_that_has_all_it_takes(there, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(train.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(train, "find_spec", lambda name: name if name in there else None)
    assert train.compiles("cuda") == (len(there) == 2)
    assert not train.compiles("cpu")


# --------------------------------------------------------------------------------- command line


def failure(capfd, main) -> tuple[int, list[str]]:
    """Exit status and the lines on stderr; a progress bar is none."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        train.guarded(main)
    lines = re.split(r"[\r\n]+", capfd.readouterr().err)
    return left.value.code, [x for x in lines if x and not re.search(r"sentences? ?\[|step/s", x)]


def command(monkeypatch, folder, *more, s: Settings | None = None):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(folder, s or tiny(), *more)])
    return train.main


TREE = "1\tWe\t_\tPRON\t_\t_\t2\tnsubj\t_\t_\n2\tgo\t_\tVERB\t_\t_\t0\troot\t_\t_\n\n"
FILES = {
    "empty.txt": b"",
    "blank.txt": b" \n\n",
    "latin1.txt": "Caf\u00e9 au lait.\n".encode("latin-1"),
    "plain.txt": "\n".join(" ".join(x.words) for x in synth_lang.generate(1500)).encode(),
    "short.txt": "\n".join(" ".join(x.words) for x in synth_lang.generate(900)).encode(),
    "columns.conllu": TREE.replace("\t_\n", "\n", 1).encode(),
    "cycle.conllu": TREE.replace("2\tnsubj", "1\tnsubj").encode(),
}
BAD = {  # arguments -> what the line names
    "--corpus missing.txt": "missing.txt",
    "--treebank missing.conllu": "missing.conllu",
    "--order missing.conllu": "missing.conllu",
    "--corpus .": " .: ",
    "--corpus empty.txt": "empty.txt",
    "--corpus blank.txt": "blank.txt",
    "--corpus plain.txt empty.txt": "empty.txt",
    "--corpus latin1.txt": "latin1.txt:1",
    "--corpus plain.txt latin1.txt": "latin1.txt:1",
    "--treebank columns.conllu": "columns.conllu:1: 9 columns",
    "--treebank cycle.conllu": "cycle.conllu:1",
    "--corpus short.txt": "short.txt",
    "--corpus plain.txt --transform syntax": "CoNLL-U",
    "--corpus plain.txt --vocab-size 100000": "50000 sub-words",
    "--sentences 900": "the built-in language",
    "--transform sideways": "sideways",
    "--transform transliterate+": "''",
    "--objective nonsense": "objective",
    "--positions 15": "positions",
    "--heads 3": "heads",
    "--batch 6": "batch",
    "--accumulate 3": "batch 8",
    "--short-steps 9": "positions",
    "--save-every 0": "--save-every",
    "--keep-every -1": "--keep-every",
    "--steps many": "--steps: invalid int value: 'many'",
    "--device tpu": "--device",
    "--nonsense": "--nonsense",
    "--step 5": "--step",
}


@pytest.mark.parametrize("given", BAD)
def test_bad_input_is_one_line_that_names_the_place_and_leaves_nothing(
    given, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    code, errors = failure(capfd, command(monkeypatch, "runs/one", *given.split()))
    assert code == 2
    assert len(errors) == 1 and errors[0].startswith("train.py: ") and BAD[given] in errors[0]
    assert not list(Path().glob("runs/*"))


def test_without_a_folder_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "tiny"])
    code, (line,) = failure(capfd, train.main)
    assert code == 2 and "folder" in line and "--help" in line


@pytest.mark.parametrize("moment", ["prepare", "pretrain"])
def test_ctrl_c_outside_of_a_step_is_one_line(moment, root, monkeypatch, capfd):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, moment, interrupted)
    code, (line,) = failure(capfd, command(monkeypatch, root / "interrupted"))
    assert code == 130 and line.startswith("train.py: ")


def test_help_tells_every_setting_its_defaults_and_the_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as left:
        train.guarded(train.main)
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and "128 + n" in text
    for field in dataclasses.fields(Settings):
        values = [str(getattr(s, field.name)) for s in train.PRESETS.values()]
        values = ", ".join(values if len(set(values)) > 1 else values[:1])
        option = "--" + field.name.replace("_", "-")
        meaning = field.metadata.get("help", "")
        kind = rf" {field.type.__name__}" if field.type is not bool else f", --no{option[1:]}"
        assert " ".join(f"{option}{kind} {meaning} ({values})".split()) in text


@pytest.mark.parametrize("place", ["file", "file/one", "file/runs/one"])
def test_a_folder_that_cannot_be_written_is_one_line_that_names_it(
    place, tmp_path, monkeypatch, capfd
):
    (tmp_path / "file").touch()
    code, errors = failure(capfd, command(monkeypatch, tmp_path / place))
    assert code == 2
    assert len(errors) == 1 and str(tmp_path / "file") in errors[0]


def test_other_settings_are_refused_by_name(root, reference, monkeypatch, capfd):
    reference("mlm")
    folder = root / "whole-mlm"
    other = tiny(rate=0.5, steps=70)
    code, errors = failure(capfd, command(monkeypatch, folder, s=other))
    assert code == 2 and len(errors) == 1
    assert str(folder / "settings.json") in errors[0]
    assert "rate 0.003" in errors[0] and "0.5" in errors[0] and "steps 50" in errors[0]
    assert "seed" not in errors[0]
    code, errors = failure(capfd, command(monkeypatch, folder, "--sentences", 1600))
    assert code == 2 and len(errors) == 1 and "sentences 1500" in errors[0]


def test_another_commit_or_version_is_noted_and_not_refused(root, reference, monkeypatch):
    reference("mlm")
    path, record = root / "whole-mlm" / "settings.json", train.record_of(tiny(), SOURCE)
    assert path.read_text() == json.dumps(record, indent=2) + "\n"
    train.refuse_other(path, record | {"commit": "another", "versions": {"torch": "0.1"}})


def test_the_commit_is_the_codes_own_and_says_if_it_was_changed(tmp_path, monkeypatch):
    def git(*words):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *name, *words], cwd=tmp_path, capture_output=True, text=True)
        return done.stdout.strip()

    def commit():
        train.commit.cache_clear()
        return train.commit()

    inside = tmp_path / "inside"
    inside.mkdir()
    code = tmp_path / "train.py"
    code.write_text("first")
    monkeypatch.setattr(train, "__file__", str(code))
    assert commit() is None
    git("init")
    git("add", "train.py")
    git("commit", "-m", "one")
    git("tag", "-m", "a tag", "v1")
    head = git("rev-parse", "HEAD")
    assert len(head) == 40 and commit() == head
    monkeypatch.chdir(inside)
    code.write_text("second")
    assert commit() == head + "+changes"
    monkeypatch.setattr(train, "__file__", str(inside / "train.py"))
    assert commit() is None  # a copy in another's checkout
    monkeypatch.setenv("PATH", "")
    assert commit() is None
    train.commit.cache_clear()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"settings": 3}', b"\xff"])
def test_damaged_settings_are_named(content, tmp_path, monkeypatch, capfd):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "settings.json").write_bytes(content)
    code, errors = failure(capfd, command(monkeypatch, tmp_path / "one"))
    assert code == 2
    assert len(errors) == 1 and str(tmp_path / "one" / "settings.json") in errors[0]


def test_the_command_line_trains(root, reference, monkeypatch, capfd):
    folder = root / "command"
    command(monkeypatch, folder)()
    assert capfd.readouterr().out == f"{folder}: trained\n"
    assert_same(load_file(folder / "model" / "model.safetensors"), reference("mlm"))
    record = json.loads((folder / "settings.json").read_text())
    assert record["settings"] == vars(tiny()) and record["source"]["sentences"] == 1500
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["numpy"] == np.__version__
    assert set(record["versions"]) == {"python", "torch", "triton", "numpy", "sentencepiece"}
    assert [line["step"] for line in log_of(folder)] == [20, 40, 50]
