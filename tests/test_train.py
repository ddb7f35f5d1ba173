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
from alignmlm import BOS, EOS, MASK, OBJECTIVES, PAD, SPECIALS, UNK, MaskedLM, Settings
from alignmlm import derive_ids, from_hf, make_dictionary, preset
from conftest import messages

ARGS = argparse.Namespace(text=[], order=None, sentences=1200, device="cpu", save_every=20)
SIZES = {"vocab_size": 400, "layers": 1, "width": 16, "heads": 2, "feed_forward": 32, "batch": 8,
         "warmup": 5, "dropout": 0.1, "steps": 250}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
OPTIONS += ["--device=cpu", "--sentences=1200", "--save-every=20"]

def with_text(text, order=None, sentences=1200):
    return argparse.Namespace(**vars(ARGS) | {"text": text, "order": order, "sentences": sentences})

def small(**changes):
    return preset("tiny", **SIZES | changes)

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of this file's runs, which share one tokenised text."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("runs")

def bits(folder):
    return [(folder / name).read_bytes() for name in ("model/model.safetensors", "log.jsonl")]

# ---------------------------------------------------------------------------------- text to ids
def test_the_hash_is_of_the_content_and_not_of_the_place(tmp_path):
    a, b, moved = [tmp_path / name for name in ("a", "b", "moved")]
    for path, text in ((a, "One."), (b, "Two."), (moved, "One.")):
        path.write_text(text)
    sources = [([a],), ([b],), ([a, b],), ([b, a],), ([a], b), ([],), ([], None, 5)]
    hashes = [train.content_hash(with_text(*source)) for source in sources]
    assert len(set(hashes)) == len(hashes)
    assert train.content_hash(with_text([moved])) == hashes[0]

@pytest.mark.parametrize("transform", ["transliterate+invert", "permute+transliterate", "invert"])
def test_the_languages_come_from_different_halves_and_counterparts_stay_in_step(transform, root):
    s = small(transform=transform)
    folder = train.prepare(ARGS, s, root)
    corpus, languages = np.load(folder / "ids.npz"), train.Tokeniser(folder, s)
    shift = 200 if "transliterate" in transform else 0
    spelled = [languages.subwords.id_to_piece(id) for id in range(400 - shift)]
    assert s.shift == shift and spelled[:5] == ["<s>", "<pad>", "</s>", "<mask>", "<unk>"]
    names = [name for name in transform.split("+") if name != "transliterate"]
    expected = {"original": [], "derived": [], "counterpart": []}
    for index, sentence in enumerate(synth_lang.generate(1200)):
        sides = {"original": sentence}
        if index % 100 >= 50:
            moved, _ = synth_lang.transform(sentence, names, index=index)
            sides = {"counterpart": sentence, "derived": moved}
        for side, turned in sides.items():
            for word in turned.words:
                expected[side] += languages.encode(word)
            expected[side].append(EOS)
    expected["derived"] = [id + shift if id >= SPECIALS else id for id in expected["derived"]]
    for side, ids in expected.items():
        assert corpus[side].tolist() == ids
    # No word is without an id, and none becomes a special one.
    odd = ["", "▁", "<mask>", "<s>", "☃", "two words"]
    assert all(min(languages.encode(word)) >= UNK for word in odd)

def test_a_run_that_was_overtaken_takes_what_the_other_has_made(tmp_path, monkeypatch):
    tokenise = train.make_corpus

    def overtaken(*args):
        monkeypatch.undo()
        train.prepare(ARGS, small(), tmp_path)
        return tokenise(*args)

    monkeypatch.setattr(train, "make_corpus", overtaken)
    folder = train.prepare(ARGS, small(), tmp_path)
    assert [*tmp_path.iterdir()] == [folder] and (folder / "ids.npz").exists()

def test_of_a_long_line_nothing_is_lost(tmp_path):
    rng, text = random.Random(0), tmp_path / "text.txt"
    lines = [" ".join(sentence.words) for sentence in synth_lang.generate(600)]
    lines.append(" ".join("".join(rng.choices("домжукя", k=3)) for _ in range(25_000)))
    text.write_text("\n".join(lines))
    folder = train.prepare(with_text([str(text)]), small(), tmp_path)
    subwords, corpus = train.Tokeniser(folder, small()).subwords, np.load(folder / "ids.npz")
    text = subwords.decode(corpus["original"].tolist())
    assert len(re.findall("[домжукя]{3}", text)) == 25_000

# -------------------------------------------------------------------------------------- batches
def random_corpus(s):
    """A Corpus of random sentences of 2 to 7 words; the derived ones are inverted."""
    rng = np.random.default_rng(1)
    original, derived, counterpart = [], [], []
    for _ in range(400):
        original += [*rng.integers(SPECIALS, s.language_size, rng.integers(2, 8)), EOS]
        words = rng.integers(SPECIALS, s.language_size, rng.integers(2, 8))
        counterpart += [*words, EOS]
        derived += [*words[::-1], EOS]
    return train.Corpus(np.array(original), derive_ids(np.array(derived), s), np.array(counterpart))

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
    corpus, dictionary = random_corpus(s), make_dictionary(s)
    batch = train.make_batch(corpus, s, dictionary, 3)
    np.random.seed(5)
    other_step = train.make_batch(corpus, s, dictionary, 4)
    other_seed = train.make_batch(corpus, small(objective=objective, seed=1), dictionary, 3)
    again = train.make_batch(corpus, s, dictionary, 3)
    for name, array in vars(batch).items():
        width = round(0.4 * 32) if name in ("masked", "labels") else 32
        assert array.shape == (8, width) and array.dtype == np.int64
        np.testing.assert_array_equal(array, getattr(again, name))
    for name in ("tokens", "masked", "labels"):
        for other in (other_step, other_seed):
            assert not np.array_equal(getattr(batch, name), getattr(other, name))

@pytest.mark.parametrize("objective", ["mlm", "xlm", "align"])
@pytest.mark.parametrize("transform", ["transliterate+invert", "invert"])
def test_half_of_the_rows_are_original_and_half_derived(objective, transform):
    s = small(objective=objective, transform=transform)
    corpus = random_corpus(s)
    batch = train.make_batch(corpus, s, make_dictionary(s), 7)
    count = 2 if objective == "xlm" else 4  # The other half of XLM's rows are pairs.
    for index, row in enumerate(unmasked(batch)[: 2 * count]):
        ids = corpus.original if index < count else corpus.derived
        assert row[0] == BOS and is_in(row[1:], ids)
        assert (batch.languages[index] == index // count).all()
        assert batch.positions[index].tolist() == [*range(32)]
    assert 0.2 < (batch.tokens == MASK).mean() < 0.4

def test_pairs_of_xlm_are_whole_sentences_and_their_counterparts():
    s = small(objective="xlm", batch=256, parallel_share=0.5)
    corpus = random_corpus(s)
    batch = train.make_batch(corpus, s, make_dictionary(s), 0)
    parallel = np.append(EOS, corpus.counterpart[: len(corpus.counterpart) // 2 + 60])
    assert (batch.languages[128:] == np.repeat([0, 1], 16)).all()
    assert (batch.positions[128:] == np.tile(np.arange(16), 2)).all()
    for row in unmasked(batch)[128:]:
        original, derived = row[1:16], row[17:]
        assert row[0] == row[16] == BOS and is_in(np.append(EOS, original), parallel)
        ends = np.flatnonzero(original == EOS)
        # At most two ids are of a sentence that is cut off.
        assert ends.tolist() == np.flatnonzero(derived == EOS).tolist() and ends[-1] >= 12
        start = 0
        for end in ends:
            inverted = derive_ids(original[start:end][::-1], s)
            np.testing.assert_array_equal(derived[start:end], inverted)
            start = end + 1

def test_pairs_of_long_sentences_end_as_soon_as_they_can():
    corpus = train.Corpus(None, np.array(([9] * 19 + [EOS] + [9] * 9 + [EOS]) * 5), None)
    # 24 ids from a long sentence on cut off 4 of the next; from a short one on, 14.
    assert train.pair_starts(corpus, 24).tolist() == [0, 30, 60, 90, 120]

def test_dict_mlm_asks_for_half_of_the_known_words_in_the_language_that_it_tells():
    s = small(objective="dict", batch=64)
    dictionary = make_dictionary(s)
    batch = train.make_batch(random_corpus(s), s, dictionary, 0)
    own = np.repeat([[0], [1]], 32, axis=0)  # the language of each row
    told = np.take_along_axis(batch.languages, batch.masked, axis=1)
    np.testing.assert_array_equal(batch.labels >= SPECIALS + s.shift, told == 1)
    known = np.isin(batch.labels - s.shift * told, dictionary[:, 0])
    asked = told != own
    assert known[asked].all() and 0.35 < asked[known].mean() < 0.65
    assert (batch.languages != own).sum() == asked.sum()

def test_the_first_rows_are_short_and_there_are_more_of_them():
    s = small(positions=64, short_steps=3)
    shapes = [train.make_batch(random_corpus(s), s, None, step).tokens.shape for step in (0, 2, 3)]
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
    s = small(weight_decay=0.5, rate=0.25)
    model = MaskedLM(s)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {}
    for optimizer in train.make_optimizers(model, s):
        for group in optimizer.param_groups:
            key = type(optimizer).__name__, group["lr"], group["weight_decay"]
            groups[key] = {names[parameter] for parameter in group["params"]}
    matrices = {name for parameter, name in names.items() if parameter.ndim == 2}
    embeddings = {f"{kind}_embeddings.weight" for kind in ("language", "position", "word")}
    assert groups == {
        ("Muon", s.matrix_rate, 0.5): matrices - embeddings,
        ("AdamW", 0.25, 0.5): embeddings,
        ("AdamW", 0.25, 0.0): set(names.values()) - matrices,
    }
    (adamw,) = train.make_optimizers(model, small(optimizer="adamw"))
    assert {names[parameter] for parameter in adamw.param_groups[0]["params"]} == matrices

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
    train.run(root / "peace", small(), ARGS)
    return root / "peace"

def test_a_run_logs_its_checkpoints_and_leaves_what_is_needed(peace):
    lines = [json.loads(line) for line in (peace / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(20, 250, 20), 250]
    assert set(lines[0]) == {"step", "loss", "mlm", "all", "inside", "outside"}
    for line in lines:  # No cosine is above 1.
        assert line["mlm"] - small().alpha <= line["loss"] < line["mlm"] < 7
    names = ["log.jsonl", "model", "order.json", "settings.json", "tokenizer.model"]
    assert sorted(path.name for path in peace.iterdir()) == names

def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(root, peace):
    folder = root / "killed"
    saved = folder / "checkpoint.safetensors"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])
    rng = random.Random(0)
    resumed = set()
    for kill in [True] * 6 + [False]:
        process = context.Process(target=train.run, args=(folder, small(), ARGS))
        before = saved.stat().st_mtime_ns if saved.exists() else 0
        process.start()
        while kill and process.is_alive():
            time.sleep(0.001)
            # Soon after it has written a checkpoint it is killed.
            if saved.exists() and saved.stat().st_mtime_ns != before:
                time.sleep(0.1 * rng.random())
                process.kill()
                break
        process.join()
        if saved.exists():
            resumed.add(int(load_file(saved)["done"]))
    assert process.exitcode == 0 and len(resumed) >= 3 and not saved.exists()
    assert bits(folder) == bits(peace)

def test_ctrl_c_is_one_line_while_sub_words_are_learned_and_while_training(tmp_path):
    stderr = tmp_path / "stderr"
    arguments = [sys.executable, train.__file__, tmp_path / "run", *OPTIONS]
    arguments += ["--sentences", "6000", "--steps", "5000"]
    for moment in ("sub-words", "step=100"):
        with stderr.open("wb") as file:
            process = subprocess.Popen(arguments, stderr=file, start_new_session=True)
        deadline = time.monotonic() + 100
        while moment not in stderr.read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
        assert messages(stderr.read_text()) == ["train.py: interrupted"]
    assert [path.name[:4] for path in sorted(tmp_path.iterdir())] == ["data", "run", "stde"]

def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 3)
    with pytest.raises(ValueError, match="multiple of 4 for each of 3 processes"):
        train.pretrain(None, small(batch=8), tmp_path, None)

def test_two_processes_train_as_one_does(root):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [*OPTIONS, "--objective", "xlm", "--dropout", "0", "--steps", "100"]
    subprocess.run([*launch, train.__file__, root / "two", *options], check=True, timeout=200)
    train.run(root / "one", small(objective="xlm", dropout=0.0, steps=100), ARGS)
    one, two = [load_file(root / name / "model" / "model.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)

# ---------------------------------------------------------------------- the folder and its text
def test_a_finished_run_needs_no_text_and_others_can_read_it(tmp_path, command, monkeypatch):
    words = [" ".join(sentence.words) for sentence in synth_lang.generate(600)]
    monkeypatch.chdir(tmp_path)
    text, moved, run = Path("text.txt"), Path("moved.txt").absolute(), Path("run").absolute()
    text.write_text("\n".join(words))
    options = [run, *OPTIONS, "--steps", "100", "--vocab-size", "300"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "schedule", lambda step, s: float("nan"))
        (line,) = command(train, *options, "--corpus", text).messages
        assert "no finite loss at step 20" in line
    text.write_text("\n".join(words[:500]))
    assert "other settings or text" in command(train, *options, "--corpus", text).messages[0]
    # The same text is known again, even if it was touched and moved.
    text.rename(moved)
    moved.write_text("\n".join(words))
    os.utime(moved, (1, 1))
    assert command(train, *options, "--corpus", "moved.txt").messages == []
    for path in tmp_path.glob("[rd]*/**/*"):
        assert path.stat().st_mode & 0o044 == path.parent.stat().st_mode & 0o044 == 0o044, path
    before = bits(run)
    moved.unlink()
    monkeypatch.chdir("/")
    assert command(train, *options, "--corpus", moved).messages == []
    assert bits(run) == before
    for other in (["--corpus", moved, "--steps", "200"], []):  # [] is the built-in language.
        (line,) = command(train, *options, *other).messages
        assert "other settings or text" in line

@pytest.mark.parametrize("given, named", [
    ("--corpus missing.txt", "missing.txt"),
    ("--corpus .", "directory"),
    ("--corpus plain.txt latin.txt", "latin.txt:2001"),
    ("--treebank columns.conllu", "columns.conllu:1"),
    ("--order missing.conllu", "missing.conllu"),
    ("--corpus short.txt --vocab-size 20", "too little text"),
    ("--transform sideways", "sideways"),
    ("--steps many", "many"),
    ("--heads 3", "heads"),
])
def test_bad_input_is_one_line_that_names_the_place(given, named, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("a b c.\n" * 52)
    Path("plain.txt").write_text("This is a text.\n" * 100)
    Path("latin.txt").write_bytes(b"This is a text.\n" * 2000 + b"Caf\xe9\n")
    Path("columns.conllu").write_text("1\tWe\t_\tPRON\t_\t_\t0\troot\t_\n\n")
    (line,) = command(train, "runs/one", *OPTIONS, *given.split()).messages
    assert line.startswith("train.py: ") and named in line
    assert not list(Path().glob("runs/*"))

@pytest.mark.parametrize("transform", ["transliterate", "invert"])
@pytest.mark.parametrize("vocab_size", [60, 60_000])
def test_the_suggested_vocabulary_works(transform, vocab_size, tmp_path, command):
    rng, text = random.Random(0), tmp_path / "han.txt"
    letters = [chr(0x4E00 + number) for number in range(301)]
    text.write_text("\n".join("".join(rng.choices(letters, k=20)) for _ in range(600)))
    options = [*OPTIONS, "--steps", "1", "--transform", transform, "--corpus", text]
    (line,) = command(train, tmp_path / "run", *options, "--vocab-size", vocab_size).messages
    suggested = re.search(r"--vocab-size (\d+)", line)[1]
    assert command(train, tmp_path / "run", *options, "--vocab-size", suggested).messages == []

def test_the_options_and_their_help():
    parser = synth_lang.Parser()
    train.add_options(parser)
    args = parser.parse_args(["--corpus", "a", "b", "--treebank", "c", "--steps", "7"])
    assert args.text == [os.path.abspath(name) for name in "abc"]
    assert train.read_options(args, seed=4) == preset("tiny", steps=7, seed=4)
    help_text = " ".join(parser.format_help().split())
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in help_text
    assert "peak rate of AdamW (paper 0.0001, tiny 0.003, small 0.003)" in help_text

# ------------------------------------------------------------------------------- the tokenizers
@pytest.fixture(scope="module", params=["transliterate+invert", "invert"])
def trained(request, root):
    """A run with one vocabulary a language, and one with a vocabulary for both."""
    s = preset("tiny", vocab_size=1200, steps=150, transform=request.param)
    folder = root / f"trained-{request.param}"
    train.run(folder, s, with_text([], sentences=6000))
    return folder, s

def both_languages(folder, s, count, seed):
    """The words of sentences and their ids in our own way, each first original, then derived."""
    languages = train.Tokeniser(folder, s)
    for sentence in synth_lang.generate(count, seed=seed):
        yield sentence.words, languages.encode_sentence(sentence)
        derived = languages.derive(sentence, 0)
        ids = derive_ids(np.array(languages.encode_sentence(derived)), s).tolist()
        words = derived.words
        if s.shift:
            words = [synth_lang.transliterate_word(word) for word in words]
        yield words, ids

def test_the_tokenizer_of_transformers_gives_our_ids(trained):
    from transformers import AutoTokenizer

    folder, s = trained
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert len(tokenizer) == s.vocab_size and tokenizer.mask_token_id == MASK
    for words, ids in both_languages(folder, s, 2000, seed=9):
        assert tokenizer(" ".join(words)).input_ids == [BOS, *ids]
        if UNK not in ids:
            assert tokenizer.decode(ids[:-1]).split() == words
    short, long = tokenizer(["a", "so it is <mask> ."], padding=True).input_ids
    assert short[-1] == tokenizer.pad_token_id == PAD and long.count(MASK) == 1

def test_the_pipeline_of_transformers_fills_in_what_our_model_would(trained):
    from transformers import pipeline

    folder, s = trained
    fill, ours = pipeline("fill-mask", model=str(folder / "model")), from_hf(folder / "model", s)
    for words, ids in both_languages(folder, s, 20, seed=11):
        if len(ids) > 26 or UNK in ids:
            continue
        answers = fill(" ".join(["<mask>", *words]), top_k=5)
        with torch.no_grad():
            hidden = ours.eval().encode(torch.tensor([[BOS, MASK, *ids]]))[0, 1]
            hidden = ours.head_norm(F.gelu(ours.head_dense(hidden)))
            logits = F.linear(hidden, ours.word_embeddings.weight, ours.head_bias)
        assert [answer["token"] for answer in answers] == logits.topk(5).indices.tolist()
        for answer in answers:
            assert answer["sequence"].split()[-len(words) :] == words

    # What kind of word is missing can be known without the word only at the end of a sentence.
    marks = set(".!?")
    if s.shift:
        marks |= {synth_lang.transliterate_word(mark) for mark in marks}
    right = []
    for words, ids in both_languages(folder, s, 60, seed=3):
        if len(ids) < 21 and words[-1] in marks:
            answer = fill(" ".join([*words[:-1], "<mask>"]))[0]
            right.append(answer["token_str"].strip() in marks)
    assert len(right) > 20 and np.mean(right) > 0.9
