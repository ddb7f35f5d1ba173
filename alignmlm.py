"""ALIGN-MLM and the three objectives that it is measured against, in one file.

One RoBERTa (Liu et al. 2019) is pre-trained on two languages at once: an original, and one derived
from it by an invertible transformation. With another script, its words have rows of their own in
the one embedding matrix E. The objectives differ in what tells which words correspond:
  MLM        nothing
  XLM        parallel sentences side by side (Conneau and Lample 2019, arXiv 1901.07291)
  DICT-MLM   translations to be predicted (Chaudhary et al. 2020, arXiv 2010.12566)
  ALIGN-MLM  a loss that pulls the rows of dictionary pairs together ("the paper", arXiv 2211.08547)

Original and derived text come from different halves of the corpus, 50 sentences for one, then 50
for the other (`train.make_corpus`): if both told the same sentences, the text alone would show
which words correspond. They share the special ids, <mask> too: what is shared can make even MLM
multilingual (Dufter and Schuetze 2020, arXiv 2005.00396).

Letters in shapes: B rows of T tokens, M of them masked; N = B M; D width (in prose D is the
dictionary); V rows of E, those of both languages; K pairs. A word is a sub-word, a row of E.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors
from torch import nn

import kernels

BOS, PAD, EOS, MASK, UNK = range(5)  # These ids are shared by both languages.
SPECIALS = 5  # the first id of a sub-word
SHORT_ROW = 32  # tokens; a model learns its positions sooner if it begins with these, as BERT did

@dataclass(frozen=True)
class Settings:
    """One experiment, by default the paper's. The comments are also what `train.py --help` says."""
    objective: str = "align"  # what is learned: mlm, xlm, dict or align
    transform: str = "transliterate+invert"  # how the derived language is made
    steps: int = 500_000  # steps of pre-training
    seed: int = 0  # of weights, dictionary, masks, batches and dropout
    vocab_size: int = 80_000  # rows of E: the sub-words of both languages, half each
    layers: int = 8  # transformer blocks
    width: int = 512  # width of the hidden states and of E
    heads: int = 8  # attention heads
    feed_forward: int = 2048  # width of the feed-forward layers
    positions: int = 512  # tokens in the longest row
    dropout: float = 0.1  # share of the activations that are dropped
    mask_share: float = 0.15  # share of the tokens that are to be predicted
    alpha: float = 10.0  # weight of the alignment loss, for align
    dictionary_share: float = 0.5  # share of the words that are in the dictionary D
    parallel_share: float = 0.25  # share of the derived text that is parallel, for xlm
    optimizer: str = "adamw"  # adamw, or muon for the weights of linear layers
    rate: float = 1e-4  # peak rate of AdamW
    matrix_rate: float = 0.02  # peak rate of Muon
    warmup: int = 10_000  # steps in which the rate rises to its peak
    decay_share: float = 1.0  # the rate falls to 0 over this last share of the steps after warm-up
    batch: int = 128  # rows in a step
    short_steps: int = 0  # how many of the first steps have more and shorter rows, of 32 tokens
    weight_decay: float = 0.01  # of matrices, embeddings included
    tune_epochs: int = 10  # epochs of fine-tuning; nli takes half as many
    tune_length: int = 128  # most tokens in a row of fine-tuning, if positions allows
    tune_rate: float = 2e-5  # peak rate of fine-tuning
    freeze_embeddings: bool = False  # true: fine-tuning changes no embedding of words or languages

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"no objective {self.objective!r}: give {', '.join(OBJECTIVES)}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"no optimizer {self.optimizer!r}: give adamw or muon")
        # 16 is what the kernels' tiles need, and 4 what XLM needs, half of whose rows are pairs.
        if self.heads < 1 or self.width % self.heads or self.width % 16 or self.batch % 4:
            raise ValueError("give width in multiples of 16 and of heads, batch in multiples of 4")
        multiple = SHORT_ROW if self.short_steps else 2  # short rows, or halves of XLM's pairs
        least = 1 / min(self.positions, SHORT_ROW)  # one token of the shortest row
        if self.positions % multiple or not least <= self.mask_share <= 1:
            raise ValueError(f"give positions in multiples of {multiple}, mask_share {least} to 1")

    @property
    def shift(self):  # what T_trans adds to ids, V / 2; without it 0: words are their counterparts
        return self.vocab_size // 2 if "transliterate" in self.transform else 0

    @property
    def language_size(self):  # how many ids one language has, special ones included: V / 2 or V
        return self.vocab_size // 2 if self.shift else self.vocab_size

    @property
    def languages(self):  # how many language embeddings; RoBERTa has at least one
        return 2 if OBJECTIVES[self.objective].language_embeddings else 1

def preset(name, **changes):  # the Settings of a preset with these changes
    return replace(PRESETS[name], **changes)

# ------------------------------------------------------------------- vocabularies and masking
def derive_ids(ids, s):
    """T_trans: i -> i + shift, for `train.make_corpus` and `eval.make_rows`. Only files have words
    anew (`synth_lang.transform`, `train.write_model`). Special ids stay; the paper moves UNK."""
    return np.where(ids < SPECIALS, ids, ids + s.shift)

def make_dictionary(s):
    """D: a random share of the original words with their counterparts. (K, 2) int64, ascending."""
    rng = np.random.default_rng([s.seed, 0, 0xD1C7])  # A batch's has [seed, step].
    words = np.arange(SPECIALS, s.language_size)
    known = np.sort(rng.permutation(words)[: round(s.dictionary_share * len(words))])
    return np.stack([known, known + s.shift], axis=1)

@dataclass
class Batch:  # what one step sees: int64 arrays of numpy when it is made, tensors once moved
    tokens: np.ndarray  # (B, T), after masking
    masked: np.ndarray  # (B, M), places in the row, from 0, of the tokens to be predicted
    labels: np.ndarray  # (B, M), the ids to be predicted there
    languages: np.ndarray  # (B, T), 0 for the original and 1 for the derived language
    positions: np.ndarray  # (B, T)

    def to(self, device):
        return Batch(*[torch.from_numpy(array).to(device) for array in vars(self).values()])

def mask_tokens(tokens, s, rng):
    """RoBERTa's masking of tokens (B, T) int64; returns tokens, masked and labels, as in Batch. Of
    the chosen 80 % become <mask>, 10 % a random word of either language, and 10 % stay. RoBERTa
    chooses each with the probability mask_share; here it is round(mask_share * T) of every row, so
    that rows are alike, and special tokens are chosen only where there are too few words."""
    count = round(s.mask_share * tokens.shape[1])
    drawn = rng.random(tokens.shape)  # The smallest are chosen, and special ones come last.
    drawn[tokens < SPECIALS] += 1
    masked = np.sort(np.argsort(drawn, axis=1)[:, :count])
    labels = np.take_along_axis(tokens, masked, axis=1)
    of_derived = rng.integers(2, size=labels.shape)
    words = rng.integers(SPECIALS, s.language_size, labels.shape) + s.shift * of_derived
    fate = rng.random(labels.shape)
    shown = np.where(fate < 0.8, MASK, np.where(fate < 0.9, words, labels))
    tokens = tokens.copy()
    np.put_along_axis(tokens, masked, shown, axis=1)
    return tokens, masked, labels

# ------------------------------------------------------------------------------ the objectives
# All minimise L_MLM, the masked-language-model loss over both languages. These are their additions.
def pair_translations(original, derived):
    """XLM: texts and their counterparts side by side. Each is tokens, languages and positions,
    (3, B, T / 2) int64. Positions start again, so that corresponding words can have the same."""
    return np.concatenate([original, derived], axis=2)  # (3, B, T)

def ask_translations(batch, dictionary, s, rng):
    """DICT-MLM: for half of the masked words in D the label becomes the translation. The language
    embedding there becomes that of the translation; nothing else says what is wanted. As published
    the *label* is translated; the code of ALIGN-MLM's authors translates the *input* instead."""
    translation = np.full(s.vocab_size, -1)
    translation[dictionary] = dictionary[:, ::-1]  # translation[i] = j, and translation[j] = i
    translated = translation[batch.labels]  # (B, M), -1 for words outside of D
    asked = (translated >= 0) & (rng.random(translated.shape) < 0.5)
    row, column = np.nonzero(asked)
    languages = batch.languages.copy()
    languages[row, batch.masked[row, column]] ^= 1
    return replace(batch, labels=np.where(asked, translated, batch.labels), languages=languages)

def weighted_alignment(model, pairs):
    """ALIGN-MLM: alpha * L_align over the whole of D, at every step. pairs: (K, 2) int64."""
    return model.settings.alpha * kernels.alignment_loss(model.word_embeddings.weight, pairs)

@dataclass(frozen=True)
class Objective:  # a row of the table below; the defaults are MLM's
    label: str  # its name in reports
    language_embeddings: bool = False  # whether the model is told a token's language
    parallel: bool = False  # whether half of each batch is translation pairs
    change_batch: Callable = lambda batch, dictionary, s, rng: batch
    added_loss: Callable = lambda model, pairs: 0.0

OBJECTIVES = {
    "mlm": Objective("MLM"),
    "xlm": Objective("XLM", language_embeddings=True, parallel=True),
    "dict": Objective("DICT-MLM", language_embeddings=True, change_batch=ask_translations),
    "align": Objective("ALIGN-MLM", added_loss=weighted_alignment),
}

# "paper" is for several GPUs, and has the paper's rates. "tiny" is for one core of a CPU, in two
# minutes; RESULTS.md, 2, has what was tried. "small" is the same larger, for one GPU.
PRESETS = {"paper": Settings(), "tiny": Settings(
    vocab_size=4_000, layers=2, width=64, heads=4, feed_forward=256, positions=32, dropout=0.0,
    mask_share=0.4, alpha=100.0, batch=64, steps=1_200, optimizer="muon", rate=3e-3, warmup=50,
    decay_share=0.3, tune_rate=6e-3, tune_epochs=4, freeze_embeddings=True)}  # fmt: skip
PRESETS["small"] = preset("tiny", layers=4, width=256, feed_forward=1024, positions=128, batch=128,
                          dropout=0.1, steps=4_000, short_steps=3_000, tune_rate=1e-3)  # fmt: skip

# ------------------------------------------------------------------------------------ the model
class Layer(nn.Module):
    """A transformer block with its layer norms after the sums (Vaswani et al. 2017)."""
    def __init__(self, s):
        super().__init__()
        self.settings = s
        D = s.width
        self.query, self.key, self.value = [nn.Linear(D, D) for _ in range(3)]
        self.attention_out = nn.Linear(D, D)
        self.attention_norm = nn.LayerNorm(D)
        self.up = nn.Linear(D, s.feed_forward)
        self.down = nn.Linear(s.feed_forward, D)
        self.norm = nn.LayerNorm(D)

    def split_heads(self, x):  # (B, T, D) -> (B, heads, T, D / heads)
        return x.unflatten(2, (self.settings.heads, -1)).transpose(1, 2)

    def forward(self, hidden, attention_mask=None):
        """hidden: (B, T, D); attention_mask: (B, 1, 1, T) bool, False at what is ignored."""
        p = self.settings.dropout if self.training else 0.0
        query = self.split_heads(self.query(hidden))
        key = self.split_heads(self.key(hidden))
        value = self.split_heads(self.value(hidden))
        mixed = F.scaled_dot_product_attention(query, key, value, attention_mask, p)
        mixed = self.attention_out(mixed.transpose(1, 2).flatten(2))  # (B, T, D)
        hidden = self.attention_norm(hidden + F.dropout(mixed, p))
        fed = self.down(F.gelu(self.up(hidden)))  # (B, T, D)
        return self.norm(hidden + F.dropout(fed, p))

class MaskedLM(nn.Module):
    """RoBERTa: an encoder, and a head whose output matrix is the word-embedding matrix E."""
    def __init__(self, s):
        super().__init__()
        self.settings = s
        D = s.width
        self.word_embeddings = nn.Embedding(s.vocab_size, D)
        self.position_embeddings = nn.Embedding(s.positions, D)
        self.language_embeddings = nn.Embedding(s.languages, D)
        self.embedding_norm = nn.LayerNorm(D)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.head_dense = nn.Linear(D, D)
        self.head_norm = nn.LayerNorm(D)
        self.head_bias = nn.Parameter(torch.zeros(s.vocab_size))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # a standard deviation of 0.02 at the paper's width of 512
                nn.init.normal_(parameter, std=0.02 * (512 / D) ** 0.5)
            elif "norm" not in name:  # a bias
                nn.init.zeros_(parameter)

    def encode(self, tokens, languages=None, positions=None, attention_mask=None):
        """Hidden states (B, T, D) of tokens (B, T) int64. languages, positions: the same shape, by
        default all 0, and 0 to T - 1. attention_mask: (B, 1, 1, T) bool, False at padding."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        if languages is None or self.settings.languages == 1:
            languages = torch.zeros_like(tokens)
        hidden = self.word_embeddings(tokens) + self.position_embeddings(positions)
        hidden = self.embedding_norm(hidden + self.language_embeddings(languages))
        hidden = F.dropout(hidden, self.settings.dropout, self.training)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask)
        return hidden

    def forward(self, batch, pairs=None):
        """The objective's loss, and L_MLM alone for the log. pairs: D, a tensor (K, 2) int64."""
        hidden = self.encode(batch.tokens, batch.languages, batch.positions)
        # The product with E is the most expensive one, and so only masked tokens go on to it.
        hidden = hidden.take_along_dim(batch.masked[..., None], dim=1)  # (B, T, D) -> (B, M, D)
        hidden = self.head_norm(F.gelu(self.head_dense(hidden))).flatten(0, 1)  # (N, D)
        E = self.word_embeddings.weight
        mlm = kernels.masked_lm_loss(hidden, E, self.head_bias, batch.labels.flatten())
        return mlm + OBJECTIVES[self.settings.objective].added_loss(self, pairs), mlm.detach()

# ----------------------------------------------------------------------------------- the losses
# These are the definitions. kernels/ computes the same in less memory, and is tested against them.
def masked_lm_equation(hidden, E, bias, labels):
    """L_MLM = -1/N sum_n log softmax(hidden_n E^T + bias)[labels_n]. Source: BERT and RoBERTa."""
    logits = F.linear(hidden, E, bias)  # (N, D), (V, D), (V,) -> (N, V)
    return -logits.log_softmax(1).gather(1, labels[:, None]).mean()

def alignment_equation(E, pairs):
    """L_align = -1/K sum over the K pairs (i, j) of cos(E_i, E_j). Source: the paper."""
    original, derived = E[pairs.T]  # (K, D) each
    return -F.cosine_similarity(original, derived).mean()

# ---------------------------------------------------------------------------------- measurement
def words_of_both(model):
    """The embeddings of the original words and of their counterparts, (words, D) each. As in the
    paper, the language embeddings are added with XLM and only there."""
    s, E = model.settings, model.word_embeddings.weight
    original = E[SPECIALS : s.language_size]
    derived = E[SPECIALS + s.shift : s.language_size + s.shift]
    if s.objective != "xlm":
        return original, derived
    language = model.language_embeddings.weight
    return original + language[0], derived + language[1]

@torch.no_grad()
def alignment_score(model, dictionary):
    """The share, in percent, of original words whose nearest derived word, by cosine, is their
    counterpart: of "all" words, of those "inside" and of those "outside" the dictionary (K, 2). A
    group without words is left out. Source: the paper."""
    original, derived = words_of_both(model)
    derived = F.normalize(derived, dim=1)  # The originals' lengths change no comparison.
    nearest = [(rows @ derived.T).argmax(1) for rows in original.split(1024)]
    words = np.arange(len(original))
    aligned = 100.0 * (torch.cat(nearest).numpy(force=True) == words)
    known = np.isin(words, dictionary[:, 0] - SPECIALS)
    groups = {"all": aligned, "inside": aligned[known], "outside": aligned[~known]}
    return {name: float(group.mean()) for name, group in groups.items() if group.size}

@torch.no_grad()
def rotate(model, dictionary):
    """A copy whose derived words were turned onto the original ones by the orthogonal map that fits
    the dictionary (K, 2) best (Schönemann 1966), and now have the original language's embedding.
    `eval.evaluate` rotates a fine-tuned model: its BZ is BZ rotated."""
    model = copy.deepcopy(model)
    s, language = model.settings, model.language_embeddings.weight  # (1 or 2, D)
    original, derived = words_of_both(model)
    known = torch.from_numpy(dictionary[:, 0] - SPECIALS)
    # From the SVD comes the orthogonal u vh with the least |derived u vh - original|.
    u, _, vh = torch.linalg.svd(derived[known].T @ original[known])  # (D, D) each
    turned = derived @ u @ vh
    if s.objective == "xlm":
        turned -= language[0]  # `original` has it added, and so it has to come off for E.
    model.word_embeddings.weight[SPECIALS + s.shift : s.language_size + s.shift] = turned
    language[-1] = language[0]  # The last is the derived language's, if there are two.
    return model

# ----------------------------------------------------------- out to, and in from, transformers
HF_NAMES = {  # a part of a tensor's name here: in transformers
    "word_embeddings": "roberta.embeddings.word_embeddings",
    "position_embeddings": "roberta.embeddings.position_embeddings",
    "language_embeddings": "roberta.embeddings.token_type_embeddings",
    "embedding_norm": "roberta.embeddings.LayerNorm", "layers": "roberta.encoder.layer",
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attention_out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm",
    "head_dense": "lm_head.dense", "head_norm": "lm_head.layer_norm", "head_bias": "lm_head.bias",
}  # fmt: skip
HF_SETTINGS = {  # a setting's name in transformers: here
    "vocab_size": "vocab_size", "type_vocab_size": "languages", "num_hidden_layers": "layers",
    "hidden_size": "width", "num_attention_heads": "heads", "intermediate_size": "feed_forward",
    "hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "dropout",
}  # fmt: skip
HF_FIXED = {"model_type": "roberta", "tie_word_embeddings": True,
            "hidden_act": "gelu", "layer_norm_eps": 1e-5}  # fmt: skip
HF_UNUSED_POSITIONS = 2  # RoBERTa numbers its positions from PAD + 1 on.

def hf_name(name):  # layers.0.up.bias -> roberta.encoder.layer.0.intermediate.dense.bias
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))

def write_file(path, data):
    """Write bytes to a Path, whole or not at all: under a temporary name, which is then changed."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)

def write_tokenizer(table, mark, folder):
    """Write a tokenizer for transformers, which takes words of either language between spaces.
    table: the spelling and the score of each id's sub-word, V pairs. mark: what a word's first
    sub-word begins with, in the original language and, transliterated, in the derived one."""
    tokenizer = Tokenizer(models.Unigram(table, UNK))
    # Each language's mark is put where a word begins, (?<!\S). Braille is derived.
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Replace(Regex(r"(?<!\S)(?=[\u2800-\u28ff])"), mark[1]),
        normalizers.Replace(Regex(r"(?<!\S)(?=[^\s\u2800-\u28ff])"), mark[0]),
    ])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(sign, " ") for sign in mark])
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> $B </s>", [("<s>", BOS), ("</s>", EOS)])
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer.add_special_tokens([*names.values(), AddedToken("<mask>", lstrip=True)])
    names |= {"mask_token": "<mask>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_file(folder / "tokenizer.json", tokenizer.to_str().encode())
    write_file(folder / "tokenizer_config.json", json.dumps(names).encode())

def to_hf(model, folder):
    """Write a folder that transformers.RobertaForMaskedLM.from_pretrained opens. Its logits are the
    same to 1e-4. Language embeddings become token types."""
    folder, s = Path(folder), model.settings
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "position_embeddings.weight":
            tensor = F.pad(tensor, (0, 0, HF_UNUSED_POSITIONS, 0))
        tensors[hf_name(name)] = tensor.cpu()
    config = HF_FIXED | {theirs: getattr(s, ours) for theirs, ours in HF_SETTINGS.items()}
    config["max_position_embeddings"] = s.positions + HF_UNUSED_POSITIONS
    write_file(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    write_file(folder / "config.json", json.dumps(config, indent=2).encode())

def from_hf(folder, settings=None):
    """The model, in float32, that `to_hf` or transformers' RobertaForMaskedLM wrote to a folder.
    settings: of our experiment, if it is one. Raises ValueError, naming the folder, for others."""
    try:
        config = HF_FIXED | json.loads(Path(folder, "config.json").read_text())
        if not HF_FIXED.items() <= config.items():
            raise ValueError(f"config.json should have {HF_FIXED}")
        shape = {ours: config[theirs] for theirs, ours in HF_SETTINGS.items()}
        shape["positions"] = config["max_position_embeddings"] - HF_UNUSED_POSITIONS
        objective = "mlm" if shape.pop("languages") == 1 else "xlm"  # one with two languages
        model = MaskedLM(replace(settings or Settings(objective=objective), **shape))
        theirs = safetensors.torch.load_file(Path(folder, "model.safetensors"))
        state = {name: theirs[hf_name(name)] for name in model.state_dict()}
        name = "position_embeddings.weight"
        state[name] = state[name][HF_UNUSED_POSITIONS:]
        model.load_state_dict(state)  # This copies, and so turns half precision into float32.
    except Exception as error:  # A damaged file can make anything fail.
        raise ValueError(f"{folder}: no RoBERTa that can be read: {error}") from error
    return model
