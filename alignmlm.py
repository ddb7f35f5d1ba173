"""ALIGN-MLM and the three objectives that it is measured against, in one file.

One RoBERTa is pre-trained on two languages at once, an original and one derived from it, whose
words have rows of their own in the same embedding matrix. Here, in the order that data meets it:
settings; the dictionary of known word pairs; masking, and how XLM and DICT-MLM change a batch; the
model and its loss; the alignment score; weights out to, and in from, the transformers library.

  ALIGN-MLM  Tang, Deshpande, Narasimhan 2022, arXiv 2211.08547 ("the paper")
  RoBERTa    Liu et al. 2019, arXiv 1907.11692
  XLM        Conneau and Lample 2019, arXiv 1901.07291
  DICT-MLM   Chaudhary et al. 2020, arXiv 2010.12566

Letters in shapes: B sequences of T tokens, M of them masked; D width; V rows of the embedding
matrix, both languages'; K dictionary pairs.
"""

import copy
import json
import math
import os
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kernels import alignment_loss, masked_lm_loss

OBJECTIVES = ("mlm", "xlm", "dict", "align")
BOS, PAD, EOS, MASK = range(4)  # both languages share these
SPECIALS = 4  # the first id of a language's own: <unk>, then its sub-words
SHORT = 32  # tokens in a short row; the fewer positions, the sooner learned (RESULTS.md, 2)

MOST = 10**7  # of any number; only a damaged file asks for more
LIMITS = {  # of a setting, both allowed; any other number is above 0
    "seed": (0, 2**32), "alpha": (0, MOST), "weight_decay": (0, MOST), "layers": (1, 1000),
    "positions": (8, MOST), "mask_share": (0.01, 0.5), "dropout": (0, 0.99), "overlap": (0, 1),
    "tune_length": (8, MOST), "short_steps": (0, MOST),
    "dictionary_share": (1e-9, 1), "parallel_share": (1e-9, 1), "translate_probability": (0, 1),
}  # fmt: skip


def setting(default, meaning: str = ""):
    """A field of Settings; `train.py --help` says its meaning."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """One experiment. The defaults are the paper's."""

    objective: str = setting("align", "; ".join(OBJECTIVES))
    transform: str = setting("transliterate+invert", "of transliterate, invert, permute, syntax")
    seed: int = setting(0, "of all that is random; the corpus has none")
    # the model
    vocab_size: int = setting(80_000, "rows of E: both languages' sub-words, half each")
    overlap: float = setting(0.0, "share of the words that T_trans leaves as they are")
    languages: int = setting(1, "language embeddings; 2 where the objective tells them apart")
    layers: int = setting(8)
    width: int = setting(512)
    heads: int = setting(8)
    feed_forward: int = setting(2048, "its width")
    positions: int = setting(512, "the longest sequence")
    dropout: float = setting(0.1)
    # the objectives
    mask_share: float = setting(0.15, "of the tokens")
    alpha: float = setting(10.0, "weight of the alignment loss")
    dictionary_share: float = setting(0.5, "of the vocabulary, in D")
    parallel_share: float = setting(0.25, "of the pairs that the text has room for, for XLM")
    translate_probability: float = setting(0.5, "for DICT-MLM")
    # pre-training
    batch: int = setting(128, "sequences a step")
    steps: int = setting(500_000)
    short_steps: int = setting(0, f"of them, the first, with more rows, of {SHORT} tokens each")
    rate: float = setting(1e-4, "the peak: linear warm-up, then linear decay to zero")
    warmup: int = setting(10_000, "steps")
    weight_decay: float = setting(0.01)
    clip: float = setting(1.0, "the gradient's norm")
    # fine-tuning
    tune_epochs: int = setting(10, "for NLI the paper has 5")
    tune_batch: int = setting(32)
    tune_rate: float = setting(2e-5)
    tune_length: int = setting(128, "tokens")
    freeze_embeddings: bool = setting(False, "of words, in fine-tuning")

    def __post_init__(self):
        """Raise ValueError, naming the setting and the mend, for an experiment that cannot be."""
        if self.objective not in OBJECTIVES:
            raise ValueError(f"no objective {self.objective!r}; there are {', '.join(OBJECTIVES)}")
        for one in fields(self):
            value, (low, high) = getattr(self, one.name), LIMITS.get(one.name, (1e-9, MOST))
            right = type(value) is one.type or (type(value), one.type) == (int, float)
            if not right or (one.type in (int, float) and not low <= value <= high):
                raise ValueError(f"settings: {one.name} cannot be {value!r}")
        if self.width % self.heads or self.width % 16 or self.positions % 2 or self.batch % 4:
            raise ValueError("settings: width must be a multiple of heads and of 16 (which is what "
                             "the kernels take), positions of 2 and batch of 4")  # fmt: skip
        if self.short_steps and (self.positions % SHORT or self.short_steps >= self.steps):
            raise ValueError(f"settings: with short_steps positions must be a multiple of {SHORT} "
                             "and steps more than they: lower --short-steps")  # fmt: skip
        if not round(self.mask_share * (SHORT if self.short_steps else self.positions)):
            raise ValueError("settings: mask_share of so few positions is no token: raise either")
        if self.tune_length > self.positions:
            raise ValueError(f"settings: tune_length {self.tune_length} is beyond the model's "
                             f"{self.positions} positions: lower it or raise them")  # fmt: skip

    @property
    def shift(self) -> int:
        """What turns a word's id into its counterpart's: i -> i + V, or nothing in one script."""
        return self.vocab_size // 2 if "transliterate" in self.transform else 0

    @property
    def pieces(self) -> int:
        """Sub-words of one language, specials included."""
        return self.shift or self.vocab_size


PRESETS = {
    "paper": Settings(),
    # meant for one GPU; reckoned (RESULTS.md, 10), not measured
    "small": Settings(
        vocab_size=4_000, layers=4, width=256, heads=4, feed_forward=1024, positions=128,
        batch=128, steps=5_000, short_steps=4_000, rate=1e-3, warmup=500,
        tune_rate=1e-3, tune_epochs=3, freeze_embeddings=True,
    ),
    # one CPU core, two minutes
    "tiny": Settings(
        vocab_size=4_000, layers=2, width=64, heads=4, feed_forward=256, positions=32,
        batch=64, steps=1_200, rate=3e-3, warmup=200, dropout=0.0,
        tune_rate=6e-3, tune_epochs=4, tune_length=32, freeze_embeddings=True,
    ),
}  # fmt: skip


def preset(name: str, **changes) -> Settings:
    """A preset with these settings changed; languages follow the objective."""
    objective = changes.get("objective", PRESETS[name].objective)
    languages = 2 if objective in ("xlm", "dict") else 1
    return replace(PRESETS[name], **{"languages": languages} | changes)


# ---------------------------------------------------------------------------- the two languages


@cache
def derived_ids(s: Settings) -> np.ndarray:
    """T_trans of every id of the original language: i -> i + V. Returns (pieces,) int64.

    The specials stay, and an `overlap` share of the words, the same ones with every seed. Source:
    the paper.
    """
    ids = np.arange(s.pieces)
    words = np.random.default_rng(0).permutation(ids[SPECIALS:])
    moved = words[round(s.overlap * len(words)) :]
    ids[moved] += s.shift
    ids.flags.writeable = False  # the cache gives the same array to all
    return ids


def make_dictionary(s: Settings) -> np.ndarray:
    """D: a random share of the original language's words, each with its counterpart.

    Returns (K, 2) int64, ascending. Source: the paper.
    """
    words = np.arange(SPECIALS, s.pieces)
    rng = np.random.default_rng([s.seed, 0xD1C7])
    known = np.sort(rng.choice(words, round(s.dictionary_share * len(words)), replace=False))
    return np.stack([known, derived_ids(s)[known]], axis=1)


@dataclass
class Batch:
    """What a step sees: M masked tokens a sequence. numpy when made, tensors once moved."""

    tokens: np.ndarray  # (B, T) int64, masked
    masked: np.ndarray  # (B, M) int64, which of the T tokens are
    labels: np.ndarray  # (B, M) int64, what is to be predicted there
    languages: np.ndarray  # (B, T) int64, 0 original, 1 derived
    positions: np.ndarray  # (B, T) int64

    def to(self, device: str, part: slice = slice(None)) -> "Batch":
        """Tensors of these sequences on `device`; the copy does not wait for the device."""
        tensors = {name: torch.from_numpy(array[part]) for name, array in vars(self).items()}
        if device != "cpu":
            tensors = {k: t.pin_memory().to(device, non_blocking=True) for k, t in tensors.items()}
        return Batch(**tensors)


def mask_tokens(tokens: np.ndarray, s: Settings, rng: np.random.Generator):
    """RoBERTa's dynamic masking of tokens (B, T) int64; specials stay.

    Of the chosen tokens 80 % become <mask>, 10 % a random word of either language and 10 % stay.
    Every sequence has exactly round(mask_share * T) of them chosen, not that many on average:
    shapes then change with T alone, and the mean over processes is the mean over all tokens.
    Returns inputs (B, T), masked (B, M) and labels (B, M), as in Batch.
    """
    order = rng.random(tokens.shape, dtype=np.float32)
    order[tokens < SPECIALS] = 2  # after every word
    count = round(s.mask_share * tokens.shape[1])
    masked = np.sort(np.argpartition(order, count, axis=1)[:, :count])
    labels = np.take_along_axis(tokens, masked, axis=1)

    fate = rng.random(labels.shape)
    words = rng.integers(SPECIALS, s.pieces, labels.shape)
    words = np.where(rng.integers(2, size=labels.shape), derived_ids(s)[words], words)
    replaced = np.select([fate < 0.8, fate < 0.9], [MASK, words], labels)
    inputs = tokens.copy()
    np.put_along_axis(inputs, masked, replaced, axis=1)
    return inputs, masked, labels


def pair_translations(original: np.ndarray, derived: np.ndarray) -> tuple[np.ndarray, ...]:
    """Translation language modelling's input (XLM). Both: (B, T / 2) int64.

    Returns tokens, languages and positions, each (B, T): counterparts side by side, the second's
    positions starting again from zero.
    """
    tokens = np.concatenate([original, derived], axis=1)
    languages = np.concatenate([np.zeros_like(original), np.ones_like(derived)], axis=1)
    positions = np.tile(np.arange(original.shape[1]), (len(tokens), 2))
    return tokens, languages, positions


def ask_translations(
    batch: Batch, dictionary: np.ndarray, s: Settings, rng: np.random.Generator
) -> None:
    """DICT-MLM, in place: of the masked tokens in D a share is to be predicted in translation.

    The language embedding at such a place becomes that of the language asked for: the only sign of
    what is wanted. As in Chaudhary et al. 2020 the *label* is translated; the code of ALIGN-MLM's
    authors translates the *input* and keeps the label. What is kept here is the method that was
    published, as that is what we compare with.
    """
    translation = np.full(s.vocab_size, -1)
    translation[dictionary[:, 0]], translation[dictionary[:, 1]] = dictionary.T[::-1]
    asked = rng.random(batch.labels.shape) < s.translate_probability
    sequence, n = np.nonzero(asked & (translation[batch.labels] >= 0))
    batch.labels[sequence, n] = translation[batch.labels[sequence, n]]
    batch.languages[sequence, batch.masked[sequence, n]] ^= 1


# ------------------------------------------------------------------------------------ the model


def dropout(x, p: float):
    """F.dropout in training; on a CPU from 16 random bits an element, for speed.

    torch's generator of the mask, one uniform number an element, takes a quarter of a step there.
    """
    if p == 0 or x.is_cuda:
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    return torch.where(bits >= round(p * 2**16) - 2**15, x * (1 / (1 - p)), 0.0)


def attend(query, key, value, mask, p: float):
    """softmax(Q K' / sqrt(d)) V with dropout of the weights; (B, heads, T, d) each.

    mask: None, or (B, 1, 1, T) bool, False where nothing is to be attended to.
    """
    if p == 0 or query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, mask, p)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return dropout(scores.softmax(-1), p) @ value


class Layer(nn.Module):
    """A transformer block with the layer norms after the sums (Vaswani et al. 2017)."""

    def __init__(self, s: Settings):
        super().__init__()
        self.heads, self.dropout = s.heads, s.dropout
        self.qkv = nn.Linear(s.width, 3 * s.width)
        self.attention_out = nn.Linear(s.width, s.width)
        self.attention_norm = nn.LayerNorm(s.width)
        self.up = nn.Linear(s.width, s.feed_forward)
        self.down = nn.Linear(s.feed_forward, s.width)
        self.norm = nn.LayerNorm(s.width)

    def forward(self, hidden, attention_mask=None):
        B, T, D = hidden.shape
        drop = self.dropout if self.training else 0.0
        qkv = self.qkv(hidden).view(B, T, 3, self.heads, D // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads) each
        mixed = attend(query, key, value, attention_mask, drop)
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(B, T, D))
        hidden = self.attention_norm(hidden + dropout(mixed, drop))
        fed = self.down(F.gelu(self.up(hidden)))
        return self.norm(hidden + dropout(fed, drop))


class MaskedLM(nn.Module):
    """RoBERTa: an encoder, and a head whose output matrix is the word-embedding matrix E."""

    def __init__(self, s: Settings):
        super().__init__()
        self.settings = s
        self.word_embeddings = nn.Embedding(s.vocab_size, s.width)
        self.position_embeddings = nn.Embedding(s.positions, s.width)
        self.language_embeddings = nn.Embedding(s.languages, s.width)
        self.embedding_norm = nn.LayerNorm(s.width)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.head_dense = nn.Linear(s.width, s.width)
        self.head_norm = nn.LayerNorm(s.width)
        self.head_bias = nn.Parameter(torch.zeros(s.vocab_size))
        std = 0.02 * math.sqrt(512 / s.width)  # RoBERTa's 0.02 at the paper's width, and in scale
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def encode(self, tokens, languages=None, positions=None, padded=False):
        """Hidden states (B, T, D) of tokens (B, T) int64.

        languages, positions: (B, T) int64; None means all 0, and 0 to T - 1. A model with one
        language embedding gives it to both languages. padded: tokens may hold PAD, which no
        token then attends to (without it attention needs no mask, which is faster). Raises
        ValueError if T is beyond the model's positions.
        """
        T = tokens.shape[1]
        if T > (most := self.settings.positions):
            raise ValueError(f"sequences of {T} tokens, but the model has {most} positions")
        if positions is None:
            positions = torch.arange(T, device=tokens.device)
        if languages is None or self.settings.languages == 1:
            languages = torch.zeros_like(tokens[:1, :1])
        hidden = self.word_embeddings(tokens) + self.position_embeddings(positions)
        hidden = self.embedding_norm(hidden + self.language_embeddings(languages))
        hidden = dropout(hidden, self.settings.dropout if self.training else 0.0)
        attention_mask = (tokens != PAD)[:, None, None, :] if padded else None
        for layer in self.layers:
            hidden = layer(hidden, attention_mask)
        return hidden

    def head(self, hidden):
        """(..., D) -> (..., D), what E is multiplied with to give logits."""
        return self.head_norm(F.gelu(self.head_dense(hidden)))

    def logits(self, hidden):
        """(..., D) -> (..., V). Training never calls it: the loss needs no whole N x V matrix."""
        return F.linear(self.head(hidden), self.word_embeddings.weight, self.head_bias)

    def forward(self, batch: Batch, dictionary=None):
        """The objective's loss and, for the log, L_MLM alone (float32 scalars).

        L_MLM is the mean cross entropy over the masked tokens, the only ones that reach the head.
        MLM, XLM and DICT-MLM are L_MLM of batches made differently (`mask_tokens`,
        `pair_translations`, `ask_translations`). ALIGN-MLM is
        L_MLM + alpha * L_align over the whole of D: dictionary (K, 2) int64, used by it alone.
        """
        hidden = self.encode(batch.tokens, batch.languages, batch.positions)
        masked = self.head(hidden.take_along_dim(batch.masked[..., None], 1)).flatten(0, 1)
        weight = self.word_embeddings.weight
        loss = mlm = masked_lm_loss(masked, weight, self.head_bias, batch.labels.flatten())
        if self.settings.objective == "align":
            loss = mlm + self.settings.alpha * alignment_loss(weight, dictionary)
        return loss, mlm.detach()


# ---------------------------------------------------------------------------------- measurement


def added_languages(model: MaskedLM):
    """What alignment adds to original and to derived words, (2, D): XLM's language embeddings, as
    the paper does, and nothing else."""
    return model.language_embeddings.weight[[0, -1]] * (model.settings.objective == "xlm")


@torch.no_grad()
def alignment_score(model: MaskedLM, dictionary: np.ndarray) -> dict[str, float]:
    """The share, in percent, of original words whose nearest derived word is their counterpart.

    Nearest by cosine among all derived words. Over "all" words and over those "outside" the
    dictionary (NaN if there are none; words that both languages share count as known).
    dictionary: (K, 2) int64. Source: the paper.
    """
    s, ids = model.settings, derived_ids(model.settings)[SPECIALS:]
    E, language = model.word_embeddings.weight, added_languages(model)
    original = E[SPECIALS : s.pieces] + language[0]
    derived = F.normalize(E[torch.tensor(ids)] + language[1], dim=1)
    nearest = torch.cat([(some @ derived.T).argmax(1) for some in original.split(1024)])
    found = nearest.cpu().numpy() == np.arange(len(ids))
    outside = ids >= s.pieces
    outside[dictionary[:, 0] - SPECIALS] = False
    shares = {"all": found, "outside": found[outside]}
    return {k: 100 * float(v.mean()) if len(v) else math.nan for k, v in shares.items()}


@torch.no_grad()
def rotate(model: MaskedLM, dictionary: np.ndarray) -> MaskedLM:
    """A copy with the derived words turned onto the original ones, and given their language
    embedding: what a dictionary gives without any training.

    By the orthogonal map that fits the dictionary best (Schönemann 1966; one of many, if K < D).
    Words that both languages share stay. dictionary: (K, 2) int64.
    """
    model = copy.deepcopy(model)
    E, language = model.word_embeddings.weight, added_languages(model)
    pairs = torch.from_numpy(dictionary[dictionary[:, 0] != dictionary[:, 1]])
    original, derived = E[pairs.T] + language[:, None]  # (K, D) each
    u, _, v = torch.linalg.svd(derived.T @ original)
    own = derived_ids(model.settings)
    own = torch.from_numpy(own[own >= model.settings.pieces])
    E[own] = (E[own] + language[1]) @ (u @ v) - language[0]
    model.language_embeddings.weight[-1] = model.language_embeddings.weight[0]
    return model


# ---------------------------------------------------------- out to, and in from, transformers

HF_CONFIG = {  # their name of a setting: ours
    "vocab_size": "vocab_size", "type_vocab_size": "languages", "num_hidden_layers": "layers",
    "hidden_size": "width", "num_attention_heads": "heads", "intermediate_size": "feed_forward",
    "hidden_dropout_prob": "dropout",
}  # fmt: skip
HF_FIXED = {"model_type": "roberta", "hidden_act": "gelu", "layer_norm_eps": 1e-5}
HF_DERIVED = {"lm_head.decoder.weight", "lm_head.decoder.bias", "roberta.embeddings.position_ids"}
HF_SKIPPED_POSITIONS = 2  # RoBERTa numbers positions from PAD + 1
HF_MODULES = {  # our name of a module: theirs
    "word_embeddings": "roberta.embeddings.word_embeddings",
    "position_embeddings": "roberta.embeddings.position_embeddings",
    "language_embeddings": "roberta.embeddings.token_type_embeddings",
    "embedding_norm": "roberta.embeddings.LayerNorm",
    "attention_out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm",
    "head_dense": "lm_head.dense", "head_norm": "lm_head.layer_norm",
}  # fmt: skip


def _hf_names(name: str) -> list[str]:
    """Our tensor's name -> theirs; our one matrix for query, key and value is three of theirs."""
    if name == "head_bias":
        return ["lm_head.bias"]
    *layer, module, kind = name.split(".")
    prefix = f"roberta.encoder.layer.{layer[1]}." if layer else ""
    if module == "qkv":
        return [f"{prefix}attention.self.{part}.{kind}" for part in ("query", "key", "value")]
    return [f"{prefix}{HF_MODULES[module]}.{kind}"]


# what opening a damaged file may raise
DAMAGE = (OSError, AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError,
          SafetensorError)  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all: under another name, flushed, then renamed."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.replace(part, path)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all: under another name, flushed, then renamed."""
    part = f"{path}.part"
    try:
        save_file(tensors, part, metadata)
    except SafetensorError as error:  # a full disk, say
        raise OSError(None, str(error), str(path)) from error
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def to_hf(model: MaskedLM, folder: str | Path) -> None:
    """Write a folder that transformers.RobertaForMaskedLM.from_pretrained opens.

    Same logits to 1e-4; language embeddings become its token types.
    """
    folder, s = Path(folder), model.settings
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "position_embeddings.weight":
            tensor = F.pad(tensor, (0, 0, HF_SKIPPED_POSITIONS, 0))
        names = _hf_names(name)
        tensors |= zip(names, (t.cpu().clone() for t in tensor.chunk(len(names))), strict=True)
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config = {theirs: getattr(s, ours) for theirs, ours in HF_CONFIG.items()} | HF_FIXED | {
        "architectures": ["RobertaForMaskedLM"], "tie_word_embeddings": True,
        "bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS,
        "max_position_embeddings": s.positions + HF_SKIPPED_POSITIONS,
        "attention_probs_dropout_prob": s.dropout,
    }  # fmt: skip
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def from_hf(folder: str | Path, settings: Settings | None = None) -> MaskedLM:
    """The model in a folder that `to_hf` or transformers wrote (RobertaForMaskedLM).

    settings: the experiment's; what concerns the model is read from the folder. Raises ValueError,
    naming the file, when it is missing, damaged, or holds another kind of model.
    """
    file = Path(folder, "config.json")
    try:
        config = json.loads(file.read_text())
        for key, value in HF_FIXED.items():
            if config[key] != value:
                raise ValueError(f"{key} is {config[key]!r}, but only {value!r} is known here")
        positions = config["max_position_embeddings"] - HF_SKIPPED_POSITIONS
        s = settings or Settings(tune_length=min(positions, Settings.tune_length))
        ours = {ours: config[theirs] for theirs, ours in HF_CONFIG.items()}
        with torch.device("meta"):  # shapes alone: what these tensors do not fill takes no memory
            model = MaskedLM(replace(s, positions=positions, **ours))
        file = Path(folder, "model.safetensors")
        theirs = load_file(file)
        state = {n: torch.cat([theirs.pop(t) for t in _hf_names(n)]) for n in model.state_dict()}
        if left := theirs.keys() - HF_DERIVED:
            raise ValueError(f"{min(left)} has no place in the model of config.json")
        positions = state.pop("position_embeddings.weight")[HF_SKIPPED_POSITIONS:]
        state["position_embeddings.weight"] = positions
        model.load_state_dict(state, assign=True)
    except (*DAMAGE, RuntimeError) as error:
        raise ValueError(f"{file}: not a RoBERTa model's: {str(error).splitlines()[0]}") from error
    return model
