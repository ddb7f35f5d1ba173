"""Text to ids, batches, optimizers; runs killed, interrupted, shared and moved; tokenizers."""

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import synth_lang
import train
from alignmlm import BOS, EOS, MASK, OBJECTIVES, PAD, PRESETS, SPECIALS, UNK, MaskedLM, Settings
from alignmlm import derive_ids, from_hf, make_dictionary, preset

CODE = Path(train.__file__).parent
SOURCE = train.Source([], None, 1200)
ARGS = argparse.Namespace(device="cpu", save_every=20)
SIZES = {"vocab_size": 400, "layers": 1, "width": 16, "heads": 2, "feed_forward": 32, "batch": 8,
         "warmup": 5, "dropout": 0.1, "steps": 250}  # fmt: skip
OPTIONS = ["--device", "cpu", "--sentences", "1200", "--save-every", "20"]
for name, value in SIZES.items():
    OPTIONS += ["--" + name.replace("_", "-"), str(value)]


def small(**changes):
    return preset("tiny", **SIZES | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of this file's runs, which share one tokenised text."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs the command line in this process; returns the exit status and the lines on stderr."""

    def call(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        status = 0
        try:
            synth_lang.guarded(train.main)
        except SystemExit as left:
            status = left.code
        return status, messages(capfd.readouterr().err)

    return call


def messages(stderr):
    """The lines that are no progress bar."""
    lines = re.split(r"[\r\n]+", stderr)
    return [line for line in lines if line.strip() and not re.search(r"it/s|\?it|s/it", line)]


def bits(folder):
    return [(folder / name).read_bytes() for name in ("model/model.safetensors", "log.jsonl")]


# ---------------------------------------------------------------------------------- text to ids
def test_the_hash_is_of_the_content_and_not_of_the_place(tmp_path):
    a, b, moved = [tmp_path / name for name in ("a", "b", "moved")]
    a.write_text("One.")
    b.write_text("Two.")
    moved.write_text("One.")
    os.utime(moved, (1, 1))
    hashes = [train.Source(*source, 5).content_hash() for source in (
        ([a], None), ([b], None), ([a, b], None), ([b, a], None), ([a], b), ([], None)
    )]  # fmt: skip
    assert len(set(hashes)) == len(hashes)
    assert train.Source([moved], None, 5).content_hash() == hashes[0]
    assert train.Source([], None, 6).content_hash() != hashes[-1]


@pytest.mark.parametrize("transform", ["transliterate+invert", "permute+transliterate", "invert"])
def test_the_languages_come_from_different_halves_and_counterparts_stay_in_step(transform, root):
    s = small(transform=transform)
    folder = train.prepare(SOURCE, s, root)
    corpus, languages = np.load(folder / "ids.npz"), train.Languages(folder, s)
    texts = {"original": [], "derived": [], "counterpart": []}
    names = [name for name in transform.split("+") if name != "transliterate"]
    for index, sentence in enumerate(synth_lang.generate(1200)):
        moved = synth_lang.transform(sentence, names, index=index)[0]
        sides = {"original": sentence}
        if index % 100 >= 50:
            sides = {"counterpart": sentence, "derived": moved}
        for side, told in sides.items():
            for word in told.words:
                texts[side] += languages.encode(word)
            texts[side].append(EOS)
    shift = 200 if "transliterate" in transform else 0
    spelled = [languages.subwords.id_to_piece(id) for id in range(400 - shift)]
    assert s.shift == shift and spelled[:5] == ["<s>", "<pad>", "</s>", "<mask>", "<unk>"]
    for side, ids in texts.items():
        if side == "derived":
            ids = [id if id < SPECIALS else id + shift for id in ids]
        assert corpus[side].tolist() == ids


class Spelled:
    """Languages without sub-words: a sentence is one id."""

    def encode_sentence(self, sentence):
        return [SPECIALS, EOS]

    def derive(self, sentence, index):
        return sentence


@pytest.mark.parametrize("count", [1000, 1010, 1555, 2000])
def test_the_halves_are_about_equal_for_a_treebank(count):
    corpus = train.tokenise(train.Source([], None, count), Spelled(), small())
    assert len(corpus.original) + len(corpus.derived) == 2 * count
    assert len(corpus.counterpart) == len(corpus.derived)
    assert abs(len(corpus.original) - len(corpus.derived)) <= 2 * 50


@pytest.mark.parametrize("word", ["", "▁", "<mask>", "<s>", "☃", "two words"])
def test_no_word_is_without_an_id_or_special(word, root):
    s = small()
    ids = train.Languages(train.prepare(SOURCE, s, root), s).encode(word)
    assert ids and min(ids) >= UNK


def test_a_run_that_was_overtaken_takes_what_the_other_has_made(tmp_path, monkeypatch):
    tokenise = train.tokenise

    def overtaken(*args):
        monkeypatch.undo()
        train.prepare(SOURCE, small(), tmp_path)
        return tokenise(*args)

    monkeypatch.setattr(train, "tokenise", overtaken)
    folder = train.prepare(SOURCE, small(), tmp_path)
    assert [*tmp_path.iterdir()] == [folder] and (folder / "ids.npz").exists()


def test_of_a_long_line_nothing_is_lost(tmp_path):
    rng = random.Random(0)
    lines = [" ".join(sentence.words) for sentence in synth_lang.generate(600)]
    lines += [" ".join("".join(rng.choices("домжукя", k=3)) for _ in range(25_000)), "a ☃ ☃ b ☃☃"]
    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines))
    s, source = small(), train.Source([str(text)], None, 0)
    folder = train.prepare(source, s, tmp_path)
    subwords, corpus = train.Languages(folder, s).subwords, np.load(folder / "ids.npz")
    both = np.concatenate([corpus["original"], corpus["counterpart"]]).tolist()
    assert len(re.findall("[домжукя]{3}", subwords.decode(both))) == 25_000
    assert both.count(UNK) >= 3


# -------------------------------------------------------------------------------------- batches
def made_up(s):
    """A Corpus of random sentences of 2 to 7 words; the derived ones are inverted."""
    rng = np.random.default_rng(1)
    sides = [[], [], []]
    for _ in range(400):
        lengths = rng.integers(2, 8, 2)
        original, other = [rng.integers(SPECIALS, s.language_size, n) for n in lengths]
        for side, words in zip(sides, (original, other[::-1], other), strict=True):
            side += [*words, EOS]
    original, derived, counterpart = map(np.array, sides)
    return train.Corpus(original, derive_ids(derived, s), counterpart)


def unmasked(batch):
    """The tokens as they were before masking, where no label was translated."""
    tokens = batch.tokens.copy()
    np.put_along_axis(tokens, batch.masked, batch.labels, axis=1)
    return tokens


def is_in(row, ids):
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(row))
    return (windows == row).all(axis=1).any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_is_a_function_of_seed_and_step_alone(objective):
    s = small(objective=objective)
    corpus, dictionary = made_up(s), make_dictionary(s)
    batch = train.make_batch(corpus, s, dictionary, 3)
    np.random.seed(5)
    train.make_batch(corpus, s, dictionary, 0)
    again = train.make_batch(corpus, s, dictionary, 3)
    others = [train.make_batch(corpus, s, dictionary, 4),
              train.make_batch(corpus, preset("tiny", **SIZES, objective=objective, seed=1),
                               dictionary, 3)]  # fmt: skip
    for name, array in vars(batch).items():
        width = round(0.4 * 32) if name in ("masked", "labels") else 32
        assert array.shape == (8, width) and array.dtype == np.int64
        np.testing.assert_array_equal(array, getattr(again, name))
        for other in others:
            changes = name not in ("languages", "positions") or objective == "dict"
            changes = changes and name != "positions"
            assert np.array_equal(array, getattr(other, name)) != changes


@pytest.mark.parametrize("objective", ["mlm", "xlm", "align"])
@pytest.mark.parametrize("shift", [True, False])
def test_half_of_the_rows_are_original_and_half_derived(objective, shift):
    s = small(objective=objective, transform="transliterate+invert" if shift else "invert")
    corpus = made_up(s)
    batch = train.make_batch(corpus, s, make_dictionary(s), 7)
    rows = unmasked(batch)
    count = 2 if objective == "xlm" else 4
    for row, languages in zip(rows[:count], batch.languages, strict=False):
        assert row[0] == BOS and is_in(row[1:], corpus.original) and not languages.any()
    for row, languages in zip(rows[count : 2 * count], batch.languages[count:], strict=False):
        assert row[0] == BOS and is_in(row[1:], corpus.derived) and languages.all()
    np.testing.assert_array_equal(batch.positions[: 2 * count], [np.arange(32)] * 2 * count)
    shown = np.take_along_axis(batch.tokens, batch.masked, axis=1)
    assert 0.6 < (shown == MASK).mean() < 0.95


def test_pairs_of_xlm_are_whole_sentences_and_their_counterparts():
    s = small(objective="xlm", batch=256, parallel_share=0.5)
    corpus = made_up(s)
    batch = train.make_batch(corpus, s, make_dictionary(s), 0)
    rows = unmasked(batch)[128:]
    halves = len(corpus.counterpart) // 2
    for row in rows:
        original, derived = row[1:16], row[17:]
        assert row[0] == row[16] == BOS
        places = np.flatnonzero(original == EOS)
        assert list(places) == list(np.flatnonzero(derived == EOS)) and 15 - places[-1] - 1 <= 2
        start = 0
        for place in places:
            inverted = derive_ids(original[start:place][::-1], s)
            np.testing.assert_array_equal(derived[start:place], inverted)
            start = place + 1
        assert is_in(np.append(EOS, original), np.append(EOS, corpus.counterpart[: halves + 60]))
    np.testing.assert_array_equal(batch.languages[128:], [[0] * 16 + [1] * 16] * 128)
    np.testing.assert_array_equal(batch.positions[128:], [[*range(16)] * 2] * 128)


def test_pairs_of_long_sentences_end_as_soon_as_they_can():
    corpus = train.Corpus(None, np.array(([9] * 19 + [EOS] + [9] * 9 + [EOS]) * 5), None)
    # 24 ids from a long sentence on cut off 4 of the next; from a short one on, 14.
    assert corpus.pair_starts(24).tolist() == [0, 30, 60, 90, 120]


def test_labels_of_dict_mlm_are_translated_where_the_language_says_so():
    s = small(objective="dict", batch=64)
    dictionary = make_dictionary(s)
    batch = train.make_batch(made_up(s), s, dictionary, 0)
    own = np.repeat([0, 1], 32)[:, None]
    asked = np.take_along_axis(batch.languages, batch.masked, axis=1) != own
    of_derived = batch.labels >= SPECIALS + s.shift
    assert (of_derived[asked] == (own ^ 1).repeat(asked.shape[1], 1)[asked]).all()
    known = np.isin(np.where(of_derived, batch.labels - s.shift, batch.labels), dictionary[:, 0])
    assert known[asked].all() and 0.35 < asked[known].mean() < 0.65
    assert (np.sum(batch.languages != own, axis=1) == asked.sum(axis=1)).all()


def test_the_first_rows_are_short_and_there_are_more_of_them():
    s = small(positions=64, short_steps=3)
    shapes = [train.make_batch(made_up(s), s, None, step).tokens.shape for step in (0, 2, 3)]
    assert shapes == [(16, 32), (16, 32), (8, 64)]


# ----------------------------------------------------------------------------------- optimizers
def polar_of_muon(matrix):
    """What five iterations make of a matrix, in float64: each singular value by itself."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / (matrix.double().norm() + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return u @ values.diag() @ v


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_muon_steps_by_nearly_orthogonal_matrices(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = start.clone(), start.clone()
    muon = train.Muon([ours], {"lr": 0.02, "weight_decay": 0.1})
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
    expected, momentum = start.double(), torch.zeros(shape).double()
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        muon.step()
        other.step()
        momentum = 0.95 * momentum + 0.05 * ours.grad
        direction = polar_of_muon(0.05 * ours.grad + 0.95 * momentum)
        rate = 0.02 * max(1, shape[0] / shape[1]) ** 0.5
        expected = expected * (1 - 0.02 * 0.1) - rate * direction
        values = torch.linalg.svdvals(train.orthogonal(ours.grad))
        assert 0.6 < values[: min(shape) * 9 // 10].min() and values.max() < 1.3
    torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0)  # It computes in bfloat16.


def test_the_rate_rises_stays_and_falls():
    s = small(steps=100, warmup=10, decay_share=0.5)
    rates = [train.schedule(step, s) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:56] == [1] * 46
    assert rates[56:] == pytest.approx([n / 45 for n in range(44, 0, -1)])
    assert train.schedule(0, small(warmup=0, decay_share=0.0)) == 1


def test_adamw_decays_matrices_alone_and_muon_takes_those_of_the_layers():
    s = small(weight_decay=0.5)
    model = MaskedLM(s)
    of = {parameter: name for name, parameter in model.named_parameters()}
    groups = {}
    for optimizer in train.make_optimizers(model, s, 0.25):
        for group in optimizer.param_groups:
            key = type(optimizer).__name__, group["lr"], group["weight_decay"]
            groups[key] = sorted(of[parameter] for parameter in group["params"])
    matrices = [name for name, p in model.named_parameters() if p.ndim == 2]
    embeddings = [f"{kind}_embeddings.weight" for kind in ("language", "position", "word")]
    assert groups == {
        ("Muon", s.matrix_rate, 0.5): sorted(set(matrices) - set(embeddings)),
        ("AdamW", 0.25, 0.5): embeddings,
        ("AdamW", 0.25, 0.0): sorted(set(of.values()) - set(matrices)),
    }
    (adamw,) = train.make_optimizers(model, small(optimizer="adamw"), 0.25)
    assert sorted(of[p] for p in adamw.param_groups[0]["params"]) == sorted(matrices)


def test_an_update_clips_and_scales():
    model = torch.nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for factor in (0.5, 0.25):
        model.weight.grad = torch.full((2, 2), 8.0)
        train.update(model, [optimizer], factor)
    torch.testing.assert_close(before - model.weight, torch.full((2, 2), 0.75 * 0.5 * 0.5))
    assert model.weight.grad is None


# ------------------------------------------------------------------------------------- the loop
@pytest.fixture(scope="module")
def peace(root):
    """A run that nothing disturbed."""
    train.run(root / "peace", small(), SOURCE, ARGS)
    return root / "peace"


def test_a_run_logs_every_hundred_steps_and_leaves_what_is_needed(peace):
    lines = [json.loads(line) for line in (peace / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [100, 200]
    assert set(lines[0]) == {"step", "loss", "mlm", "all", "inside", "outside"}
    for line in lines:  # alpha = 10, and no cosine is above 1
        assert line["mlm"] - 10 <= line["loss"] < line["mlm"] < 7
    names = {"settings.json", "log.jsonl", "tokenizer.model", "order.json", "model"}
    assert {path.name for path in peace.iterdir()} == names
    record = json.loads((peace / "settings.json").read_text())
    assert Settings(**record["settings"]) == small()
    assert record["content"] == SOURCE.content_hash() and record["source"] == vars(SOURCE)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(root, peace):
    folder = root / "killed"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])
    rng = random.Random(0)
    resumed = []
    for attempt in range(40):
        process = context.Process(target=train.run, args=(folder, small(), SOURCE, ARGS))
        process.start()
        if attempt < 6:
            saved = folder / "checkpoint.safetensors"
            before = saved.stat().st_mtime_ns if saved.exists() else 0
            while process.is_alive():
                time.sleep(0.001)
                if saved.exists() and saved.stat().st_mtime_ns != before:
                    break
            time.sleep(0.1 * rng.random())
            process.kill()
            if saved.exists():
                resumed.append(int(load_file(saved)["done"]))
        process.join()
        if process.exitcode == 0:
            break
    assert len(set(resumed)) >= 3 and not (folder / "checkpoint.safetensors").exists()
    assert bits(folder) == bits(peace)


def test_ctrl_c_is_one_line_while_sub_words_are_learned_and_while_training(tmp_path):
    folder = tmp_path / "run"
    arguments = [sys.executable, CODE / "train.py", folder, *OPTIONS, "--sentences", "6000"]
    arguments += ["--steps", "5000"]
    for moment in ("sub-words", "step=100"):
        with open(tmp_path / "stderr", "wb") as stderr:
            process = subprocess.Popen(arguments, stderr=stderr, start_new_session=True)
        deadline = time.monotonic() + 100
        while moment not in (tmp_path / "stderr").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        said = messages((tmp_path / "stderr").read_text())
        assert said == ["train.py: interrupted"]
    assert [path.name[:5] for path in sorted(tmp_path.iterdir())] == ["data-", "run", "stder"]


def test_two_processes_train_as_one_does(root):
    options = [*OPTIONS, "--objective", "xlm", "--dropout", "0", "--steps", "100"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, CODE / "train.py", root / "two", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    train.run(root / "one", small(objective="xlm", dropout=0.0, steps=100), SOURCE, ARGS)
    one, two = [load_file(root / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=0, msg=name)
    losses = [json.loads((root / name / "log.jsonl").read_text())["mlm"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_a_loss_that_is_not_finite_is_one_line(root, command, monkeypatch):
    monkeypatch.setattr(train, "schedule", lambda step, s: float("nan"))
    status, lines = command(root / "nan", *OPTIONS)
    assert status == 2 and "no finite loss at step 20" in lines[-1]


# ---------------------------------------------------------------------- the folder and its text
def test_a_finished_run_needs_no_text_and_others_can_read_it(tmp_path, command, monkeypatch):
    words = [" ".join(sentence.words) for sentence in synth_lang.generate(600)]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = Path("text.txt").absolute()
    text.write_text("\n".join(words))
    options = [*OPTIONS, "--steps", "100", "--vocab-size", "300"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "pretrain", lambda *args: {}["stopped"])
        with pytest.raises(KeyError):
            command(tmp_path / "run", *options, "--corpus", "text.txt")
    text.write_text("\n".join(words[:500]))
    status, lines = command(tmp_path / "run", *options, "--corpus", "text.txt")
    assert status == 2 and "other settings or text" in lines[0]
    text.write_text("\n".join(words))
    monkeypatch.chdir(tmp_path)
    os.utime(text, (1, 1))
    assert command("run", *options, "--corpus", "here/text.txt") == (0, [])
    record = json.loads(Path("run/settings.json").read_text())
    assert record["source"]["text"] == [str(text)] and len(record["content"]) == 16
    for path in tmp_path.glob("[rd]*/**/*"):
        assert path.stat().st_mode & 0o044 == path.parent.stat().st_mode & 0o044 == 0o044, path
    text.unlink()
    before = bits(Path("run"))
    assert command("run", *options, "--corpus", text) == (0, [])
    assert bits(Path("run")) == before
    status, lines = command("run", *options, "--corpus", text, "--steps", "200")
    assert status == 2 and "other settings" in lines[0]
    assert command("run", *options)[0] == 2  # It was not the built-in language.


BAD = {  # arguments: what the line names
    "--corpus": "--corpus",
    "--corpus missing.txt": "missing.txt",
    "--corpus .": "directory",
    "--corpus plain.txt latin.txt": "latin.txt:2001",
    "--treebank columns.conllu": "columns.conllu:1",
    "--order missing.conllu": "missing.conllu",
    "--corpus short.txt --vocab-size 20": "too little text",
    "--vocab-size 100000": "--vocab-size",
    "--transform sideways": "sideways",
    "--objective nonsense": "nonsense",
    "--steps many": "many",
    "--heads 3": "heads",
    "--nonsense": "--nonsense",
}


@pytest.mark.parametrize("given", BAD)
def test_bad_input_is_one_line_that_names_the_place(given, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("a b c.\n" * 52)
    Path("plain.txt").write_text("This is a text.\n" * 100)
    Path("latin.txt").write_bytes(b"This is a text.\n" * 2000 + b"Caf\xe9\n")
    Path("columns.conllu").write_text("1\tWe\t_\tPRON\t_\t_\t0\troot\t_\n\n")
    status, lines = command("runs/one", *OPTIONS, *given.split())
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("train.py: ") and BAD[given] in lines[0]
    assert not list(Path().glob("runs/*"))


@pytest.mark.parametrize("transform", ["transliterate", "invert"])
@pytest.mark.parametrize("vocab_size", [60, 60_000])
def test_the_suggested_vocabulary_works(transform, vocab_size, tmp_path, command):
    rng = random.Random(0)
    han = ["".join(rng.choices([chr(0x4E00 + n) for n in range(301)], k=20)) for _ in range(600)]
    (tmp_path / "han.txt").write_text("\n".join(han))
    options = [*OPTIONS, "--steps", "1", "--transform", transform, "--corpus", tmp_path / "han.txt"]
    status, (line,) = command(tmp_path / "run", *options, "--vocab-size", vocab_size)
    number = re.search(r"--vocab-size (\d+)", line)[1]
    assert status == 2
    assert command(tmp_path / "run", *options, "--vocab-size", number)[0] == 0


def test_the_options_and_their_help():
    parser = synth_lang.Parser()
    train.add_options(parser)
    args = parser.parse_args(["--corpus", "a", "b", "--treebank", "c", "--steps", "7"])
    s, source = train.read_options(args, seed=4)
    assert source.text == [os.path.abspath(name) for name in "abc"]
    assert s == preset("tiny", steps=7, seed=4)
    text = " ".join(parser.format_help().split())
    for setting in Settings.__dataclass_fields__:
        values = ", ".join(f"{name} {getattr(s, setting)}" for name, s in PRESETS.items())
        option = "--" + setting.replace("_", "-")
        assert re.search(rf"{option} \w+ [^(]+\({re.escape(values)}\)", text)
    assert text.index("--corpus") < text.index("--objective") < text.index("--tune-epochs")


# ------------------------------------------------------------------------------- the tokenizers
@pytest.fixture(scope="module", params=["transliterate+invert", "invert"])
def trained(request, root):
    """A run with one vocabulary a language, and one with a vocabulary for both."""
    s = preset("tiny", vocab_size=1200, steps=150, transform=request.param)
    folder = root / f"trained-{request.param}"
    train.run(folder, s, train.Source([], None, 6000), ARGS)
    return folder, s


def both_languages(folder, s, count, seed):
    """Pairs of a sentence, as words, and its ids in our own way: originals, then derived ones."""
    languages = train.Languages(folder, s)
    for sentence in synth_lang.generate(count, seed=seed):
        for derived in (False, True):
            words = languages.derive(sentence, 0).words if derived else sentence.words
            turned = synth_lang.Sentence(words)
            ids = np.array(languages.encode_sentence(turned)[:-1])
            if derived:
                ids = derive_ids(ids, s)
                if s.shift:
                    words = [synth_lang.transliterate_word(word) for word in words]
            yield words, ids.tolist()


def test_the_tokenizer_of_transformers_gives_our_ids(trained):
    from transformers import AutoTokenizer

    folder, s = trained
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert len(tokenizer) == s.vocab_size and tokenizer.mask_token_id == MASK
    for words, ids in both_languages(folder, s, 2000, seed=9):
        text = " ".join(words)
        assert tokenizer(text).input_ids == [BOS, *ids, EOS]
        if UNK not in ids:
            assert tokenizer.decode(ids).split() == words
    padded = tokenizer(["a", "so it is <mask> ."], padding=True)
    assert padded.input_ids[0][-1] == tokenizer.pad_token_id == PAD
    assert padded.attention_mask[0][-1] == 0
    assert padded.input_ids[1].count(MASK) == 1


def our_logits(model, inputs):
    with torch.no_grad():
        seen = inputs.attention_mask.bool()[:, None, None, :]
        hidden = model.encode(inputs.input_ids, attention_mask=seen)
        hidden = model.head_norm(F.gelu(model.head_dense(hidden)))
        return F.linear(hidden, model.word_embeddings.weight, model.head_bias)


def test_the_model_of_transformers_and_its_pipeline_say_what_ours_says(trained):
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    folder, s = trained
    theirs = AutoModelForMaskedLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ours = from_hf(folder / "model", s).eval()
    texts = ["it is <mask> .", "so they go to the <mask> ."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    true = inputs.attention_mask.bool()
    logits = our_logits(ours, inputs)[true]
    torch.testing.assert_close(theirs(**inputs).logits[true], logits, atol=1e-4, rtol=0)

    table, marks = train.subword_table(train.Languages(folder, s).subwords, s)
    fill = pipeline("fill-mask", model=str(folder / "model"))
    for words, ids in both_languages(folder, s, 20, seed=11):
        if len(ids) > 25 or UNK in ids:
            continue
        inputs = tokenizer(" ".join(["<mask>", *words]), return_tensors="pt")
        assert inputs.input_ids[0].tolist() == [BOS, MASK, *ids, EOS]
        best = our_logits(ours, inputs)[0, 1].topk(5).indices.tolist()
        answers = fill(" ".join(["<mask>", *words]), top_k=5)
        assert [answer["token"] for answer in answers] == best
        for answer in answers:
            assert answer["sequence"].split()[-len(words) :] == words
            if answer["token"] >= SPECIALS:
                spelling = table[answer["token"]][0]
                for mark in marks:
                    spelling = spelling.replace(mark, " ")
                assert answer["token_str"].strip() == spelling.strip()


def test_a_masked_final_mark_is_filled_with_a_final_mark_in_both_languages(trained):
    """The class of other words needs the word itself: so this language was made."""
    from transformers import pipeline

    folder, s = trained
    fill = pipeline("fill-mask", model=str(folder / "model"))
    marks = set(".!?")
    if s.shift:
        marks |= {synth_lang.transliterate_word(mark) for mark in marks}
    right = []
    for words, ids in both_languages(folder, s, 60, seed=3):
        if len(ids) < 20 and words[-1] in marks:
            answer = fill(" ".join([*words[:-1], "<mask>"]))[0]
            right.append(answer["token_str"].strip() in marks)
    assert len(right) > 20 and np.mean(right) > 0.9
