"""Pre-train a model on an original language and one derived from it.

    python train.py runs/align --objective align
    python train.py runs/ewt --treebank en_ewt-ud-train.conllu --corpus books.txt
    torchrun --nproc-per-node 8 train.py runs/big --preset paper --corpus wiki.txt

Without --corpus or --treebank the text is the built-in language of synth_lang.py. A run's folder
holds settings.json, log.jsonl, a checkpoint, and in the end model/, which eval.py and transformers
open. The same command again goes on from the checkpoint, with the same bits on a CPU: all that is
random in a step is a function of the seed and the step, so that no generator has to be saved.
"""

import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
from array import array
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tqdm import tqdm

import synth_lang
from alignmlm import BOS, EOS, OBJECTIVES, PAD, PRESETS, SHORT_ROW, SPECIALS, UNK, Batch, MaskedLM
from alignmlm import Settings, alignment_score, derive_ids, make_dictionary, mask_tokens
from alignmlm import pair_translations, preset, to_hf, write_file, write_tokenizer

BLOCK = 50  # sentences; the original language has every other block of the text
LOG_EVERY = 100  # steps
RANK = int(os.environ.get("RANK", 0))  # the number of this process under torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are


# ---------------------------------------------------------------------------------- text to ids
@dataclasses.dataclass
class Source:
    """Where the text comes from; without files it is the built-in language."""

    text: list  # paths of plain texts and of treebanks in CoNLL-U
    order: str | None  # path of a treebank in the language whose order `syntax` borrows, or None
    sentences: int  # of the built-in language

    def read(self):
        for path in self.text:
            if synth_lang.looks_like_conllu(path):
                yield from synth_lang.read_conllu(path)
            else:
                yield from synth_lang.read_text(path)
        if not self.text:
            yield from synth_lang.generate(self.sentences)

    def content_hash(self):
        """It changes with the text, and not with the place or the time of its files."""
        digest = hashlib.sha256(str(self.sentences).encode())
        for path in filter(None, [*self.text, self.order]):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]


def learn_subwords(source, s, path):
    """Write SentencePiece's unigram model of the original language. Raises InputError.

    It runs in a process of its own, because SentencePiece would not let Python see a Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sentences = tqdm(source.read(), "learning sub-words", unit=" sentences")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(" ".join(sentence.words) for sentence in sentences),
            model_writer=model, vocab_size=s.language_size, control_symbols=["<mask>"],
            bos_id=BOS, pad_id=PAD, eos_id=EOS, unk_id=UNK,  # <mask> gets the id that is left.
            # Words are taken as they are: normalised ones would not fit their transliterations.
            normalization_rule_name="identity",
            max_sentence_length=1 << 30,  # Longer ones would be left out, silently.
            input_sentence_size=1_000_000, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        possible = re.search(r"(?:vs|<=) (\d+)", str(error))  # the number of ids that would do
        languages = s.vocab_size // s.language_size
        mend = f"--vocab-size {languages * int(possible[1])}" if possible else "more text"
        raise synth_lang.InputError(f"this text has too few or too many words: give {mend}") from None
    write_file(path, model.getvalue())


class Languages:
    """From the words of the original language to ids, and from its sentences to derived ones.

    Words are cut into sub-words one at a time, so that a sentence and its counterpart have equally
    many. T_trans acts on ids (`derive_ids`); all other transformations act on words."""

    def __init__(self, folder, s):
        self.subwords = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.order = json.loads((folder / "order.json").read_text())
        self.names = [n for n in synth_lang.parse_transform(s.transform) if n != "transliterate"]

    def derive(self, sentence, index):
        """The sentence in the derived order; index is the seed of what is random in it."""
        return synth_lang.transform(sentence, self.names, index=index, order=self.order)[0]

    @functools.lru_cache(1_000_000)  # noqa: B019  There is one such object a process.
    def encode(self, word):
        """The ids of a word in the original language, one or more."""
        return self.subwords.encode(word) or [UNK]


@dataclasses.dataclass(eq=False)
class Corpus:
    """The ids of a text, (n,) int32 a side, with EOS after every sentence."""

    original: np.ndarray  # one half of the text
    derived: np.ndarray  # the other half, transformed
    counterpart: np.ndarray  # that other half as it was, sentence for sentence beside `derived`

    @functools.cache  # noqa: B019
    def pair_starts(self, size):
        """Where pairs of texts of `size` ids may begin: with a sentence, if one ends with the text
        or two ids before. What is cut off need not have a counterpart in the other text, for under
        T_inv the first words of a sentence correspond to its last."""
        ends = np.append(0, np.flatnonzero(self.derived == EOS) + 1)
        starts = ends[ends + size <= len(self.derived)]
        last_end = ends[np.searchsorted(ends, starts + size, "right") - 1]
        cut_off = starts + size - last_end
        return starts[cut_off <= max(2, cut_off.min())]


def tokenise(source, languages, s):
    """The Corpus of a text. Says how many characters have no sub-word. Raises InputError."""
    original, derived, counterpart = array("i"), array("i"), array("i")

    def add(side, words):
        for word in words:
            side.extend(languages.encode(word))
        side.append(EOS)

    for index, sentence in enumerate(tqdm(source.read(), "tokenising", unit=" sentences")):
        if index // BLOCK % 2 == 0:
            add(original, sentence.words)
        else:
            add(counterpart, sentence.words)
            add(derived, languages.derive(sentence, index).words)
    unknown = original.count(UNK) + counterpart.count(UNK)
    if unknown:
        print(f"{unknown} stretches of the text have no sub-word", file=sys.stderr)
    if min(len(original), len(derived)) <= s.positions:
        raise synth_lang.InputError(f"too little text for rows of {s.positions} ids: give more")
    derived = derive_ids(np.array(derived, np.int32), s)
    return Corpus(np.array(original, np.int32), derived, np.array(counterpart, np.int32))


def prepare(source, s, root):
    """The folder of a text's sub-words and ids under a transformation, made on first use.

    It appears in `root` whole or not at all. Raises InputError."""
    key = f"{source.content_hash()} {s.transform} {s.vocab_size} {s.positions}"
    folder = root / f"data-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="making-") as made:
        made = Path(made)
        order = synth_lang.SOV
        if source.order:
            order = synth_lang.learn_order(synth_lang.read_conllu(source.order))
        write_file(made / "order.json", json.dumps(order).encode())
        with ProcessPoolExecutor(1) as process:
            process.submit(learn_subwords, source, s, made / "tokenizer.model").result()
        np.savez(made / "ids.npz", **vars(tokenise(source, Languages(made, s), s)))
        made.chmod(0o755)  # TemporaryDirectory makes it for this user alone.
        made.rename(folder)
    return folder


# -------------------------------------------------------------------------------------- batches
def cut_rows(ids, starts, length):
    """BOS and `length` - 1 ids from each start on, (starts, length) int64."""
    places = starts[:, None] + np.arange(length - 1)
    return np.insert(ids[places].astype(np.int64), 0, BOS, axis=1)


def make_batch(corpus, s, dictionary, step):
    """The Batch of a step: half original and half derived rows; with XLM, half of it is pairs.

    All that is random is a function of (seed, step). The first short_steps have shorter rows, as
    BERT's had, and more of them."""
    rng = np.random.default_rng([s.seed, step])
    length = SHORT_ROW if step < s.short_steps else s.positions
    rows = s.batch * s.positions // length
    parallel = OBJECTIVES[s.objective].parallel
    parts = []  # of tokens, languages and positions, (3, rows, length) each
    for language, ids in enumerate((corpus.original, corpus.derived)):
        starts = rng.integers(len(ids) - length + 1, size=rows // 4 if parallel else rows // 2)
        tokens = cut_rows(ids, starts, length)
        positions = np.zeros_like(tokens) + np.arange(length)
        parts.append([tokens, np.full_like(tokens, language), positions])
    if parallel:
        half = length // 2
        starts = corpus.pair_starts(half - 1)
        known = starts[: math.ceil(s.parallel_share * len(starts))]
        starts = rng.choice(known, rows // 2)
        original = cut_rows(corpus.counterpart, starts, half)
        parts.append(pair_translations(original, cut_rows(corpus.derived, starts, half)))
    tokens, languages, positions = np.concatenate(parts, axis=1)
    batch = Batch(*mask_tokens(tokens, s, rng), languages, positions)
    return OBJECTIVES[s.objective].change_batch(batch, dictionary, s, rng)


# ----------------------------------------------------------------------------------- optimizers
class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made nearly orthogonal before they are used.

    Source, constants included: Jordan et al. 2024, kellerjordan.github.io/posts/muon."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95))  # Nesterov's way
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])))


def orthogonal(matrix):
    """Nearly U V^T of a matrix U S V^T, by five Newton-Schulz iterations.

    torch.optim.Muon takes bfloat16 for it, which is slow on a CPU without units for that."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.mT).mT  # The products are smaller for a wide matrix.
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.to(matrix.dtype)


def make_optimizers(model, s, rate):
    """AdamW at this rate and, if the settings say so, Muon for the matrices of layers and head."""
    by_muon, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif s.optimizer == "muon" and ("layers." in name or "head_" in name):
            by_muon.append(parameter)
        else:
            matrices.append(parameter)
    # As in BERT only matrices decay. The constants are RoBERTa's.
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": vectors}]
    adamw = torch.optim.AdamW(
        groups, rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True
    )
    defaults = {"lr": s.matrix_rate, "weight_decay": s.weight_decay}
    return [adamw, Muon(by_muon, defaults)] if by_muon else [adamw]


def update(model, optimizers, factor):
    """Clip the gradient to a norm of 1, and take a step at this share of the peak rates."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak", group["lr"])
        optimizer.step()
        optimizer.zero_grad()


def schedule(step, s):
    """The share of the peak rate: it rises for `warmup` steps, stays, and falls to zero."""
    falling = s.decay_share * max(1, s.steps - s.warmup)
    return min((step + 1) / s.warmup, 1, (s.steps - step) / falling)


# ------------------------------------------------------------------------------------- the loop
def all_state(model, optimizers):
    """The tensors, not copies, of a model and its optimizers, each under a name of its own."""
    tensors = model.state_dict()
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for kind, tensor in state.items():
                tensors[f"{number} {index} {kind}"] = tensor
    return tensors


def save_checkpoint(path, step, model, optimizers):
    tensors = {name: tensor.cpu() for name, tensor in all_state(model, optimizers).items()}
    write_file(path, save(tensors | {"step": torch.tensor(step)}))


@torch.no_grad()
def load_checkpoint(path, model, optimizers):
    """Put back what `save_checkpoint` wrote, and return its step; 0 if there is no such file."""
    if not path.exists():
        return 0
    saved = load_file(path)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update(model, optimizers, 0.0)  # A first step makes the state that is to be filled.
    for name, tensor in all_state(model, optimizers).items():
        tensor.copy_(saved[name])
    return int(saved["step"])


def pretrain(corpus, s, folder, device, save_every):
    """Train from the folder's checkpoint, if it has one, to the last step; returns the model.

    Raises ValueError when the loss is no longer finite."""
    torch.manual_seed(s.seed)
    model = MaskedLM(s).to(device).train()
    optimizers = make_optimizers(model, s, s.rate)
    checkpoint, log = folder / "checkpoint.safetensors", folder / "log.jsonl"
    start = load_checkpoint(checkpoint, model, optimizers)
    if RANK == 0:  # What was logged after the checkpoint will come again.
        log.touch()
        lines = log.read_text().splitlines(keepends=True)[: start // LOG_EVERY]
        write_file(log, "".join(lines).encode())
    pairs = make_dictionary(s)
    dictionary = torch.from_numpy(pairs).to(device)
    network = model
    if WORLD > 1:
        network = torch.nn.parallel.DistributedDataParallel(model)

    sums = torch.zeros(2, device=device)
    bar = tqdm(range(start, s.steps), initial=start, total=s.steps, disable=RANK > 0)
    for step in bar:
        batch = make_batch(corpus, s, pairs, step)
        share = Batch(*[values[RANK::WORLD] for values in vars(batch).values()]).to(device)
        torch.manual_seed(hash((s.seed, step, RANK)))  # of dropout
        with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
            loss, mlm = network(share, dictionary)
        loss.backward()
        update(model, optimizers, schedule(step, s))
        sums += torch.stack([loss.detach(), mlm])

        done = step + 1
        if RANK == 0 and done % LOG_EVERY == 0:
            loss, mlm = (sums / LOG_EVERY).tolist()
            sums.zero_()
            if not math.isfinite(loss):
                raise ValueError(f"{folder}: no finite loss at step {done}: lower the rates")
            line = {"step": done, "loss": loss, "mlm": mlm, **alignment_score(model, pairs)}
            bar.set_postfix(line)
            with open(log, "a") as file:
                file.write(json.dumps(line) + "\n")
        if RANK == 0 and done % save_every == 0:
            save_checkpoint(checkpoint, done, model, optimizers)
    return model


# ---------------------------------------------------------------------------- the command line
def guarded(main):
    """Run a command. What its user can mend is one line, and exit status 2; Ctrl-C is 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(stop(130, "interrupted: the same command goes on"))
    except (ValueError, OSError) as error:
        sys.exit(stop(2, " ".join(str(error).split())))


def stop(status, message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return status


def add_options(parser):
    """Options for the text and the machine, and one for every setting, the commonest first."""
    parser.add_argument("--corpus", "--treebank", dest="text", nargs="+", action="extend",
                        default=[], metavar="FILE", type=os.path.abspath,
                        help="plain text, or trees in CoNLL-U")
    parser.add_argument("--order", metavar="FILE", type=os.path.abspath,
                        help="trees whose order `syntax` borrows")
    parser.add_argument("--sentences", type=int, default=60_000, help="of the built-in language")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Settings)))
    for field in dataclasses.fields(Settings):
        values = ", ".join(f"{name} {getattr(s, field.name)}" for name, s in PRESETS.items())
        option = "--" + field.name.replace("_", "-")
        kind = json.loads if field.type is bool else field.type
        parser.add_argument(option, type=kind, help=f"{comments[field.name]} ({values})")


def read_options(args, **changes):
    """The Settings that the options give, with these changes, and the Source."""
    for name, value in vars(args).items():
        if name in Settings.__dataclass_fields__ and value is not None:
            changes.setdefault(name, value)
    return preset(args.preset, **changes), Source(args.text, args.order, args.sentences)


def run(folder, s, source, args):
    """Do what is left of a run. Raises ValueError if its folder is of another experiment."""
    path = folder / "settings.json"
    settings = dataclasses.asdict(s)
    if path.exists() and json.loads(path.read_text())["settings"] != settings:
        raise ValueError(f"{path}: has other settings: give another folder")
    if (folder / "model" / "tokenizer.json").exists():
        return
    if RANK > 0:  # The first process makes the text, and the others find it made.
        dist.barrier()
    data = prepare(source, s, folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    corpus = Corpus(**np.load(data / "ids.npz"))
    record = {"settings": settings, "source": vars(source), "content": source.content_hash()}
    write_file(path, json.dumps(record, indent=2).encode())
    model = pretrain(corpus, s, folder, args.device, args.save_every)
    if RANK == 0:
        for name in ("tokenizer.model", "order.json"):
            write_file(folder / name, (data / name).read_bytes())
        to_hf(model, folder / "model")
        mark = "\u2581"  # SentencePiece's
        marks = mark, synth_lang.transliterate_word(mark)
        write_tokenizer(subword_table(folder, s), marks, folder / "model")


def subword_table(folder, s):
    """The spelling and the score of each id, V pairs: derived sub-words are transliterated."""
    subwords = Languages(folder, s).subwords
    table = [(subwords.id_to_piece(id), subwords.get_score(id)) for id in range(s.language_size)]
    for id, (spelling, score) in enumerate(table[: s.shift]):
        derived = f"<unused{id}>" if id < SPECIALS else synth_lang.transliterate_word(spelling)
        table.append((derived, score))
    return table


def main():
    parser = synth_lang.Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the run; the text's ids are kept beside it")
    add_options(parser)
    args = parser.parse_args()
    if WORLD > 1:
        dist.init_process_group()
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    run(args.folder, *read_options(args), args)


if __name__ == "__main__":
    guarded(main)
