"""The model against transformers', the losses against float64, the maskings against their rules."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist
from transformers import RobertaConfig, RobertaForMaskedLM

import alignmlm
from alignmlm import BOS, EOS, MASK, OBJECTIVES, PAD, PRESETS, SPECIALS, Batch, MaskedLM, Settings

SEEDS = st.integers(0, 2**32 - 1)
torch.set_num_threads(1)  # The tensors are tiny.
SIZES = {"vocab_size": 120, "layers": 2, "width": 32, "heads": 2, "feed_forward": 48,
         "positions": 16, "batch": 8}

def tiny(**changes) -> Settings:
    return Settings(**SIZES | {"objective": "mlm"} | changes)

def randomize(model):
    """Move all weights away from their first values, so that one forgotten or swapped shows."""
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()

def random_model(s: Settings, seed: int = 0) -> MaskedLM:
    torch.manual_seed(seed)
    return randomize(MaskedLM(s))

def random_tokens(s: Settings, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """BOS, and then any other ids but that of the padding."""
    tokens = np.random.default_rng(seed).integers(EOS, s.vocab_size, (rows, length))
    tokens[:, 0] = BOS
    return tokens

def random_batch(s: Settings, seed: int = 0) -> Batch:
    """Pairs as XLM has them, masked, and changed as the objective wants it."""
    rng = np.random.default_rng(seed)
    halves = []
    for language, tokens in enumerate(np.split(random_tokens(s, 6, s.positions, seed), 2, axis=1)):
        positions = np.arange(tokens.shape[1])
        halves.append(np.stack(np.broadcast_arrays(tokens, language, positions)))
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

# --------------------------------------------------------------------- settings and dictionary
@pytest.mark.parametrize("wrong, named", [
    ({"objective": "nonsense"}, "objective 'nonsense': give mlm, xlm, dict, align"),
    ({"optimizer": "adam"}, "optimizer"), ({"width": 30}, "width"), ({"batch": 6}, "batch"),
    ({"width": 48, "heads": 5}, "heads"), ({"heads": 0}, "heads"),
    ({"positions": 15}, "positions in multiples of 2"),
    ({"positions": 16, "short_steps": 5}, "positions in multiples of 32"),
    ({"mask_share": 15.0}, "mask_share"), ({"mask_share": 0.02}, "mask_share 0.0625 to 1"),
], ids=str)  # fmt: skip
def test_an_impossible_experiment_is_refused_by_the_name_of_its_setting(wrong, named):
    with pytest.raises(ValueError, match=named):
        tiny(**wrong)

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

@given(st.integers(16, 300), st.floats(0.05, 1), SEEDS, st.booleans())
def test_the_dictionary_has_a_share_of_the_words_each_with_its_counterpart(V, share, seed, moved):
    transform = "transliterate+invert" if moved else "invert"
    s = tiny(vocab_size=V, dictionary_share=share, seed=seed, transform=transform)
    shift, language_size = (V // 2, V // 2) if moved else (0, V)
    words = np.arange(SPECIALS, language_size)
    ids = alignmlm.derive_ids(np.arange(language_size), s)
    np.testing.assert_array_equal(ids, [*range(SPECIALS), *words + shift])

    pairs = alignmlm.make_dictionary(s)
    original, derived = pairs.T
    assert pairs.dtype == np.int64
    assert len(pairs) == round(share * len(words))
    assert (np.diff(original) > 0).all() and np.isin(original, words).all()
    np.testing.assert_array_equal(derived, original + shift)

def test_the_dictionary_is_the_same_for_every_objective_and_another_for_another_seed():
    known = [alignmlm.make_dictionary(tiny(objective=o, seed=3)).tolist() for o in OBJECTIVES]
    assert known == [known[0]] * len(OBJECTIVES)
    assert alignmlm.make_dictionary(tiny(seed=4)).tolist() != known[0]

# ---------------------------------------------------------------------- masks and translations
SHAPES = st.tuples(st.integers(1, 5), st.integers(8, 40))

@given(arrays(np.int64, SHAPES, elements=st.integers(0, 15)), st.floats(0.0625, 1), SEEDS)
def test_an_exact_share_of_every_row_is_masked_and_words_first(tokens, share, seed):
    s = tiny(mask_share=share)
    batch = alignmlm.mask_tokens(tokens, s, np.random.default_rng(seed))
    inputs, masked, labels = batch
    np.testing.assert_equal(alignmlm.mask_tokens(tokens, s, np.random.default_rng(seed)), batch)

    count = round(share * tokens.shape[1])
    assert masked.shape == (len(tokens), count)
    assert (np.diff(masked) > 0).all()
    np.testing.assert_array_equal(labels, np.take_along_axis(tokens, masked, axis=1))
    words = (tokens >= SPECIALS).sum(1)
    np.testing.assert_array_equal((labels >= SPECIALS).sum(1), np.minimum(words, count))
    unmasked = inputs.copy()
    np.put_along_axis(unmasked, masked, labels, axis=1)
    np.testing.assert_array_equal(unmasked, tokens)
    changed = inputs[inputs != tokens]
    assert ((changed == MASK) | (changed >= SPECIALS)).all()

def test_of_the_masked_tokens_8_in_10_become_the_mask_and_1_in_10_a_word_of_either_language():
    s = tiny(vocab_size=48, mask_share=0.5)
    tokens = np.full((400, 100), 30)
    inputs, masked, _ = alignmlm.mask_tokens(tokens, s, np.random.default_rng(0))
    fate = np.take_along_axis(inputs, masked, axis=1).ravel()
    words = [*range(SPECIALS, 24), *range(24 + SPECIALS, 48)]
    counts = np.bincount(fate, minlength=48)
    assert set(fate) == {MASK, *words}
    assert near(counts[MASK], fate.size, 0.8)
    for word in words:
        stays = 0.1 if word == 30 else 0
        assert near(counts[word], fate.size, stays + 0.1 / len(words))
    for place in np.bincount(masked.ravel(), minlength=100):
        assert near(place, 400, 0.5)

@given(st.integers(1, 5), st.integers(1, 20), SEEDS)
def test_counterparts_stand_side_by_side(rows, half, seed):
    original, derived = np.random.default_rng(seed).integers(4, 120, (2, 3, rows, half))
    pairs = alignmlm.pair_translations(original, derived)
    np.testing.assert_array_equal(pairs[:, :, :half], original)
    np.testing.assert_array_equal(pairs[:, :, half:], derived)

@given(SEEDS, st.floats(0.1, 1))
def test_translations_are_asked_for_only_of_words_in_the_dictionary(seed, share):
    s = tiny(dictionary_share=share)
    pairs = alignmlm.make_dictionary(s)
    counterpart = dict(pairs.tolist()) | dict(pairs[:, ::-1].tolist())
    before = random_batch(s, seed)
    batch = alignmlm.ask_translations(before, pairs, s, np.random.default_rng(seed))

    languages = before.languages.copy()
    for row, n in np.argwhere(batch.labels != before.labels):
        assert batch.labels[row, n] == counterpart[before.labels[row, n]]
        place = before.masked[row, n]
        languages[row, place] = 1 - languages[row, place]
    expected = replace(before, labels=batch.labels, languages=languages)
    np.testing.assert_equal(vars(batch), vars(expected))

# ------------------------------------------------------------------------ encoder and losses
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_encoder_knows_order_by_positions_and_a_language_where_the_objective_tells(objective):
    model = random_model(tiny(objective=objective))
    tokens = torch.from_numpy(random_tokens(model.settings, 3, 16))
    languages, places = torch.randint(2, (3, 16)), torch.arange(16).expand(3, 16)
    hidden = model.encode(tokens, languages)
    order, all_seen = torch.randperm(16), torch.ones(3, 1, 1, 16, dtype=torch.bool)
    moved = model.encode(tokens[:, order], languages[:, order], places[:, order], all_seen)
    torch.testing.assert_close(moved, hidden[:, order], atol=1e-5, rtol=0)

    assert torch.equal(model.encode(tokens), model.encode(tokens, torch.zeros_like(tokens)))
    told = objective in ("xlm", "dict")
    assert model.settings.languages == 1 + told
    assert torch.equal(model.encode(tokens), hidden) != told
    # Dropout is for training alone.
    assert not torch.equal(model.train().encode(tokens, languages), hidden)

def oracle(model: MaskedLM, batch: Batch, pairs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """L and L_MLM by their definitions, from the logits of every token."""
    logits = logits_of(model, model.encode(batch.tokens, batch.languages, batch.positions))
    rows = torch.arange(len(logits))[:, None]
    mlm = F.cross_entropy(logits[rows, batch.masked].flatten(0, 1), batch.labels.flatten())
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
    reached = []
    model.head_dense.register_forward_hook(lambda _, inputs, output: reached.append(output.shape))
    loss, mlm = model(batch, torch.from_numpy(pairs))
    exact_loss, exact_mlm = oracle(exact, batch, pairs)
    loss.backward()
    exact_loss.backward()

    # Only masked tokens reach the head, which is the most expensive part.
    assert reached == [(*batch.masked.shape, s.width)]
    assert not mlm.requires_grad
    assert loss.item() == pytest.approx(exact_loss.item(), abs=tolerance)
    assert mlm.item() == pytest.approx(exact_mlm.item(), abs=tolerance)
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        difference = (parameter.grad - other.grad).abs().max()
        assert difference < tolerance * (1 + other.grad.abs().max()), name

def test_the_equations_have_the_gradients_that_small_differences_give():
    torch.manual_seed(0)
    hidden, E, bias = torch.randn(5, 4), torch.randn(9, 4), torch.randn(9)
    inputs = [tensor.double().requires_grad_() for tensor in (hidden, E, bias)]
    labels, pairs = torch.tensor([0, 3, 8, 3, 1]), torch.tensor([[0, 5], [2, 7], [3, 8]])
    mlm = alignmlm.masked_lm_equation
    assert torch.autograd.gradcheck(lambda *x: mlm(*x, labels), inputs)
    assert torch.autograd.gradcheck(lambda E: alignmlm.alignment_equation(E, pairs), inputs[1:2])
    assert alignmlm.alignment_equation(E, torch.tensor([[2, 2], [7, 7]])) == pytest.approx(-1)
    by_hand = F.cross_entropy(F.linear(*inputs), labels)
    assert mlm(*inputs, labels).item() == pytest.approx(by_hand.item(), abs=1e-12)

# ----------------------------------------------------------------------------------- alignment
def added_to_words(model: MaskedLM) -> torch.Tensor:
    """What is added to the words of either language, (2, D), before they are compared."""
    language = model.language_embeddings.weight.data
    return language if model.settings.objective == "xlm" else torch.zeros(2, language.shape[1])

@given(SEEDS, st.sampled_from(list(OBJECTIVES)), st.sampled_from([0, 0.3, 0.8, 1]))
@settings(max_examples=40)
def test_alignment_is_that_of_scipys_distances_in_float64(seed, objective, share):
    s = tiny(objective=objective, dictionary_share=share, vocab_size=40, width=16, layers=1)
    model, pairs = random_model(s, seed).double(), alignmlm.make_dictionary(s)
    E, added = model.word_embeddings.weight.data, added_to_words(model)
    # Some words are found then, and some are not, and their lengths differ.
    E[s.shift :] += E[: s.shift]
    E *= 0.1 + torch.rand(len(E), 1)
    original, derived = E[SPECIALS : s.shift], E[s.shift + SPECIALS :]
    nearest = cdist(original + added[0], derived + added[1], "cosine").argmin(1)
    known = np.isin(np.arange(SPECIALS, s.shift), pairs[:, 0])
    found = 100 * (nearest == np.arange(len(known)))
    groups = {"all": found, "inside": found[known], "outside": found[~known]}
    expected = {name: group.mean() for name, group in groups.items() if group.size}
    assert alignmlm.alignment_score(model, pairs) == pytest.approx(expected)

@given(SEEDS, st.sampled_from(list(OBJECTIVES)))
@settings(max_examples=25)
def test_a_rotation_between_the_languages_is_undone_with_the_dictionary(seed, objective):
    s = tiny(objective=objective, vocab_size=80, width=16, dictionary_share=0.8)
    model, pairs = random_model(s, seed), alignmlm.make_dictionary(s)
    E, added = model.word_embeddings.weight.data, added_to_words(model)
    rotation, _ = torch.linalg.qr(torch.randn(s.width, s.width))
    words = slice(SPECIALS, s.shift)
    E[s.shift :][words] = (E[words] + added[0]) @ rotation - added[1]
    before = copy.deepcopy(model.state_dict())

    rotated = alignmlm.rotate(model, pairs)
    assert alignmlm.alignment_score(rotated, pairs)["all"] == 100
    tokens = torch.randint(SPECIALS, s.language_size, (3, 8))
    original = rotated.encode(tokens, torch.zeros_like(tokens))
    derived = rotated.encode(tokens + s.shift, torch.ones_like(tokens))
    torch.testing.assert_close(derived, original, rtol=0, atol=1e-3)
    assert (rotated.word_embeddings.weight[: s.language_size] == E[: s.language_size]).all()
    # The model that was given is as it was.
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

# -------------------------------------------------------------------------------- transformers
def assert_same_logits(ours: MaskedLM, theirs: RobertaForMaskedLM) -> None:
    """Compare them on rows of every length up to the positions, in one padded batch."""
    s = ours.settings
    tokens = torch.from_numpy(random_tokens(s, s.positions, s.positions))
    tokens[torch.ones_like(tokens).triu(1) == 1] = PAD
    seen = tokens != PAD
    languages = torch.arange(s.positions)[:, None].expand_as(tokens) % s.languages
    hidden = ours.encode(tokens, languages, attention_mask=seen[:, None, None])
    expected = theirs(tokens, seen.long(), token_type_ids=languages).logits
    torch.testing.assert_close(logits_of(ours, hidden[seen]), expected[seen], atol=1e-4, rtol=0)

@pytest.mark.parametrize("s", [
    tiny(layers=1, heads=4, width=16, feed_forward=80, vocab_size=61, positions=32),
    tiny(objective="xlm"), tiny(objective="dict", layers=3, heads=1, positions=8, dropout=0.0),
], ids=["mlm", "xlm", "dict"])  # fmt: skip
def test_what_we_write_has_the_same_logits_in_transformers_and_the_same_bits_here(s, tmp_path):
    model = random_model(s)
    alignmlm.to_hf(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    theirs, problems = RobertaForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(problems.values()), problems
    assert theirs.lm_head.decoder.weight is theirs.roberta.embeddings.word_embeddings.weight
    assert_same_logits(model, theirs.eval())

    back = alignmlm.from_hf(tmp_path, replace(s, layers=7, width=64, vocab_size=10))
    assert back.settings == s
    torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)

@pytest.mark.parametrize("dtype, languages", [
    (torch.float32, 2), (torch.float16, 1), (torch.bfloat16, 2)])  # fmt: skip
def test_what_transformers_saves_is_read_in_float32(dtype, languages, tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=26, type_vocab_size=languages,
        layer_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    theirs = randomize(RobertaForMaskedLM(config)).to(dtype)
    # A pooler, which some published models have, is of no use here and is ignored.
    theirs.roberta.pooler = torch.nn.Linear(32, 32)
    theirs.save_pretrained(tmp_path)
    ours = alignmlm.from_hf(tmp_path).eval()
    s = ours.settings
    assert (s.vocab_size, s.positions, s.languages, s.layers, s.heads) == (90, 24, languages, 2, 4)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert_same_logits(ours, theirs.float())

def assert_refused(folder) -> None:
    with pytest.raises(ValueError, match=f"^{folder}: no RoBERTa"):
        alignmlm.from_hf(folder)

@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_or_missing_file_is_refused_by_its_name(name, tmp_path):
    alignmlm.to_hf(random_model(tiny()), tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    cut = [whole[: int(share * len(whole))] for share in (0, 0.01, 0.5, 0.999)]
    one_tensor = safetensors.torch.save({"lm_head.bias": torch.zeros(120)})
    for damaged in (*cut, b"[1]", b"{}", b'{"a": "\xff"}', one_tensor):
        path.write_bytes(damaged)
        assert_refused(tmp_path)
    path.unlink()
    assert_refused(tmp_path)

@pytest.mark.parametrize("changes", [
    # The weights do not fit the first of these settings. No model here has the others.
    {"vocab_size": 200}, {"num_hidden_layers": 3}, {"max_position_embeddings": 12},
    {"model_type": "bert"}, {"tie_word_embeddings": False}, {"hidden_act": "relu"},
    {"layer_norm_eps": 1e-12}, {"hidden_size": "wide"}, {"num_attention_heads": 0},
    {"vocab_size": 10**15},
], ids=str)  # fmt: skip
def test_settings_of_another_model_are_refused(changes, tmp_path):
    alignmlm.to_hf(random_model(tiny()), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert_refused(tmp_path)

def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    alignmlm.write_file(path, b"old")
    assert list(tmp_path.iterdir()) == [path]

    def fill_the_disk(part, data):
        part.write_text("n")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", fill_the_disk)
    with pytest.raises(OSError):
        alignmlm.write_file(path, b"new")
    assert path.read_bytes() == b"old"
