"""The model against transformers', the losses against float64, the maskings against their rules."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file
from transformers import RobertaConfig, RobertaForMaskedLM

import alignmlm
from alignmlm import BOS, EOS, MASK, OBJECTIVES, PAD, PRESETS, SPECIALS, UNK
from alignmlm import Batch, MaskedLM, Settings, preset

SEEDS = st.integers(0, 2**32 - 1)
torch.set_num_threads(1)  # the tensors are tiny


def tiny(**changes) -> Settings:
    given = {
        "objective": "mlm", "vocab_size": 120, "layers": 2, "width": 32, "heads": 2,
        "feed_forward": 48, "positions": 16, "batch": 8,
    }  # fmt: skip
    return Settings(**given | changes)


def random_model(s: Settings, seed: int = 0) -> MaskedLM:
    """No weight has the value it starts with: a bias or a norm forgotten or swapped shows."""
    torch.manual_seed(seed)
    model = MaskedLM(s).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def random_tokens(s: Settings, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """BOS, then words of both languages with an EOS in every ten."""
    rng = np.random.default_rng(seed)
    words = rng.integers(SPECIALS, s.language_size, (rows, length))
    tokens = words + rng.choice([0, s.shift], (rows, 1))
    tokens[rng.random(tokens.shape) < 0.1] = EOS
    tokens[:, 0] = BOS
    return tokens


def random_batch(s: Settings, seed: int = 0) -> Batch:
    """Of the objective: pairs for XLM, translations asked for by DICT-MLM."""
    rng = np.random.default_rng(seed)
    tokens = random_tokens(s, 6, s.positions, seed)
    languages = (tokens >= s.shift + SPECIALS).astype(np.int64)
    positions = np.tile(np.arange(s.positions), (6, 1))
    if s.objective == "xlm":
        halves = tokens[:, : s.positions // 2], tokens[:, s.positions // 2 :]
        tokens, languages, positions = alignmlm.pair_translations(*halves)
    batch = Batch(*alignmlm.mask_tokens(tokens, s, rng), languages, positions)
    return OBJECTIVES[s.objective].change_batch(batch, alignmlm.make_dictionary(s), s, rng)


def logits_of(model: MaskedLM, hidden: torch.Tensor) -> torch.Tensor:
    head = model.head_norm(F.gelu(model.head_dense(hidden)))
    return F.linear(head, model.word_embeddings.weight, model.head_bias)


def near(count: int, trials: int, probability: float) -> bool:
    """Within five standard deviations of a binomial."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    return abs(count - trials * probability) < 5 * deviation


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"objective": "nonsense"}, "objective 'nonsense': give mlm, xlm, dict, align"),
        ({"optimizer": "adam"}, "optimizer"), ({"width": 30}, "width"),
        ({"width": 48, "heads": 5}, "heads"), ({"batch": 6}, "batch"),
        ({"positions": 15}, "positions in multiples of 2"),
        ({"positions": 16, "short_steps": 5}, "positions in multiples of 32"),
        ({"mask_share": 15.0}, "mask_share"), ({"mask_share": 0.0}, "mask_share"),
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_experiment_is_refused_by_the_name_of_its_setting(wrong, named):
    with pytest.raises(ValueError, match=named):
        tiny(**wrong)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_languages_are_told_apart_by_the_objectives_that_need_it(name, objective):
    assert preset(name, objective=objective).languages == 1 + (objective in ("xlm", "dict"))


def test_the_paper_preset_is_the_papers():
    s = PRESETS["paper"]
    assert (s.layers, s.width, s.heads, s.feed_forward, s.positions) == (8, 512, 8, 2048, 512)
    assert (s.language_size, s.shift) == (40_000, 40_000)
    assert (s.batch, s.steps, s.rate, s.warmup) == (128, 500_000, 1e-4, 10_000)
    assert (s.optimizer, s.decay_share, s.short_steps) == ("adamw", 1, 0)
    assert (s.alpha, s.dropout, s.mask_share) == (10, 0.1, 0.15)
    assert (s.dictionary_share, s.parallel_share) == (0.5, 0.25)
    assert (s.tune_rate, s.tune_epochs, s.tune_length) == (2e-5, 10, 128)
    assert not s.freeze_embeddings


@pytest.mark.parametrize("transform, shift", [("transliterate", 60), ("invert", 0)])
def test_only_transliteration_moves_ids(transform, shift):
    s = tiny(transform=transform)
    assert (s.shift, s.language_size) == (shift, 120 - shift)
    ids = np.arange(s.language_size).reshape(2, -1)
    moved = alignmlm.derive_ids(ids, s)
    assert (moved[ids <= UNK] == ids[ids <= UNK]).all()
    assert (moved[ids > UNK] == ids[ids > UNK] + shift).all()


# ---------------------------------------------------------------------------------- dictionary


@given(st.integers(16, 300), st.floats(0.05, 1), st.integers(0, 2**31))
def test_the_dictionary_is_a_share_of_the_words_each_with_its_counterpart(vocab, share, seed):
    s = tiny(vocab_size=vocab, dictionary_share=share, seed=seed)
    pairs = alignmlm.make_dictionary(s)
    original, derived = pairs.T
    assert pairs.dtype == np.int64
    assert len(pairs) == round(share * (s.language_size - SPECIALS))
    assert (np.diff(original) > 0).all()
    assert (original >= SPECIALS).all() and (original < s.language_size).all()
    assert (derived == original + s.vocab_size // 2).all() and (derived < vocab).all()


def test_the_dictionary_is_the_same_for_every_objective_and_another_for_another_seed():
    known = [alignmlm.make_dictionary(tiny(objective=o, seed=3)) for o in OBJECTIVES]
    for other in known[1:]:
        np.testing.assert_array_equal(other, known[0])
    assert not np.array_equal(alignmlm.make_dictionary(tiny(seed=4)), known[0])


# ------------------------------------------------------------------------------------- masking

TOKENS = arrays(
    np.int64,
    st.tuples(st.integers(1, 5), st.integers(8, 40)),
    elements=st.sampled_from([BOS, PAD, EOS, UNK, *range(SPECIALS, 60), *range(65, 120)]),
)


@given(TOKENS, st.floats(0.05, 0.5), SEEDS)
def test_an_exact_share_of_every_sequence_is_masked_and_never_a_special(tokens, share, seed):
    s = tiny(mask_share=share)
    count = round(share * tokens.shape[1])
    assume(((tokens >= SPECIALS).sum(1) >= count).all())
    before = tokens.copy()
    inputs, masked, labels = alignmlm.mask_tokens(tokens, s, np.random.default_rng(seed))

    np.testing.assert_array_equal(tokens, before)
    assert masked.shape == labels.shape == (len(tokens), count)
    assert all(len(set(row)) == count for row in masked.tolist())
    np.testing.assert_array_equal(labels, np.take_along_axis(tokens, masked, axis=1))
    assert (labels >= SPECIALS).all()
    chosen = np.zeros(tokens.shape, bool)
    np.put_along_axis(chosen, masked, True, axis=1)
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    assert (inputs[chosen] >= MASK).all() and (inputs[chosen] != UNK).all()
    again = alignmlm.mask_tokens(tokens, s, np.random.default_rng(seed))
    for first, second in zip((inputs, masked, labels), again, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_row_of_too_few_words_has_as_many_masked_as_any_other():
    tokens = np.array([[BOS, 30, EOS, EOS, EOS, EOS, EOS, EOS], [BOS, *range(30, 37)]])
    _, masked, labels = alignmlm.mask_tokens(tokens, tiny(mask_share=0.5), np.random.default_rng(0))
    assert masked.shape == (2, 4) and 30 in labels[0] and BOS not in labels[1]


def test_of_the_masked_tokens_8_in_10_become_the_mask_and_1_in_10_a_word_of_either_language():
    s = tiny(vocab_size=48, mask_share=0.5)
    tokens = np.full((400, 100), 30)
    inputs, masked, _ = alignmlm.mask_tokens(tokens, s, np.random.default_rng(0))
    fate = np.take_along_axis(inputs, masked, axis=1).ravel()
    words = [*range(SPECIALS, 24), *range(24 + SPECIALS, 48)]
    counts = np.bincount(fate, minlength=48)
    assert near(counts[MASK], fate.size, 0.8)
    assert set(fate) == {MASK, *words}
    for word in set(words) - {30}:
        assert near(counts[word], fate.size, 0.1 / len(words))
    assert near(counts[30], fate.size, 0.1 + 0.1 / len(words))
    for place in np.bincount(masked.ravel(), minlength=100):
        assert near(place, 400, 0.5)


# -------------------------------------------------------------------- pairs and translations


@given(st.integers(1, 5), st.integers(1, 20), SEEDS)
def test_counterparts_stand_side_by_side_and_the_second_starts_again(rows, half, seed):
    original, derived = np.random.default_rng(seed).integers(4, 120, (2, rows, half))
    tokens, languages, positions = alignmlm.pair_translations(original, derived)
    for array, left, right in (
        (tokens, original, derived), (languages, 0, 1), (positions, range(half), range(half)),
    ):  # fmt: skip
        assert array.shape == (rows, 2 * half) and array.dtype == np.int64
        assert (array[:, :half] == left).all() and (array[:, half:] == right).all()


@given(SEEDS, st.floats(0.1, 1))
def test_translations_are_asked_for_only_of_words_in_the_dictionary(seed, share):
    s = tiny(dictionary_share=share)
    pairs = alignmlm.make_dictionary(s)
    counterpart = dict(pairs.tolist()) | dict(pairs[:, ::-1].tolist())
    before = random_batch(s, seed)
    batch = alignmlm.ask_translations(before, pairs, s, np.random.default_rng(seed))

    languages = before.languages.copy()
    for row, places in enumerate(before.masked):
        for n, place in enumerate(places):
            label, asked = before.labels[row, n], batch.labels[row, n]
            if asked != label:
                assert asked == counterpart[label]
                languages[row, place] = 1 - languages[row, place]
    np.testing.assert_array_equal(batch.languages, languages)
    for name in ("tokens", "masked", "positions"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(before, name))


def test_half_of_the_known_words_are_asked_for_in_translation():
    s = tiny(dictionary_share=1.0)
    word = np.full((100, 100), SPECIALS)
    place = np.tile(np.arange(100), (100, 1))
    batch = Batch(word, place, word, np.zeros_like(word), place)
    rng = np.random.default_rng(0)
    batch = alignmlm.ask_translations(batch, alignmlm.make_dictionary(s), s, rng)
    assert near((batch.labels == SPECIALS + s.shift).sum(), 10_000, 0.5)


# ------------------------------------------------------------------------------------- encoder


@given(st.lists(st.integers(1, 16), min_size=1, max_size=4), SEEDS)
@settings(max_examples=15, deadline=None)
def test_padding_changes_no_hidden_state(lengths, seed):
    s = tiny(objective="xlm")
    model = random_model(s)
    rows = [torch.from_numpy(random_tokens(s, 1, n, seed + n))[0] for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    seen = (padded != PAD)[:, None, None, :]
    hidden = model.encode(padded, torch.ones_like(padded), attention_mask=seen)
    for row, tokens in zip(hidden, rows, strict=True):
        alone = model.encode(tokens[None], torch.ones_like(tokens[None]))[0]
        torch.testing.assert_close(row[: len(tokens)], alone, atol=1e-5, rtol=0)


def test_order_is_known_by_positions_alone():
    s = tiny(objective="xlm")
    model, tokens = random_model(s), torch.from_numpy(random_tokens(s, 3, 16))
    languages, places = (tokens >= 64).long(), torch.arange(16).expand(3, 16)
    order = torch.randperm(16)
    hidden = model.encode(tokens, languages, places)
    moved = model.encode(tokens[:, order], languages[:, order], places[:, order])
    torch.testing.assert_close(moved, hidden[:, order], atol=1e-5, rtol=0)


def test_without_positions_and_languages_they_are_counted_from_0_and_all_0():
    s = tiny(objective="xlm")
    model, tokens = random_model(s), torch.from_numpy(random_tokens(s, 3, 12))
    given = model.encode(tokens, torch.zeros_like(tokens), torch.arange(12).expand(3, 12))
    torch.testing.assert_close(model.encode(tokens), given)


def test_one_language_embedding_serves_both_languages():
    model, tokens = random_model(tiny()), torch.from_numpy(random_tokens(tiny(), 3, 12))
    torch.testing.assert_close(model.encode(tokens, torch.ones_like(tokens)), model.encode(tokens))


def test_dropout_is_for_training_alone():
    model = random_model(tiny(dropout=0.5))
    tokens = torch.from_numpy(random_tokens(tiny(), 3, 12))
    assert torch.equal(model.encode(tokens), model.encode(tokens))
    model.train()
    assert not torch.equal(model.encode(tokens), model.encode(tokens))


# -------------------------------------------------------------------------------------- losses


def oracle(model: MaskedLM, batch: Batch, pairs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """L and L_MLM by their definitions: all logits everywhere, pair after pair."""
    logits = logits_of(model, model.encode(batch.tokens, batch.languages, batch.positions))
    surprises = [
        -torch.log_softmax(logits[row, place], 0)[label]
        for row in range(len(logits))
        for place, label in zip(batch.masked[row], batch.labels[row], strict=True)
    ]
    mlm = torch.stack(surprises).mean()
    if model.settings.objective != "align":
        return mlm, mlm
    E = model.word_embeddings.weight
    cosines = [E[i] @ E[j] / (E[i].norm() * E[j].norm()) for i, j in pairs]
    return mlm - model.settings.alpha * torch.stack(cosines).mean(), mlm


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_loss_and_gradients_are_those_of_the_definition(objective, dtype, tolerance):
    s = tiny(objective=objective, alpha=3.0)
    batch, pairs = random_batch(s).to("cpu"), alignmlm.make_dictionary(s)
    model, exact = random_model(s).to(dtype), random_model(s).double()
    loss, mlm = model(batch, torch.from_numpy(pairs))
    exact_loss, exact_mlm = oracle(exact, batch, pairs)
    loss.backward()
    exact_loss.backward()

    assert not mlm.requires_grad
    assert loss.item() == pytest.approx(exact_loss.item(), abs=tolerance)
    assert mlm.item() == pytest.approx(exact_mlm.item(), abs=tolerance)
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        difference = (parameter.grad - other.grad).abs().max()
        assert difference < tolerance * (1 + other.grad.abs().max()), name


def test_only_masked_tokens_reach_the_head():
    s = tiny()
    model, seen = random_model(s), []
    model.head_dense.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    batch = random_batch(s)
    model(batch.to("cpu"))
    assert [math.prod(shape[:-1]) for shape in seen] == [batch.masked.size]


def test_the_equations_have_the_gradients_that_small_differences_give():
    torch.manual_seed(0)
    hidden, E, bias = torch.randn(5, 4), torch.randn(9, 4), torch.randn(9)
    inputs = [tensor.double().requires_grad_() for tensor in (hidden, E, bias)]
    labels, pairs = torch.tensor([0, 3, 8, 3, 1]), torch.tensor([[0, 5], [2, 7], [3, 8]])
    mlm = alignmlm.masked_lm_equation
    assert torch.autograd.gradcheck(lambda *x: mlm(*x, labels), inputs)
    assert torch.autograd.gradcheck(lambda E: alignmlm.alignment_equation(E, pairs), inputs[1:2])
    by_hand = F.cross_entropy(F.linear(*inputs), labels)
    assert mlm(*inputs, labels).item() == pytest.approx(by_hand.item(), abs=1e-12)


# ----------------------------------------------------------------------------------- alignment


def naive_alignment(model: MaskedLM, words) -> float:
    """Percent of `words` found, in float64, one pair of vectors after another."""
    s = model.settings
    E = model.word_embeddings.weight.detach().double().numpy()
    added = model.language_embeddings.weight.detach().double().numpy()
    if s.objective != "xlm":
        added = np.zeros((2, s.width))
    found = 0
    for i in words:
        u = E[i] + added[0]
        cosines = {}
        for j in range(SPECIALS, s.language_size):
            v = E[j + s.shift] + added[1]
            cosines[j] = u @ v / math.sqrt((u @ u) * (v @ v))
        found += max(cosines, key=cosines.get) == i
    return 100 * found / len(words)


@given(SEEDS, st.sampled_from(["xlm", "dict", "align"]), st.floats(0.1, 0.9))
@settings(max_examples=25)
def test_alignment_is_that_of_a_double_loop(seed, objective, share):
    s = tiny(objective=objective, dictionary_share=share, vocab_size=40, width=16, layers=1)
    model, pairs = random_model(s, seed), alignmlm.make_dictionary(s)
    E, half = model.word_embeddings.weight.data, s.shift + SPECIALS
    E[half : half + 10] += E[SPECIALS : SPECIALS + 10]  # some are found, some are not
    words = range(SPECIALS, s.shift)
    inside = sorted(pairs[:, 0].tolist())
    outside = sorted(set(words) - set(inside))
    assume(outside)
    score = alignmlm.alignment_score(model, pairs)
    for name, group in (("all", words), ("inside", inside), ("outside", outside)):
        assert score[name] == pytest.approx(naive_alignment(model, group)), name


@pytest.mark.parametrize("objective", ["xlm", "dict"])
def test_planted_alignments_are_found_whatever_their_length(objective):
    s = tiny(objective=objective)
    model, pairs = random_model(s), alignmlm.make_dictionary(s)
    E, language = model.word_embeddings.weight.data, model.language_embeddings.weight.data
    added = language if objective == "xlm" else torch.zeros(2, s.width)
    length = torch.rand(s.shift, 1) + 0.1
    E[s.shift :] = length * (E[: s.shift] + added[0]) - added[1]
    assert alignmlm.alignment_score(model, pairs) == {"all": 100, "inside": 100, "outside": 100}

    E[pairs[:, 1]] = E[pairs[:, 1]].roll(1, 0)  # each known word now has another's vector
    score = alignmlm.alignment_score(model, pairs)
    assert score["all"] == pytest.approx(100 * (1 - len(pairs) / (s.shift - SPECIALS)))
    assert (score["inside"], score["outside"]) == (0, 100)


@given(SEEDS, st.sampled_from(list(OBJECTIVES)))
@settings(max_examples=25)
def test_a_rotation_between_the_languages_is_undone_with_the_dictionary(seed, objective):
    s = tiny(objective=objective, vocab_size=80, width=16, dictionary_share=0.8)
    model, pairs = random_model(s, seed), alignmlm.make_dictionary(s)
    E, language = model.word_embeddings.weight.data, model.language_embeddings.weight.data
    added = language if objective == "xlm" else torch.zeros(2, s.width)
    rotation, _ = torch.linalg.qr(torch.randn(s.width, s.width))
    words = slice(SPECIALS, s.shift)
    E[s.shift :][words] = (E[words] + added[0]) @ rotation - added[1]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    rotated = alignmlm.rotate(model, pairs)
    assert alignmlm.alignment_score(rotated, pairs)["all"] == 100
    tokens = torch.randint(SPECIALS, s.language_size, (3, 8))
    original = rotated.encode(tokens, torch.zeros_like(tokens))
    derived = rotated.encode(tokens + s.shift, torch.ones_like(tokens))
    torch.testing.assert_close(derived, original, rtol=0, atol=1e-3)
    assert (rotated.word_embeddings.weight[: s.language_size] == E[: s.language_size]).all()
    for name, tensor in model.state_dict().items():  # of the model that was given
        assert (tensor == before[name]).all(), name


def test_with_all_words_in_the_dictionary_none_is_outside():
    s = tiny(dictionary_share=1.0)
    score = alignmlm.alignment_score(random_model(s), alignmlm.make_dictionary(s))
    assert score.keys() == {"all", "inside"}


# -------------------------------------------------------------------------------- transformers

SHAPES = [
    tiny(),
    tiny(objective="xlm"),
    tiny(layers=1, heads=4, width=16, feed_forward=80, vocab_size=61, positions=32),
    tiny(layers=3, heads=1, objective="dict", positions=8, dropout=0.0),
]


def from_pretrained(folder) -> RobertaForMaskedLM:
    model, info = RobertaForMaskedLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def assert_same_logits(ours: MaskedLM, theirs: RobertaForMaskedLM) -> None:
    """Sequences of every length up to the positions, in one padded batch."""
    s = ours.settings
    tokens = torch.from_numpy(random_tokens(s, s.positions, s.positions))
    tokens[torch.arange(s.positions) > torch.arange(s.positions)[:, None]] = PAD
    languages = torch.arange(s.positions)[:, None] % s.languages + torch.zeros_like(tokens)
    with torch.no_grad():
        seen = (tokens != PAD)[:, None, None, :]
        logits = logits_of(ours, ours.encode(tokens, languages, attention_mask=seen))
        expected = theirs(tokens, (tokens != PAD).long(), token_type_ids=languages).logits
    torch.testing.assert_close(logits[tokens != PAD], expected[tokens != PAD], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        logits_of(ours, ours.encode(tokens[-1:], languages[-1:])), expected[-1:], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("s", SHAPES, ids=range(len(SHAPES)))
def test_transformers_opens_what_we_write_and_gives_the_same_logits(s, tmp_path):
    ours = random_model(s)
    alignmlm.to_hf(ours, tmp_path)
    theirs = from_pretrained(tmp_path)
    assert_same_logits(ours, theirs)
    embeddings = theirs.roberta.embeddings.word_embeddings.weight
    assert theirs.lm_head.decoder.weight is embeddings
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("s", SHAPES, ids=range(len(SHAPES)))
def test_there_and_back_is_bit_identical(s, tmp_path):
    model = random_model(s)
    alignmlm.to_hf(model, tmp_path)
    back = alignmlm.from_hf(tmp_path, replace(s, layers=7, width=64, vocab_size=10))
    assert back.settings == s
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def their_model(**changes) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    config = RobertaConfig(**{
        "vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 26, "type_vocab_size": 2,
        "layer_norm_eps": 1e-5, "bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS,
    } | changes)  # fmt: skip
    theirs = RobertaForMaskedLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return theirs


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}], ids=["one file", "sharded"])
def test_what_transformers_saves_is_read(options, tmp_path):
    theirs = their_model()
    theirs.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(options)
    ours = alignmlm.from_hf(tmp_path).eval()
    s = ours.settings
    assert (s.vocab_size, s.positions, s.languages, s.layers, s.heads) == (90, 24, 2, 2, 4)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_and_a_pooler_is_ignored(dtype, tmp_path):
    theirs = their_model(type_vocab_size=1).to(dtype)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    pooler = {"roberta.pooler.dense.weight": torch.zeros(32, 32, dtype=dtype)}
    save_file(load_file(path) | pooler, path, {"format": "pt"})
    ours = alignmlm.from_hf(tmp_path).eval()
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_same_logits(ours, theirs.float())


def cut(share):
    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def without(name):
    return lambda folder: (folder / name).unlink()


def with_config(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def with_config_text(text):
    return lambda folder: (folder / "config.json").write_bytes(text)


def without_a_tensor(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.bias"]
    save_file(tensors, path)


DAMAGES = {
    "weights cut to nothing": ("model.safetensors", cut(0)),
    "weights cut in the header": ("model.safetensors", cut(0.01)),
    "weights cut in the middle": ("model.safetensors", cut(0.5)),
    "weights cut at the end": ("model.safetensors", cut(0.999)),
    "weights missing": ("model.safetensors", without("model.safetensors")),
    "a tensor missing": ("model.safetensors", without_a_tensor),
    "another vocabulary": ("model.safetensors", with_config(vocab_size=200)),
    "another width": ("model.safetensors", with_config(hidden_size=64)),
    "more layers": ("model.safetensors", with_config(num_hidden_layers=3)),
    "fewer positions": ("model.safetensors", with_config(max_position_embeddings=12)),
    "settings missing": ("config.json", without("config.json")),
    "settings not JSON": ("config.json", with_config_text(b"{")),
    "settings not UTF-8": ("config.json", with_config_text(b'{"a": "\xff"}')),
    "settings no object": ("config.json", with_config_text(b"[1]")),
    "settings empty": ("config.json", with_config_text(b"{}")),
    "another kind of model": ("config.json", with_config(model_type="bert")),
    "untied matrices": ("config.json", with_config(tie_word_embeddings=False)),
    "another activation": ("config.json", with_config(hidden_act="relu")),
    "another epsilon": ("config.json", with_config(layer_norm_eps=1e-12)),
    "a word for a number": ("config.json", with_config(hidden_size="wide")),
    "heads that do not divide": ("config.json", with_config(num_attention_heads=3)),
    "no heads": ("config.json", with_config(num_attention_heads=0)),
    "less than nothing": ("config.json", with_config(vocab_size=-5)),
    "more than memory": ("config.json", with_config(vocab_size=10**15)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_by_the_name_of_its_file(damage, tmp_path):
    name, act = DAMAGES[damage]
    alignmlm.to_hf(random_model(tiny()), tmp_path)
    act(tmp_path)
    with pytest.raises(ValueError, match="no RoBERTa") as error:
        alignmlm.from_hf(tmp_path)
    assert str(error.value).startswith(str(tmp_path / name))


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    alignmlm.write_file(path, b"old")

    def fill_the_disk(part, data):
        with open(part, "wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(type(path), "write_bytes", fill_the_disk)
        alignmlm.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    alignmlm.write_file(path, b"newer")
    assert path.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [path]
