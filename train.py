"""Pre-train a model on an original language and one derived from it.

    python train.py runs/align --objective align
    python train.py runs/ewt --treebank en_ewt-ud-train.conllu --corpus books.txt
    torchrun --nproc-per-node 8 train.py runs/big --preset paper --corpus wiki.txt

Without --corpus or --treebank the text is the built-in language of synth_lang.py. A run's folder
holds settings.json, log.jsonl, a checkpoint, and in the end model/, which eval.py and transformers
open. The same command again goes on from the checkpoint, with the same bits on a CPU: all that is
random in a step is a function of the seed and the step, so that no generator has to be saved.
"""

import argparse
import datetime
import functools
import hashlib
import inspect
import json
import os
import re
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, set_random_generator_seed
from torch import distributed, nn
from tqdm import tqdm

import synth_lang
from alignmlm import BOS, EOS, OBJECTIVES, PAD, PRESETS, SHORT_ROW, UNK, Batch, MaskedLM
from alignmlm import Settings, alignment_score, derive_ids, make_dictionary, mask_tokens
from alignmlm import pair_translations, preset, to_hf, write_file, write_tokenizer
from synth_lang import InputError, transliterate_word

BLOCK = 50  # sentences; the original language has every other block of the text
LOG_EVERY = 100  # steps from line to line of log.jsonl
# torchrun starts several processes and tells each of them who it is.
RANK = int(os.environ.get("RANK", 0))  # 0 for the first, which writes the files for all
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are


# ---------------------------------------------------------------------------------- text to ids
@dataclass
class Source:
    """Where the text comes from. Without files it is the built-in language."""

    text: list  # paths of plain texts, and of treebanks in CoNLL-U
    order: str | None  # path of a treebank in the language whose order `syntax` borrows, or None
    sentences: int  # how many the built-in language is to have

    def read(self):
        """Yield the Sentences in their order. Raises InputError."""
        if not self.text:
            yield from synth_lang.generate(self.sentences)
        for path in self.text:
            is_conllu = synth_lang.looks_like_conllu(path)
            yield from synth_lang.read_conllu(path) if is_conllu else synth_lang.read_text(path)

    def content_hash(self):
        """Sixteen digits that change with the text, and not with its files' places and times."""
        digest = hashlib.sha256(f"{self.sentences}".encode())
        # An empty file stands for no order, so that it is told from one more text.
        for path in [*self.text, self.order or os.devnull]:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]


def learn_subwords(source, s, folder):
    """Write folder/tokenizer.model, SentencePiece's unigram model of the original language.

    It runs in a process of its own, because SentencePiece would not let Python see a Ctrl-C. Raises
    InputError."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # This process just ends, without a word.
    set_random_generator_seed(0)  # Of a very long text it takes a sample.
    sentences = tqdm(source.read(), "sentences to learn sub-words from")
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(" ".join(sentence.words) for sentence in sentences),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=s.language_size,  # of this one language
            bos_id=BOS, pad_id=PAD, eos_id=EOS, unk_id=UNK,
            control_symbols=["<mask>"],  # It gets the id that is left, MASK.
            # Words are taken as they are: normalised ones would not fit their transliterations.
            normalization_rule_name="identity",
            max_sentence_length=1 << 30,  # Longer sentences would be left out, silently.
            input_sentence_size=1_000_000,  # in the sample
            minloglevel=2,  # errors only
        )  # fmt: skip
    except RuntimeError as error:
        for _ in source.read():
            pass  # If it was the text that could not be read, this says so better.
        # Whether this text needs more ids or less, the last number in the message is how many.
        size = int(re.findall(r"\d+", str(error))[-1]) * s.vocab_size // s.language_size
        raise InputError(f"this text needs --vocab-size {size}") from None


class Languages:
    """From the words of the original language to ids, and from its sentences to derived ones.

    Words are cut into sub-words one at a time, so that a sentence and its counterpart have equally
    many. T_trans acts on ids (`derive_ids`); all other transformations act on words."""

    def __init__(self, folder, s):
        self.subwords = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.order = json.loads((folder / "order.json").read_text())
        # Every word is encoded as in the original language, and its id is shifted afterwards.
        self.names = [n for n in synth_lang.parse_transform(s.transform) if n != "transliterate"]

    def derive(self, sentence, index):
        """The sentence in the derived order; index is the seed of what is random in it."""
        return synth_lang.transform(sentence, self.names, index=index, order=self.order)[0]

    @functools.lru_cache(1_000_000)  # noqa: B019  A process has one such object.
    def encode(self, word):
        """The ids of a word in the original language, one or more."""
        return self.subwords.encode(word) or [UNK]  # SentencePiece drops a word of spaces.

    def encode_sentence(self, sentence):
        """The ids of all its words, and EOS."""
        ids = []
        for word in sentence.words:
            ids += self.encode(word)
        return [*ids, EOS]


@dataclass(eq=False)
class Corpus:
    """The ids of a text, (n,) int64 a side, with EOS after every sentence."""

    original: np.ndarray  # one half of the text
    derived: np.ndarray  # the other half, transformed
    counterpart: np.ndarray  # that other half as it was, sentence for sentence beside `derived`

    @functools.cache  # noqa: B019
    def pair_starts(self, size):
        """Where pairs of texts of `size` ids may begin: with a sentence, if one ends with the text
        or two ids before. What is cut off need not have a counterpart in the other text, for under
        T_inv the first words of a sentence correspond to its last."""
        ends = np.append(0, np.flatnonzero(self.derived == EOS) + 1)  # (sentences + 1,)
        starts = ends[ends + size <= len(self.derived)]  # A sentence starts where one ends.
        last_end = ends[np.searchsorted(ends, starts + size, "right") - 1]
        cut_off = starts + size - last_end  # ids of a sentence that does not end in the text
        return starts[cut_off <= max(2, cut_off.min())]


def tokenise(source, languages, s):
    """The Corpus of a text. Says how often characters have no sub-word. Raises InputError."""
    original, derived, counterpart = [], [], []  # ids
    for index, sentence in enumerate(tqdm(source.read(), "sentences tokenised")):
        ids = languages.encode_sentence(sentence)
        if index // BLOCK % 2 == 0:
            original += ids
        else:
            counterpart += ids
            derived += languages.encode_sentence(languages.derive(sentence, index))
    unknown = original.count(UNK) + derived.count(UNK)
    if unknown:
        print(f"{unknown} stretches of rare characters became <unk>", file=sys.stderr)
    if min(len(original), len(derived)) <= s.positions:
        raise InputError(f"too little text for rows of {s.positions} ids: give more")
    derived = derive_ids(np.array(derived), s)  # T_trans, if it is one of the transformations
    return Corpus(np.array(original), derived, np.array(counterpart))


def prepare(source, s, root):
    """The folder of a text's sub-words and ids under a transformation, made on first use.

    It appears in `root` whole or not at all. Raises InputError."""
    folder = root / f"data-{source.content_hash()}-{s.transform}-{s.vocab_size}-{s.positions}"
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="making-") as made:
        made = Path(made)
        order = synth_lang.SOV
        if source.order:
            order = synth_lang.learn_order(synth_lang.read_conllu(source.order))
        (made / "order.json").write_text(json.dumps(order))
        with ProcessPoolExecutor(1) as process:
            process.submit(learn_subwords, source, s, made).result()
        np.savez(made / "ids.npz", **vars(tokenise(source, Languages(made, s), s)))
        made.chmod(0o755)  # TemporaryDirectory makes it for this user alone.
        if not folder.exists():  # Otherwise another run has made the same meanwhile.
            made.rename(folder)
    return folder


# -------------------------------------------------------------------------------------- batches
def cut_rows(ids, starts, length):
    """BOS and `length` - 1 ids from each start on, (starts, length) int64."""
    places = starts[:, None] + np.arange(length - 1)  # (starts, length - 1)
    return np.insert(ids[places], 0, BOS, axis=1)


def make_batch(corpus, s, dictionary, step):
    """The Batch of a step: half original and half derived rows; with XLM, half of it is pairs.

    All that is random is a function of (seed, step). The first short_steps have shorter rows, as
    BERT's had, and more of them."""
    rng = np.random.default_rng([s.seed, step])
    objective = OBJECTIVES[s.objective]
    length = SHORT_ROW if step < s.short_steps else s.positions
    rows = s.batch * s.positions // length  # so that every batch has as many tokens
    parts = []  # of tokens, languages and positions, (rows of the part, length) each
    for language, ids in enumerate([corpus.original, corpus.derived]):
        count = rows // 4 if objective.parallel else rows // 2
        starts = rng.integers(len(ids) - length + 1, size=count)
        tokens = cut_rows(ids, starts, length)  # (count, length)
        positions = np.full_like(tokens, np.arange(length))
        parts.append([tokens, np.full_like(tokens, language), positions])
    if objective.parallel:
        starts = corpus.pair_starts(length // 2 - 1)
        # Only the first part of the text is known to be parallel.
        starts = rng.choice(starts[: 1 + int(s.parallel_share * len(starts))], rows // 2)
        original = cut_rows(corpus.counterpart, starts, length // 2)
        derived = cut_rows(corpus.derived, starts, length // 2)
        parts.append(pair_translations(original, derived))
    tokens, languages, positions = np.concatenate(parts, axis=1)  # (rows, length) each
    batch = Batch(*mask_tokens(tokens, s, rng), languages, positions)
    return objective.change_batch(batch, dictionary, s, rng)


# ----------------------------------------------------------------------------------- optimizers
class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made nearly orthogonal before they are used.

    Source, constants included: Jordan et al. 2024, kellerjordan.github.io/posts/muon."""

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = orthogonal(p.grad.lerp(momentum, 0.95))  # Nesterov's way
            p.mul_(1 - group["lr"] * group["weight_decay"])
            # The factor keeps what comes out of a tall matrix as large as out of a square one.
            p.sub_(update, alpha=group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(matrix):
    """Nearly U V^T of a matrix U S V^T, by five Newton-Schulz iterations; the same shape and dtype.

    torch.optim.Muon takes bfloat16 for it, which is slow on a CPU without units for that."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.mT).mT  # The products are smaller for a wide matrix.
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x / (x.norm() + 1e-7)  # No singular value is above 1 then, as the iteration needs.
    for _ in range(5):
        gram = x @ x.mT  # (rows, rows)
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.to(matrix.dtype)


def make_optimizers(model, s, rate):
    """AdamW at this rate and, if the settings say so, Muon for the weights of linear layers."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    decay = {"weight_decay": s.weight_decay}
    optimizers = []
    if s.optimizer == "muon":
        # The first three are the embeddings, whose rows are vectors of their own.
        optimizers.append(Muon(matrices[3:], {"lr": s.matrix_rate, **decay}))
        matrices = matrices[:3]
    # As in BERT only matrices decay. The constants are RoBERTa's.
    groups = [{"params": matrices, **decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers.append(torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), eps=1e-6, fused=True))
    return optimizers


def update(model, optimizers, factor):
    """Clip the gradient to a norm of 1, and take a step at this share of the peak rates."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak", group["lr"])  # the rate at the start
        optimizer.step()
        optimizer.zero_grad()


def schedule(step, s):
    """The share of the peak rate: it rises for `warmup` steps, stays, and falls to zero."""
    rising = (step + 1) / max(1, s.warmup)
    falling = (s.steps - step) / max(1, s.decay_share * (s.steps - s.warmup))
    return min(rising, 1, falling)


# ------------------------------------------------------------------------------------- the loop
def pretrain(corpus, s, folder, args):
    """Train from the folder's checkpoint, if it has one, to the last step; returns the model.

    Raises ValueError when the loss is no longer finite."""
    torch.manual_seed(s.seed)
    model = MaskedLM(s).to(args.device).train()
    optimizers = make_optimizers(model, s, s.rate)
    parts = [model, *optimizers]  # what a checkpoint keeps
    start, log = 0, []
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, args.device, weights_only=True)  # runs no code of a pickle
        start, log = saved["step"], saved["log"]
        for part, state in zip(parts, saved["states"], strict=True):
            part.load_state_dict(state)
    network = model
    if WORLD > 1:
        network = nn.parallel.DistributedDataParallel(model)
    pairs = make_dictionary(s)
    dictionary = torch.tensor(pairs, device=args.device)

    bar = tqdm(range(start, s.steps), initial=start, total=s.steps, disable=RANK > 0)
    for step in bar:
        batch = make_batch(corpus, s, pairs, step)
        # Each process takes every WORLD-th row, and the mean of their gradients is the whole's.
        share = Batch(*[values[RANK::WORLD] for values in vars(batch).values()])
        torch.manual_seed(hash((s.seed, step, RANK)))  # for dropout
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device == "cuda"):
            loss, mlm = network(share.to(args.device), dictionary)
        loss.backward()
        update(model, optimizers, schedule(step, s))

        done = step + 1
        if RANK > 0:
            continue  # The first process writes for all.
        if done % LOG_EVERY == 0:
            if not loss.isfinite():
                raise ValueError(f"{folder}: no finite loss at step {done}: lower the rates")
            line = {"step": done, "loss": loss.item(), "mlm": mlm.item()}
            log.append(line | alignment_score(model, pairs))
            bar.set_postfix(log[-1])
            # The whole log is written again: it holds nothing that was done twice.
            text = "".join(json.dumps(line) + "\n" for line in log)
            write_file(folder / "log.jsonl", text.encode())
        if done % args.save_every == 0:
            states = [part.state_dict() for part in parts]
            written = folder / "checkpoint.part"
            torch.save({"step": done, "log": log, "states": states}, written)
            written.replace(checkpoint)  # A kill leaves the old checkpoint or the new one.
    return model


def run(folder, s, source, args):
    """Do what is left of a run. Raises ValueError if its folder is of another experiment."""
    path = folder / "settings.json"
    finished = (folder / "model" / "tokenizer_config.json").exists()  # the last file to be written
    record = {"settings": asdict(s), "source": vars(source)}
    if not finished:
        record["content"] = source.content_hash()
    if path.exists():
        saved = json.loads(path.read_text())
        # Files may have moved. Those of a finished run may be gone, and their names have to do.
        text = "source" if finished else "content"
        if saved["settings"] != record["settings"] or saved[text] != record[text]:
            raise ValueError(f"{path}: has other settings or text: give another folder")
    if finished:
        return
    if RANK == 0:  # The others wait, and do not learn the same sub-words side by side.
        data = prepare(source, s, folder.parent)
        folder.mkdir(exist_ok=True)
        write_file(path, json.dumps(record, indent=2).encode())
        for name in ("tokenizer.model", "order.json"):
            write_file(folder / name, (data / name).read_bytes())
    if WORLD > 1:
        distributed.barrier()
    data = prepare(source, s, folder.parent)  # Every process finds it made.
    corpus = Corpus(**np.load(data / "ids.npz"))
    model = pretrain(corpus, s, folder, args)
    if RANK == 0:
        to_hf(model, folder / "model")
        write_tokenizer(*subword_table(Languages(folder, s).subwords, s), folder / "model")
        (folder / "checkpoint.pt").unlink(missing_ok=True)


def subword_table(subwords, s):
    """The spelling and the score of each id, V pairs; and the mark before a word in each language.

    Derived sub-words have the scores of the original ones, and are spelled in transliteration."""
    mark = "\u2581"  # SentencePiece's
    table = [(subwords.id_to_piece(id), subwords.get_score(id)) for id in range(len(subwords))]
    if not s.shift:
        return table, (mark, mark)
    derived = [(transliterate_word(spelling), score) for spelling, score in table]
    return table + derived, (mark, transliterate_word(mark))


# ---------------------------------------------------------------------------- the command line
def add_options(parser):
    """Options for the text and the machine, and one for every setting, the commonest first."""
    add = parser.add_argument
    # A file given in one folder is found from another.
    add("--corpus", "--treebank", dest="text", nargs="+", action="extend", default=[],
        metavar="FILE", type=os.path.abspath,
        help="plain text or trees in CoNLL-U, one text after another (the built-in language)")
    add("--order", metavar="FILE", type=os.path.abspath,
        help="trees in CoNLL-U whose order `syntax` borrows (one with the verb last)")
    add("--sentences", type=int, default=60_000, help="length of the built-in text (%(default)s)")
    add("--preset", choices=PRESETS, default="tiny", help="what is not given below (%(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=device, help="where to train (%(default)s)")
    add("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")
    # The comments beside the settings in alignmlm.py are the text.
    comments = dict(re.findall(r"(\w+): .*# (.*)", inspect.getsource(Settings)))
    for name, meaning in comments.items():
        values = ", ".join(f"{preset} {getattr(s, name)}" for preset, s in PRESETS.items())
        kind = type(getattr(Settings, name))
        kind = json.loads if kind is bool else kind  # "true" and "false" can be given.
        # Without a value here, what is not given stays as it is in the preset.
        add("--" + name.replace("_", "-"), type=kind, default=argparse.SUPPRESS,
            help=f"{meaning} ({values})")  # fmt: skip


def read_options(args, **changes):
    """The Settings that the options give, with these changes, and the Source."""
    given = {name: value for name, value in vars(args).items() if hasattr(Settings, name)}
    s = preset(args.preset, **given | changes)
    synth_lang.parse_transform(s.transform)  # It raises an InputError before work is done.
    return s, Source(args.text, args.order, args.sentences)


def guarded(main):
    """Run a command. What its user can mend is one line, and exit status 2; Ctrl-C is 130."""
    try:
        return main()
    except KeyboardInterrupt:
        status, message = 130, f"\n{Path(sys.argv[0]).name}: interrupted: the same command goes on"
    except (ValueError, OSError) as error:
        status, message = 2, f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}"
    # Only here is the error forgotten, and with it the progress bar, which ends its line.
    print(message, file=sys.stderr)
    sys.exit(status)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = synth_lang.Parser(description=__doc__, formatter_class=style)
    parser.add_argument("folder", type=Path, help="of the run; the text's ids are kept beside it")
    add_options(parser)
    args = parser.parse_args()
    if WORLD > 1:
        # The others wait for the first one to tokenise the text, which may take hours.
        distributed.init_process_group(timeout=datetime.timedelta(days=1))
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    run(args.folder, *read_options(args), args)


if __name__ == "__main__":
    guarded(main)
