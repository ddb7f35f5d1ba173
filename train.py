"""Pre-train a model on an original language and one derived from it.

    python train.py runs/align --objective align
    python train.py runs/ewt --treebank en_ewt-ud-train.conllu --corpus books.txt
    torchrun --nproc-per-node 8 train.py runs/big --preset paper --corpus wiki.txt --save-every 1000

Without --corpus or --treebank the text is the built-in language of synth_lang.py. A run's folder
holds settings.json, log.jsonl, a checkpoint, and in the end model/, which eval.py and transformers
open. The same command again goes on from the last checkpoint, which is made every --save-every
steps (100). On a CPU the result is the same bit for bit: what is random in a step depends on the
seed and the step alone (dropout also on the process), so that no generator has to be saved.

In the code `s` is the Settings, which say what experiment it is, and `args` has the other options:
where its text comes from (text, order, sentences), and how it is computed (device, save_every).
Here and in synth_lang.py a word is a whole word, which is cut into sub-words.
"""

import functools
import hashlib
import inspect
import json
import os
import re
import signal
import tempfile
from array import array
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import distributed, nn
from tqdm import tqdm

import synth_lang
from alignmlm import BOS, EOS, OBJECTIVES, PAD, PRESETS, SHORT_ROW, UNK, Batch, MaskedLM
from alignmlm import Settings, alignment_score, derive_ids, make_dictionary, mask_tokens
from alignmlm import pair_translations, preset, to_hf, write_file, write_tokenizer
from synth_lang import transliterate_word

BLOCK = 50  # so many sentences in a row go to one language, as rows span sentences
# torchrun starts several processes and tells each of them who it is.
RANK = int(os.environ.get("RANK", 0))  # 0 for the first, which writes the files for all
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
DEVICES = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]  # the default first

# ---------------------------------------------------------------------------------- text to ids
def read_sentences(args):
    """Yield the Sentences of the text in their order. Raises ValueError."""
    if not args.text:
        yield from synth_lang.generate(args.sentences)
    for path in args.text:
        is_conllu = synth_lang.looks_like_conllu(path)
        yield from synth_lang.read_conllu(path) if is_conllu else synth_lang.read_text(path)

def content_hash(args):
    """A hash of what the text is made from. Files that were moved or touched have the same one."""
    digest = hashlib.sha256(str(args.sentences).encode())
    # synth_lang.py has the transformations and the built-in language.
    for path in [synth_lang.__file__, *args.text, args.order or os.devnull]:  # null: no order
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]

def learn_subwords(args, s, folder):
    """Write folder/tokenizer.model, SentencePiece's unigram model of the original language. Raises
    ValueError, which names a --vocab-size that works, if the text has too many characters or too
    few sub-words for this one. It runs in a process of its own, as SentencePiece would not let
    Python see a Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # This process just ends, without a word.
    # The first million are enough. They are read here, where an error in the text can be seen.
    sentences = tqdm(islice(read_sentences(args), 1_000_000), "sentences to learn sub-words from")
    lines = [" ".join(sentence.words) for sentence in sentences]
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(folder / "tokenizer"), vocab_size=s.language_size,
            bos_id=BOS, pad_id=PAD, eos_id=EOS, unk_id=UNK,
            control_symbols=["<mask>"],  # It gets the id that is left, MASK.
            # Words are taken as they are: normalised ones would not fit their transliterations.
            normalization_rule_name="identity",
            max_sentence_length=1 << 30,  # Longer sentences would be left out, silently.
            minloglevel=2,  # errors only
        )  # fmt: skip
    except RuntimeError as error:
        # SentencePiece's message ends with a size that works for one language.
        size = int(re.findall(r"\d+", str(error))[-1]) * s.vocab_size // s.language_size
        raise ValueError(f"this text needs --vocab-size {size}") from None

class Tokeniser:
    """From the words of the original language to ids, and from its sentences to derived ones.

    Words are cut into sub-words one at a time, so that a sentence and its counterpart have equally
    many. T_trans acts on ids (`derive_ids`); all other transformations act on words."""

    def __init__(self, folder, s):
        self.subwords = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.order = json.loads((folder / "order.json").read_text())
        self.moves = [n for n in synth_lang.parse_transform(s.transform) if n != "transliterate"]

    def derive(self, sentence, index):
        """The sentence in the derived order; index is the seed of what is random in it."""
        return synth_lang.transform(sentence, self.moves, index=index, order=self.order)[0]

    def encode(self, word):
        """The ids of a word in the original language, one or more."""
        return self.subwords.encode(word) or [UNK]  # SentencePiece drops a word of spaces.

    def encode_sentence(self, sentence):
        """The ids of all its words, and EOS."""
        ids = []
        for word in sentence.words:
            ids += self.encode(word)
        return [*ids, EOS]

@dataclass(eq=False)  # hashable, as the cache of `pair_starts` needs it
class Corpus:
    """The ids of a text, each (n,) int64, with EOS after every sentence."""

    original: np.ndarray  # one half of the text
    derived: np.ndarray  # the other half, transformed
    counterpart: np.ndarray  # that half as it was; its sentences stand where those of derived do

def make_corpus(args, tokeniser, s):
    """The Corpus of a text. Raises ValueError."""
    # These are ids. Lists of Python's numbers would need five times as much memory.
    original, derived, counterpart = array("q"), array("q"), array("q")
    for index, sentence in enumerate(tqdm(read_sentences(args), "sentences tokenised")):
        ids = tokeniser.encode_sentence(sentence)
        # Were a sentence told in both languages, the text alone would show which words correspond.
        if index // BLOCK % 2 == 0:
            original.extend(ids)
        else:
            counterpart.extend(ids)
            derived.extend(tokeniser.encode_sentence(tokeniser.derive(sentence, index)))
    if min(len(original), len(derived)) <= s.positions:
        raise ValueError(f"too little text for rows of {s.positions} ids: give more")
    return Corpus(np.array(original), derive_ids(np.array(derived), s), np.array(counterpart))

def prepare(args, s, root):
    """The folder of a text's sub-words and ids under a transformation, made on first use. Runs in
    `root` share it. It appears whole or not at all. Raises ValueError. Its name has the length of
    rows, as a text may be too short for it."""
    folder = root / f"data-{content_hash(args)}-{s.transform}-{s.vocab_size}-{s.positions}"
    if RANK == 0 and not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix="making-") as name:
            made = Path(name)
            order = synth_lang.SOV
            if args.order:
                order = synth_lang.learn_order(synth_lang.read_conllu(args.order))
            (made / "order.json").write_text(json.dumps(order))
            with ProcessPoolExecutor(1) as process:
                process.submit(learn_subwords, args, s, made).result()
            np.savez(made / "ids.npz", **vars(make_corpus(args, Tokeniser(made, s), s)))
            made.chmod(0o755)  # TemporaryDirectory makes it for this user alone.
            with suppress(OSError):  # Another run may have made the same meanwhile.
                made.rename(folder)
    if WORLD > 1:
        distributed.barrier()  # The other processes wait until the first one has made it.
    return folder

# -------------------------------------------------------------------------------------- batches
def cut_rows(ids, starts, length, language):
    """Rows of BOS and the next `length` - 1 ids from each start on: their tokens, languages and
    positions, (3, starts, length) int64."""
    places = starts[:, None] + np.arange(length - 1)  # (starts, length - 1)
    tokens = np.insert(ids[places], 0, BOS, axis=1)
    return np.stack(np.broadcast_arrays(tokens, language, np.arange(length)))

@functools.lru_cache(2)  # There are short rows and long ones.
def pair_starts(corpus, size):
    """Where pairs of texts of `size` ids may begin: at the start of a sentence, if at most two ids,
    or the fewest possible, are of a sentence that the end cuts. Under T_inv such a sentence shows
    its beginning in one language and its end in the other, which do not correspond. make_batch
    draws from the first parallel_share of these starts."""
    borders = np.append(0, np.flatnonzero(corpus.derived == EOS) + 1)  # (sentences + 1,)
    starts = borders[borders + size <= len(corpus.derived)]
    # The last border within such a text, and how many of its ids come after that. If sentences end
    # at 10, 18 and 33, a text of 15 ids from 0 has 5 cut ids, and one from 18 none.
    last_end = borders[np.searchsorted(borders, starts + size, "right") - 1]
    cut = starts + size - last_end
    return starts[cut <= max(2, cut.min())]

def make_batch(corpus, s, dictionary, step):
    """The Batch of a step: half original and half derived rows; with XLM, half of it is pairs. All
    that is random is a function of (seed, step). The first short_steps have shorter rows, as BERT's
    had, and more of them."""
    rng = np.random.default_rng([s.seed, step])
    objective = OBJECTIVES[s.objective]
    length = SHORT_ROW if step < s.short_steps else s.positions
    rows = s.batch * s.positions // length  # so that every batch has as many tokens
    count = rows // 4 if objective.parallel else rows // 2
    parts = []  # (3, rows of the part, length) each
    for language, ids in enumerate([corpus.original, corpus.derived]):
        starts = rng.integers(len(ids) - length + 1, size=count)
        parts.append(cut_rows(ids, starts, length, language))
    if objective.parallel:
        starts = pair_starts(corpus, length // 2 - 1)  # without BOS, which cut_rows adds
        # Only the first part of the text is known to be parallel.
        starts = rng.choice(starts[: 1 + int(s.parallel_share * len(starts))], rows // 2)
        original = cut_rows(corpus.counterpart, starts, length // 2, 0)
        derived = cut_rows(corpus.derived, starts, length // 2, 1)
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
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"].lerp_(p.grad, 0.05)
            direction = orthogonal(p.grad.lerp(momentum, 0.95))  # Nesterov's way
            p.mul_(1 - group["lr"] * group["weight_decay"])
            # The factor keeps what comes out of a tall matrix as large as out of a square one.
            p.sub_(direction, alpha=group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)

def orthogonal(matrix):
    """Nearly U V^T of a matrix U S V^T, by five Newton-Schulz iterations, in the matrix's type:
    torch.optim.Muon takes bfloat16, which is slow on a CPU without units for it."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.mT).mT  # The products are smaller for a wide matrix.
    x = matrix / (matrix.norm() + 1e-7)  # No singular value is above 1, as the iteration needs.
    for _ in range(5):
        gram = x @ x.mT  # (rows, rows)
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x

def make_optimizers(model, s):
    """AdamW and, if the settings say so, Muon for the weights of linear layers."""
    embeddings, matrices, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            vectors.append(parameter)
        elif "embeddings" in name:  # Their rows are vectors of their own.
            embeddings.append(parameter)
        else:
            matrices.append(parameter)
    optimizers = []
    if s.optimizer == "muon":
        optimizers.append(Muon(matrices, {"lr": s.matrix_rate, "weight_decay": s.weight_decay}))
        matrices = []
    # As in BERT only matrices decay. The constants are RoBERTa's.
    groups = [{"params": embeddings + matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizers.append(torch.optim.AdamW(
        groups, s.rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=s.weight_decay, fused=True,
    ))  # fmt: skip
    return optimizers

def update(model, optimizers, factor):
    """Clip the gradient to a norm of 1, and take a step at this share of the peak rates."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # An optimizer's defaults stay what it was made with.
            group["lr"] = factor * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()

def schedule(step, s):
    """The share of the peak rate: it rises for `warmup` steps, stays, and falls to zero."""
    rising = (step + 1) / max(1, s.warmup)
    falling = (s.steps - step) / max(1, s.decay_share * (s.steps - s.warmup))
    return min(rising, 1, falling)

# ------------------------------------------------------------------------------------- the loop
def all_state(model, optimizers):
    """All tensors that training changes, not copies of them, by unique names."""
    tensors = model.state_dict()
    for optimizer in optimizers:
        for name, parameter in model.named_parameters():
            for kind, tensor in optimizer.state.get(parameter, {}).items():
                tensors[f"{kind} of {name}"] = tensor
    return tensors

@torch.no_grad()
def load_checkpoint(path, model, optimizers):
    """Put back what a checkpoint holds, and return its step; 0 if there is none."""
    if not path.exists():
        return 0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    # Optimizers make their state in a first step, which with a rate of 0 moves nothing.
    update(model, optimizers, 0.0)
    saved = load_file(path)
    for name, tensor in all_state(model, optimizers).items():
        tensor.copy_(saved[name])
    return int(saved["done"])

def pretrain(corpus, s, folder, args):
    """Train from the folder's checkpoint, if it has one, to the last step; returns the model.
    Raises ValueError for a batch that processes cannot share, or a loss that is not finite."""
    if s.batch % (4 * WORLD):
        raise ValueError(f"batch {s.batch}: give a multiple of 4 for each of {WORLD} processes")
    torch.manual_seed(s.seed)
    model = MaskedLM(s).to(args.device).train()
    optimizers = make_optimizers(model, s)
    checkpoint, log = folder / "checkpoint.safetensors", folder / "log.jsonl"
    start = load_checkpoint(checkpoint, model, optimizers)
    lines = []
    if start:  # What was logged after the checkpoint comes again.
        with log.open() as file:
            lines = [line for line in file if json.loads(line)["step"] <= start]
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    dictionary = make_dictionary(s)
    pairs = torch.tensor(dictionary, device=args.device)

    # eval.py's grid has a bar of its own, and sets this for the runs that it starts.
    quiet = RANK > 0 or "TQDM_DISABLE" in os.environ
    bar = tqdm(range(start, s.steps), "steps", disable=quiet)
    for step in bar:
        batch = make_batch(corpus, s, dictionary, step)
        # Each process takes every WORLD-th row. All get equally many rows and masks, and so the
        # mean of their gradients is that of the whole batch.
        share = Batch(*[values[RANK::WORLD] for values in vars(batch).values()])
        # Dropout is that of the step, wherever a run was stopped. This hash is always the same.
        torch.manual_seed(hash((s.seed, step, RANK)))
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device == "cuda"):
            loss, mlm = network(share.to(args.device), pairs)
        loss.backward()
        update(model, optimizers, schedule(step, s))

        done = step + 1
        if done % args.save_every > 0 and done < s.steps:
            continue
        # What follows makes a GPU wait for the CPU, and so it is done only now and then.
        if not loss.isfinite():
            raise ValueError(f"{folder}: no finite loss at step {done}; lower the rates")
        if RANK == 0:  # The first process writes for all.
            line = {"step": done, "loss": loss.item(), "mlm": mlm.item()}
            line |= alignment_score(model, dictionary)
            bar.set_postfix(line)
            lines.append(json.dumps(line) + "\n")
            write_file(log, "".join(lines).encode())
            # A process that is killed while it writes leaves the previous checkpoint.
            state = all_state(model, optimizers) | {"done": torch.tensor(done)}
            write_file(checkpoint, save(state))
    return model

def is_finished(folder):
    """Whether a run is complete: this file is written last."""
    return (folder / "model" / "tokenizer_config.json").exists()

def write_model(model, subwords, folder):
    """Write what transformers opens: the model, and the tokenizer that SentencePiece's sub-words
    make. Derived ones have the scores of the original ones, and are spelled in transliteration."""
    to_hf(model, folder)
    table = [(subwords.id_to_piece(id), subwords.get_score(id)) for id in range(len(subwords))]
    if model.settings.shift:
        table += [(transliterate_word(spelling), score) for spelling, score in table]
    mark = "\u2581"  # SentencePiece's, before a word
    write_tokenizer(table, (mark, transliterate_word(mark)), folder)

def run(folder, s, args):
    """Do what is left of a run. Raises ValueError if its folder is of another experiment."""
    path = folder / "settings.json"
    source = {"text": args.text, "order": args.order, "sentences": args.sentences}
    record = {"settings": asdict(s), "source": source}
    # A finished run is known by the names of its files, which may be gone; an unfinished one by
    # their content, as they may have moved.
    finished = is_finished(folder)
    if not finished:
        record["content"] = content_hash(args)
    known_by = "source" if finished else "content"
    if path.exists():
        saved = json.loads(path.read_text())
        if any(saved.get(key) != record[key] for key in ("settings", known_by)):
            raise ValueError(f"{path}: has other settings or text; give another folder")
    if finished:
        return
    data = prepare(args, s, folder.parent)
    if RANK == 0:
        folder.mkdir(exist_ok=True)
        write_file(path, json.dumps(record, indent=2).encode())
    trained = pretrain(Corpus(**np.load(data / "ids.npz")), s, folder, args)
    if RANK == 0:
        # With these the run can do without the data, and be moved.
        for name in ("tokenizer.model", "order.json"):
            write_file(folder / name, (data / name).read_bytes())
        write_model(trained, Tokeniser(data, s).subwords, folder / "model")
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

# ---------------------------------------------------------------------------- the command line
def add_options(parser, left_out=()):
    """Options for the text and the machine, and one for every setting but those that are left out,
    the commonest first."""
    add = parser.add_argument
    # A file given in one folder is found from another.
    add("--corpus", "--treebank", dest="text", nargs="+", action="extend", default=[],
        type=os.path.abspath, metavar="FILE",
        help="plain text or CoNLL-U, which the content decides (default: the built-in language)")
    add("--order", type=os.path.abspath,
        help="CoNLL-U whose word order `syntax` borrows (default: verbs last)")
    add("--sentences", type=int, default=60_000, help="of the built-in language (%(default)s)")
    add("--preset", choices=PRESETS, default="tiny", help="for settings not given (%(default)s)")
    add("--device", choices=DEVICES, default=DEVICES[0], help="where to train (%(default)s)")
    add("--save-every", type=int, default=100,
        help="steps between checkpoints and between lines of the log (%(default)s)")
    # A line of Settings is "name: type = value  # meaning".
    for name, meaning in re.findall(r"(\w+): .*# (.*)", inspect.getsource(Settings)):
        if name not in left_out:
            values = ", ".join(f"{key} {getattr(s, name)}" for key, s in PRESETS.items())
            add(f"--{name.replace('_', '-')}", type=reader_of(name), help=f"{meaning} ({values})")

def reader_of(setting):
    """The function that makes a setting's value of an option's text. JSON knows true and false."""
    kind = type(getattr(Settings, setting))
    return json.loads if kind is bool else kind

def read_options(args, **changes):
    """The Settings that the options give, with these changes."""
    for name, value in vars(args).items():
        if hasattr(Settings, name) and value is not None:
            changes.setdefault(name, value)
    s = preset(args.preset, **changes)
    synth_lang.parse_transform(s.transform)  # It raises a ValueError before work is done.
    return s

def main():
    parser = synth_lang.Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the run; the text's ids are kept beside it")
    add_options(parser)
    args = parser.parse_args()
    if WORLD > 1:
        # The others wait for the first one to tokenise the text, which may take hours.
        distributed.init_process_group(timeout=timedelta(days=1))
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    run(args.folder, read_options(args), args)

if __name__ == "__main__":
    synth_lang.guarded(main)
