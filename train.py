"""Pre-train on an original language and one derived from it.

    python train.py runs/align --objective align --preset tiny
    python train.py runs/ewt --corpus books.txt --treebank en_ewt-ud-train.conllu --preset small
    torchrun --nproc-per-node 8 train.py runs/big --preset paper --corpus wiki.txt

The text is the built-in language of synth_lang.py, or plain text (--corpus), trees (--treebank), or
both. It is tokenised once, into a folder that all runs over the same text share. A run's folder
holds settings.json, log.jsonl, the newest checkpoints, and at the end model/, which eval.py and
transformers open. The same command again goes on from the last checkpoint.

Everything random in step i is a function of (seed, i) alone, and of the process for dropout. A
checkpoint therefore needs no state of any generator, and where a run was stopped does not show.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors import safe_open
from tqdm import tqdm

import synth_lang
from alignmlm import BOS, DAMAGE, EOS, PAD, PRESETS, SHORT, SPECIALS, Batch, MaskedLM, Settings
from alignmlm import ask_translations, derived_ids, make_dictionary, mask_tokens, pair_translations
from alignmlm import preset, save_tensors, to_hf, write_text
from kernels import alignment_loss

# ------------------------------------------------------------------------------ text to arrays

BLOCK = 1_000  # sentences: the original language has every other block, the derived one the rest
PARTS = "original", "derived", "counterpart"  # a file each; the last is the derived one's original


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the text comes from; the built-in language if no file is given."""

    corpus: tuple[str, ...] = ()
    treebank: tuple[str, ...] = ()
    order: str | None = None  # treebank of the language whose order `syntax` borrows
    sentences: int = 60_000  # of the built-in language

    def __post_init__(self):
        """Raise ValueError for what settings.json may hold but no command line gives."""
        paths = [*self.corpus, *self.treebank, self.order or ""]
        if not isinstance(self.sentences, int) or not all(isinstance(path, str) for path in paths):
            raise ValueError(f"source: not paths and a number of sentences: {self}")

    def read(self) -> Iterator[synth_lang.Sentence]:
        if not (self.corpus or self.treebank):
            yield from synth_lang.generate(self.sentences, seed=0)
        for path in self.treebank:
            yield from synth_lang.read_conllu(path)
        for path in self.corpus:
            yield from synth_lang.read_text(path)


def train_tokenizer(sentences: Iterable[synth_lang.Sentence], pieces: int, path: Path) -> None:
    """Write a unigram SentencePiece model of `pieces` ids, the shared specials first.

    Raises InputError if the text has not so many.
    """
    sentencepiece.set_random_generator_seed(0)  # of the sample below
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(sentence.words) for sentence in sentences),
            model_writer=model,
            vocab_size=pieces,
            bos_id=BOS, pad_id=PAD, eos_id=EOS, unk_id=SPECIALS,
            control_symbols=["<mask>"],  # takes the free id, MASK
            input_sentence_size=1_000_000,  # a sample is enough, and bounds the memory
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise synth_lang.InputError(
            f"tokenizer: {pieces} sub-words cannot be learned from this text: give more text "
            f"or a smaller --vocab-size ({str(error).split('] ')[-1].strip()})"
        ) from error
    path.write_bytes(model.getvalue())


class Languages:
    """From the words of the original language to the ids of either.

    The transformation "transliterate" acts on ids (`derived_ids`), all others on words. Words are
    cut into sub-words one at a time, so that none depends on its neighbours and a sentence and its
    counterpart have equally many.
    """

    def __init__(self, tokenizer: Path, s: Settings, order: synth_lang.OrderModel):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        self.derived_ids, self.order = derived_ids(s), order
        names = synth_lang.parse_transform(s.transform)
        self.names = tuple(name for name in names if name != "transliterate")

    def derive(self, sentence: synth_lang.Sentence, index: int) -> synth_lang.Sentence:
        """Words, labels and trees in the derived order; index seeds what is random."""
        return synth_lang.transform(sentence, self.names, index=index, order=self.order)[0]

    def encode(self, words: list[str], derived: bool) -> list[list[int]]:
        """The ids of each word: one or more, none of them special."""
        encoded = map(self._encode_word, words)
        return [self.derived_ids[ids].tolist() for ids in encoded] if derived else [*encoded]

    @functools.lru_cache(maxsize=1 << 20)  # noqa: B019  there is one of these a process
    def _encode_word(self, word: str) -> list[int]:
        return self.pieces.encode(word) or [self.pieces.unk_id()]


def follow_parent() -> None:
    """Of a worker: to end when its parent has ended, even by SIGKILL."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # in which a run saves its step
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_worker(languages: Languages) -> None:
    global _languages  # of this worker
    _languages = languages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    follow_parent()


def tokenise(number: int, block: list[synth_lang.Sentence]) -> dict[str, np.ndarray]:
    """A worker's share: block `number` as ids, (n,) int64, by the part that they belong to."""

    def flat(texts: Iterable[list[str]]) -> np.ndarray:  # every sentence closed by EOS
        ids = (itertools.chain(*_languages.encode(words, False), [EOS]) for words in texts)
        return np.fromiter(itertools.chain.from_iterable(ids), np.int64)

    ids = flat(sentence.words for sentence in block)
    if number % 2 == 0:
        return {"original": ids}
    derived = map(_languages.derive, block, itertools.count(number * BLOCK))
    moved = flat(sentence.words for sentence in derived)
    return {"derived": _languages.derived_ids[moved], "counterpart": ids}


def tokenised(languages: Languages, sentences: Iterable, workers: int) -> Iterator[dict]:
    """`tokenise` of every block, in order; this process reads, some blocks ahead of the workers."""
    sentences = iter(sentences)
    blocks = iter(lambda: list(itertools.islice(sentences, BLOCK)), [])
    # A fork need not import torch again; like a DataLoader's it is safe, as it does not use torch.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, context, start_worker, (languages,)) as pool:
        ahead = collections.deque()
        for block in enumerate(blocks):
            ahead.append(pool.submit(tokenise, *block))
            if len(ahead) > 3 * workers:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)


class Packer:
    """Running text into a file of rows of `length` int32 ids, with nothing padded.

    A row is BOS and the text from where the row before ended; what is left at the end is dropped.
    """

    def __init__(self, path: Path, length: int):
        self.file, self.length = open(path, "wb"), length  # noqa: SIM115
        self.left, self.rows = np.empty(0, np.int64), 0

    def add(self, ids: np.ndarray) -> None:
        """More of the text, (n,)."""
        text = np.concatenate([self.left, ids])
        end = len(text) - len(text) % (self.length - 1)
        rows = np.insert(text[:end].reshape(-1, self.length - 1), 0, BOS, axis=1)
        rows.astype(np.int32).tofile(self.file)
        self.left, self.rows = text[end:], self.rows + len(rows)

    def close(self) -> int:
        """How many rows were written."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return self.rows


@dataclasses.dataclass
class Corpus:
    """Packed ids on disk, memory-mapped, (rows, T) int32 each; to be read in rows of `length`."""

    original: np.ndarray  # one half of the text
    derived: np.ndarray  # the other half, transformed; its ids already shifted
    counterpart: np.ndarray  # that other half untransformed, sentence for sentence beside it
    length: int  # ids, BOS included; T or fewer

    @staticmethod
    def open(folder: Path, s: Settings) -> "Corpus":
        arrays = [np.memmap(folder / f"{part}.bin", np.int32, "r") for part in PARTS]
        return Corpus(*(array.reshape(-1, s.positions) for array in arrays), s.positions)

    @staticmethod
    def cut(side: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """BOS and the text of a side from these starts on, (starts, length) int32. The BOS of the
        rows on disk is not of the text and does not count."""
        places = starts[:, None] + np.arange(length - 1)
        places += places // (side.shape[1] - 1) + 1
        return np.insert(side.ravel()[places], 0, BOS, axis=1)

    def rows(self, side: np.ndarray, count: int, step: int, seed: tuple[int, ...]) -> np.ndarray:
        """The rows of a side that step number `step` takes, (count, length) int32."""
        words = self.length - 1
        drawn = draw((side.size - len(side)) // words, count, step, seed)
        return self.cut(side, words * drawn, self.length)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Where pairs begin in the text, BOS not counted: where a sentence does, if half a row on
        one has just ended, two ids before at most (or the fewest that there are). For what is cut
        off need not have a counterpart in the row."""
        ends = np.flatnonzero(self.derived.ravel() == EOS)
        starts = np.concatenate([[0], ends - ends // self.derived.shape[1]])
        stops = starts + self.length // 2 - 1
        cut = stops - starts[np.searchsorted(starts, stops, "right") - 1]
        fits = stops <= self.derived.size - len(self.derived)
        return starts[fits & (cut <= max(2, cut[fits].min()))]

    def pairs(self, rows: np.ndarray) -> list[np.ndarray]:
        """Of these starts, half a row each: original, and derived, (rows, length / 2) int32."""
        starts, half = self.starts[rows], self.length // 2
        return [self.cut(side, starts, half) for side in (self.counterpart, self.derived)]


def corpus_name(source: Source, s: Settings) -> str:
    """The name of the corpus's folder, which changes with all that the corpus is made of."""
    files = [Path(p).stat() for p in (*source.corpus, *source.treebank, source.order) if p]
    stamps = [(stat.st_size, stat.st_mtime_ns) for stat in files]
    names = synth_lang.parse_transform(s.transform)
    text = (dataclasses.asdict(source), stamps, synth_lang.GRAMMAR, synth_lang.WORDS)
    key = json.dumps((text, names, s.vocab_size, s.positions, s.overlap))
    return f"data-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def making(root: Path) -> Iterator[None]:
    """While a corpus is made in root. If nobody else makes one, what killed runs left is removed:
    a lock, which ends with its process however that ends, tells."""
    root.mkdir(parents=True, exist_ok=True)
    lock = os.open(root, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # another is at work, or this disk knows no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in root.glob("making-data-*"):
                shutil.rmtree(left)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


def prepare(source: Source, s: Settings, root: Path, workers: int | None = None) -> Corpus:
    """The corpus of this text under this transformation, made on first use in a folder of root.

    The original language and the derived one come from different halves of the text. The folder
    appears whole or not at all, so several runs may start at once. workers: processes beside this
    one (with more than 8 it is the reading that takes the time). Raises InputError.
    """
    folder = root / corpus_name(source, s)
    if folder.exists():
        return Corpus.open(folder, s)

    order = synth_lang.read_order(source.order)
    workers = workers or min(max(os.cpu_count() - 1, 1), 8)
    bar = functools.partial(tqdm, unit=" sentences", mininterval=1)
    with making(root), tempfile.TemporaryDirectory(dir=root, prefix="making-data-") as made:
        tokenizer = Path(made, "tokenizer.model")
        train_tokenizer(bar(source.read(), "learning sub-words"), s.pieces, tokenizer)
        languages = Languages(tokenizer, s, order)
        packers = {part: Packer(Path(made, f"{part}.bin"), s.positions) for part in PARTS}
        for parts in tokenised(languages, bar(source.read(), "tokenising"), workers):
            for part, ids in parts.items():
                packers[part].add(ids)
        if not all([packer.close() for packer in packers.values()]):
            text = ", ".join((*source.corpus, *source.treebank)) or "the built-in language"
            raise synth_lang.InputError(
                f"{text}: too little text for a sequence of "
                f"{s.positions} tokens in each half ({BLOCK} sentences in turn): give more"
            )
        os.chmod(made, 0o755)  # for other users of a shared folder too
        with contextlib.suppress(OSError):  # another run has just made the same
            os.rename(made, folder)
    return Corpus.open(folder, s)


# ------------------------------------------------------------------------------------- batches


@functools.lru_cache(maxsize=8)
def shuffled(rows: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows)


def draw(rows: int, count: int, step: int, seed: tuple[int, ...]) -> np.ndarray:
    """Which of the rows step number `step` takes: shuffled epochs, one after another."""
    places = (divmod(place, rows) for place in range(step * count, (step + 1) * count))
    return np.array([shuffled(rows, (*seed, epoch))[place] for epoch, place in places])


def make_batch(corpus: Corpus, s: Settings, dictionary: np.ndarray, step: int) -> Batch:
    """Step number `step`'s batch: half original, half derived; with XLM, half of it pairs. If the
    corpus is read in shorter rows than the settings', there are more of them: as many tokens."""
    rows = s.batch * s.positions // corpus.length
    pairs = rows // 2 if s.objective == "xlm" else 0
    half = (rows - pairs) // 2
    original = corpus.rows(corpus.original, half, step, (s.seed, 1))
    derived = corpus.rows(corpus.derived, half, step, (s.seed, 2))
    tokens = np.concatenate([original, derived])
    languages = np.repeat([[0], [1]], half, axis=0) + np.zeros_like(tokens)
    positions = np.zeros_like(tokens) + np.arange(corpus.length)
    if pairs:
        parallel = math.ceil(s.parallel_share * len(corpus.starts))
        paired = pair_translations(*corpus.pairs(draw(parallel, pairs, step, (s.seed, 3))))
        both = zip((tokens, languages, positions), paired, strict=True)
        tokens, languages, positions = (np.concatenate(parts) for parts in both)

    rng = np.random.default_rng([s.seed, 4, step])
    arrays = mask_tokens(tokens, s, rng)
    batch = Batch(*(a.astype(np.int64) for a in (*arrays, languages, positions)))
    if s.objective == "dict":
        ask_translations(batch, dictionary, s, rng)
    return batch


# ------------------------------------------------------------------------------------ training

LOG_EVERY = 20  # steps; only then does the host ask the device for a number
MAX_STREAK = 20  # steps without a finite gradient
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


def rate_at(step: int, s: Settings) -> float:
    """Linear warm-up to the peak, then linear decay to zero; a run of fewer steps ends in it."""
    return s.rate * min((step + 1) / s.warmup, (s.steps - step) / max(1, s.steps - s.warmup))


def make_optimizer(model: torch.nn.Module, s: Settings) -> torch.optim.AdamW:
    """AdamW with RoBERTa's constants; weight decay on matrices alone, as BERT has it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=s.rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def save_checkpoint(folder: Path, step: int, skipped: int, model, optimizer) -> None:
    """Weights and optimizer after `step` steps, as one file; the last two are kept.

    Its checksum lets a resume tell a damaged one, which safetensors alone would not.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach().cpu()
        for kind, tensor in optimizer.state[parameter].items():
            tensors[f"{kind} {name}"] = tensor.cpu()
    metadata = {"step": str(step), "skipped": str(skipped)}
    metadata["crc32"] = checksum(tensors, metadata)
    save_tensors(folder / f"checkpoint-{step:08d}.safetensors", tensors, metadata)
    for old in sorted(folder.glob("checkpoint-*.safetensors"))[:-2]:
        old.unlink()


def checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    crc = zlib.crc32(f"{metadata['step']} {metadata['skipped']}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return str(crc)


def load_checkpoint(folder: Path, model, optimizer) -> tuple[int, int]:
    """Go back to the newest undamaged checkpoint; returns its (step, skipped), or (0, 0)."""
    for path in sorted(folder.glob("checkpoint-*.safetensors"), reverse=True):
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            if checksum(tensors, metadata) != metadata["crc32"]:
                raise ValueError("wrong checksum")
        except DAMAGE as error:
            why = " ".join(str(error).split())
            print(f"{path}: damaged ({why}): going on from the one before", file=sys.stderr)
            continue
        for name, parameter in model.named_parameters():
            parameter.data.copy_(tensors[name])
            optimizer.state[parameter] = {
                kind: tensors[f"{kind} {name}"].to(parameter.device)
                for kind in ("step", "exp_avg", "exp_avg_sq")
            }
        return int(metadata["step"]), int(metadata["skipped"])
    return 0, 0


def open_log(path: Path, step: int):
    """The log, to go on after `step`: lines beyond it, from before a stop, are taken out."""
    if RANK > 0:
        return open(os.devnull, "w")
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(*DAMAGE):  # of a line, which is left out
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line.decode())
    write_text(path, "".join(kept))
    return open(path, "a")


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """What asks to stop, eval.py's alarm too, is listed: the step can be finished and saved."""
    noted = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.signal(number, lambda n, _: noted.append(n)) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def pretrain(
    corpus: Corpus, s: Settings, folder: Path, device: str,
    save_every: int, accumulate: int, compiled: bool, keep_every: int,
) -> None:  # fmt: skip
    """Train to the last step, from wherever `folder`'s checkpoints are; writes folder/model.

    The first short_steps read the corpus in rows of SHORT (as BERT did: Devlin et al. 2019).
    accumulate: in how many slices a batch is computed, one after another, to need less memory.
    keep_every: steps after which the model as it is then is kept, as model-<step>; 0 for never.
    Raises ValueError after MAX_STREAK steps without a finite gradient. A signal ends the process,
    status 128 + its number, when the step is done and saved.
    """
    torch.manual_seed(s.seed)
    model = MaskedLM(s).to(device)
    optimizer = make_optimizer(model, s)
    start, skipped = load_checkpoint(folder, model, optimizer)
    pairs = make_dictionary(s)
    dictionary = torch.from_numpy(pairs).to(device)
    network = torch.compile(model, dynamic=False) if compiled else model  # for either length
    if WORLD > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
    model.train()
    short = dataclasses.replace(corpus, length=SHORT)

    def batch_of(step: int) -> Batch:
        return make_batch(short if step < s.short_steps else corpus, s, pairs, step)

    losses, skips = torch.zeros(2, device=device), 0
    streak = longest = torch.zeros((), device=device)
    clock, logged = time.perf_counter(), start
    quiet = RANK > 0 or "TQDM_DISABLE" in os.environ
    with (
        tqdm(total=s.steps, initial=start, disable=quiet, unit="step", mininterval=1) as bar,
        noted_signals() as signals,
        ThreadPoolExecutor(1) as ahead,
        open_log(folder / "log.jsonl", start) as log,
    ):
        upcoming = ahead.submit(batch_of, start)
        for step in range(start, s.steps):
            batch = upcoming.result()
            upcoming = ahead.submit(batch_of, step + 1)
            torch.manual_seed(hash((s.seed, step, RANK)))  # of dropout
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, s)
            share = len(batch.tokens) // (WORLD * accumulate)
            for number in range(RANK * accumulate, (RANK + 1) * accumulate):
                part = batch.to(device, slice(number * share, (number + 1) * share))
                with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
                    loss, mlm = network(part, dictionary)
                (loss / accumulate).backward()
                losses += torch.stack([loss.detach(), mlm]) / accumulate
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            # A fused optimizer leaves the step out by itself: asking here would wait for the GPU.
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()
            optimizer.zero_grad()
            skips = skips + optimizer.found_inf
            streak = (streak + 1) * optimizer.found_inf
            longest = torch.maximum(longest, streak)
            done = step + 1
            bar.update()
            kept = folder / f"model-{done:08d}"
            if keep_every and done % keep_every == 0 and RANK == 0 and not kept.exists():
                to_hf(model, folder / "making-model")
                os.rename(folder / "making-model", kept)

            last = done == s.steps
            due = done % LOG_EVERY == 0 or done % save_every == 0 or last
            if not (due or (signals and WORLD == 1)):
                continue
            seconds, steps = time.perf_counter() - clock, done - logged
            loss, mlm = (x if math.isfinite(x) else None for x in (losses / steps).tolist())
            line = {
                "step": done,
                "loss": loss,
                "mlm": mlm,
                "rate": rate_at(step, s),
                "tokens_per_second": round(steps * s.batch * s.positions / seconds),
                "skipped": skipped + int(skips),
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix(mlm=mlm, tokens_s=line["tokens_per_second"])
            if longest >= MAX_STREAK:
                raise ValueError(
                    f"{folder}: no finite gradient in {MAX_STREAK} steps in a row, up to step "
                    f"{done}: try a lower --rate in a new folder (the last checkpoint is good)"
                )
            losses.zero_()
            clock, logged = time.perf_counter(), done
            stop = max(signals, default=0)
            if WORLD > 1:  # a signal that any process has noted stops all at this step
                flag = torch.tensor(stop, device=device)
                torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
                stop = int(flag)
            if RANK == 0 and not last and (done % save_every == 0 or stop):
                save_checkpoint(folder, done, line["skipped"], model, optimizer)
            if stop and not last:
                if WORLD > 1:  # for torchrun ends the others when one has left
                    torch.distributed.barrier()
                sys.exit(128 + stop)
    if RANK == 0:
        to_hf(model, folder / "model")


# ----------------------------------------------------------------------------------- benchmark


def compiles(device: str) -> bool:
    """Whether to torch.compile unasked: on a GPU where it can be (on a CPU: see RESULTS.md)."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return device != "cpu" and compiler is not None and find_spec("triton") is not None


def model_flops(s: Settings) -> int:
    """Of a step's matrix products: 2 a parameter and token forward, twice that backward.

    A layer's have 4 D^2 + 2 D F parameters; Q K' and its product with V are as good as 2 T D more.
    Only the M masked tokens of a sequence need the head and the vocabulary.
    """
    B, T, D, M = s.batch, s.positions, s.width, round(s.mask_share * s.positions)
    layer = 4 * D * D + 2 * D * s.feed_forward + 2 * T * D
    return 6 * B * (T * s.layers * layer + M * (D * D + s.vocab_size * D))


def benchmark(s: Settings, device: str, compiled: bool, repeats: int = 20) -> None:
    """Print what a step costs, beside one of transformers' RobertaForMaskedLM, and its parts.

    Same process, weights, batch, optimizer and clipping. Theirs computes its own loss, over the
    logits of every token, as it is used.
    """
    from kernels.bench import peak_memory, take_turns  # draws figures: not for every training

    try:
        from transformers import RobertaForMaskedLM
    except ImportError as error:
        raise ValueError(f"--bench: {error}: pip install transformers") from error
    ours = MaskedLM(s).to(device).train()
    with tempfile.TemporaryDirectory() as folder:
        to_hf(ours, folder)
        theirs = RobertaForMaskedLM.from_pretrained(folder).to(device).train()
    rng, pairs = np.random.default_rng(0), make_dictionary(s)
    tokens = rng.integers(SPECIALS, s.pieces, (s.batch, s.positions), np.int32)
    corpus = Corpus(tokens, derived_ids(s)[tokens], tokens, s.positions)
    batch = make_batch(corpus, s, pairs, 0).to(device)
    dictionary = torch.from_numpy(pairs).to(device)
    inputs = {
        "input_ids": batch.tokens, "token_type_ids": batch.languages * (s.languages - 1),
        "attention_mask": torch.ones_like(batch.tokens),  # as its collator makes it
        "labels": torch.full_like(batch.tokens, -100).scatter_(1, batch.masked, batch.labels),
    }  # fmt: skip

    def step(network, optimizer, loss_of, mark=lambda name: None):
        with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
            loss = loss_of(network)
        mark("forward, head and vocabulary loss")
        loss.backward()
        mark("backward")
        torch.nn.utils.clip_grad_norm_(network.parameters(), s.clip)
        optimizer.step()
        optimizer.zero_grad()
        mark("clipping and optimizer")

    steps = {}
    for name, model, loss_of in (
        ("alignmlm", ours, lambda network: network(batch, dictionary)[0]),
        ("transformers", theirs, lambda network: network(**inputs).loss),
    ):
        rest = make_optimizer(model, s), loss_of
        steps[name] = functools.partial(step, model, *rest)
        if compiled:
            steps[f"{name}, compiled"] = functools.partial(step, torch.compile(model), *rest)
    size, dtype = (2048, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    square = torch.randn(size, size, device=device, dtype=dtype)
    times = take_turns(steps | {"product": lambda: square @ square}, repeats, device)
    rate = 2 * size**3 / min(times["product"]) * 1e3
    print("| step | tokens/s | median ms | fastest | slowest | MFU | extra MiB | times as fast |\n"
          "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")  # fmt: skip
    for name, call in steps.items():
        ms = np.median(times[name])
        print(f"| {name} | {1e3 * tokens.size / ms:,.0f} | {ms:.1f} | {min(times[name]):.1f} "
              f"| {max(times[name]):.1f} | {1e3 * model_flops(s) / ms / rate:.1%} "
              f"| {peak_memory(call, device) / 2**20:.0f} "
              f"| {np.median(times['transformers']) / ms:.2f} |")  # fmt: skip
    print(f"\n{device}, {torch.get_num_threads()} threads, torch {torch.__version__}. MFU: of the "
          f"{rate / 1e12:.3g} TFLOP/s of a product of two {size} x {size} {dtype}.\n")  # fmt: skip

    last, parts = 0.0, collections.defaultdict(list)

    def mark(name: str) -> None:
        nonlocal last  # the milliseconds since the mark before are of this part
        if device != "cpu":
            torch.cuda.synchronize()
        now = 1e3 * time.perf_counter()
        parts[name].append(now - last)
        last = now

    ours.head_dense.register_forward_pre_hook(lambda *_: mark("forward, encoder"))
    for number in range(repeats):
        mark("")
        make_batch(corpus, s, pairs, number).to(device)
        mark("making a batch (beside the step before it)")
        steps["alignmlm"](mark=mark)
        if s.objective == "align":
            alignment_loss(ours.word_embeddings.weight, dictionary)
            mark("forward, alignment loss")
    parts = {name: np.median(ms) for name, ms in parts.items() if name}
    parts["forward, head and vocabulary loss"] -= parts.get("forward, alignment loss", 0)
    print("| part of a step of alignmlm | ms | % |\n| --- | ---: | ---: |")
    for name, ms in parts.items():
        print(f"| {name} | {ms:.1f} | {100 * ms / sum(parts.values()):.1f} |")


# ------------------------------------------------------------------------------------- command


def count(text: str) -> int:
    """The type of an option that is a whole number above 0."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def add_device(parser: argparse.ArgumentParser) -> None:
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument("--device", choices=devices, default=devices[0], help="(%(default)s)")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Text, machine, --preset, and one option for every setting, to change it."""
    parser.add_argument("--corpus", nargs="*", default=[], metavar="TEXT", help="plain text")
    parser.add_argument("--treebank", nargs="*", default=[], metavar="CONLLU", help="trees")
    parser.add_argument("--order", metavar="CONLLU", help="`syntax` takes its word order from this")
    parser.add_argument("--sentences", type=int, default=Source.sentences,
                        help="of the built-in language (%(default)s)")  # fmt: skip
    add_device(parser)
    parser.add_argument("--threads", type=count, help="of the CPU")
    parser.add_argument("--accumulate", type=count, default=1,
                        help="slices of a batch (%(default)s)")  # fmt: skip
    parser.add_argument("--save-every", type=count, default=1000, help="steps (%(default)s)")
    parser.add_argument("--keep-every", type=count, default=0, metavar="STEPS",
                        help="keep the model then, as model-<step> (never)")  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="with torch.compile (on a GPU, if a C compiler and triton are there)")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="(%(default)s)")
    group = parser.add_argument_group(f"settings of the experiment ({', '.join(PRESETS)})")
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        values = [str(getattr(s, field.name)) for s in PRESETS.values()]
        values = ", ".join(values if len({*values}) > 1 else values[:1])
        text = f"{field.metadata.get('help', '')} ({values})".strip().replace("%", "%%")
        if field.type is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(name, type=field.type, metavar=field.type.__name__, help=text)


def source_of(args: argparse.Namespace) -> Source:
    return Source(tuple(args.corpus), tuple(args.treebank), args.order, args.sentences)


def given_settings(args: argparse.Namespace) -> dict:
    """The settings that the command line names."""
    names = [field.name for field in dataclasses.fields(Settings)]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def record_of(s: Settings, source: Source) -> dict:
    """What settings.json holds."""
    return {
        "settings": dataclasses.asdict(s),
        "source": dataclasses.asdict(source),
        "corpus": {"name": corpus_name(source, s)},
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {
            name: next((found.version for found in distributions(name=name)), None)
            for name in ("torch", "triton", "numpy", "sentencepiece")
        },
    }  # fmt: skip


@functools.cache
def commit() -> str | None:
    """The code's commit, with "+changes" if a file of it was changed since; None without git."""
    code = Path(__file__).resolve().parent
    own = ["git", f"--git-dir={code}/.git", f"--work-tree={code}", "--no-optional-locks"]
    name = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    with contextlib.suppress(OSError):
        return subprocess.run([*own, *name], capture_output=True, text=True).stdout.strip() or None


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether the run in folder is this process's alone, until it is done or, however, dead.

    A lock on a file, which the system takes back from a process that has ended. Machines that share
    the folder need a file system with locks, as NFS has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "claim", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            if [path.name for path in folder.iterdir()] == ["claim"]:  # bad input leaves nothing
                shutil.rmtree(folder)


def refuse_other(path: Path, record: dict) -> None:
    """A folder's settings stay what they were: ValueError with those that now differ."""
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text())
        thens = {part: dict(there[part]) for part in ("settings", "source", "corpus")}
    except DAMAGE as error:
        raise ValueError(f"{path}: damaged ({error}): use a new folder") from error
    for part, then in thens.items():
        now = json.loads(json.dumps(record[part]))
        differ = [f"{k} {then.get(k)} (now {now[k]})" for k in now if then.get(k) != now[k]]
        if differ:
            raise ValueError(f"{path}: has other settings: {', '.join(differ)}: use a new folder")


EXITS = "Exit status: 0 done; 2 bad input, in one line; 128 + n stopped by signal n, after saving."


class Parser(argparse.ArgumentParser):
    """Of a `guarded` command."""

    def __init__(self, **options):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=form, allow_abbrev=False, **options)

    def error(self, message: str):
        raise ValueError(f"{message}: see --help")


def guarded(main) -> None:
    """Run a command; what its user can mend is one line on stderr and exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted: the same command goes on", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename:
            line = f"{error.filename}: {error.strerror}: check the path, its rights and free space"
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(2)


def run(
    folder: Path, s: Settings, source: Source, device: str,
    save_every: int = 1000, accumulate: int = 1, compiled: bool | None = None, keep_every: int = 0,
) -> None:  # fmt: skip
    """Everything from the text to folder/model, or as much of it as is still to be done."""
    compiled = compiles(device) if compiled is None else compiled
    if s.batch % (WORLD * accumulate):
        raise ValueError(f"batch {s.batch} cannot be cut into {WORLD * accumulate} equal slices")
    record = record_of(s, source)
    refuse_other(folder / "settings.json", record)
    if not (folder / "model" / "config.json").exists():
        if RANK > 0:  # the first process makes the corpus, the others find it made
            torch.distributed.barrier()
        corpus = prepare(source, s, folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            tokenizer = folder / "tokenizer.model"  # a second name for the corpus's, for eval.py
            if not tokenizer.exists():
                os.link(folder.parent / corpus_name(source, s) / tokenizer.name, tokenizer)
            write_text(folder / "settings.json", json.dumps(record, indent=2) + "\n")
            if WORLD > 1:
                torch.distributed.barrier()
        pretrain(corpus, s, folder, device, save_every, accumulate, compiled, keep_every)
    if RANK == 0:
        for path in folder.glob("checkpoint-*"):
            path.unlink()


def main() -> None:
    parser = Parser(description=__doc__, epilog=EXITS)
    parser.add_argument("folder", type=Path, nargs="?", help="of the run; its corpus is beside it")
    parser.add_argument("--bench", action="store_true", help="time a step; needs transformers")
    add_options(parser)
    args = parser.parse_args()
    s = preset(args.preset, **given_settings(args))
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.bench:
        benchmark(s, args.device, compiles(args.device) if args.compile is None else args.compile)
        return
    if args.folder is None:
        parser.error("give the run's folder")
    if WORLD > 1 and args.device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if WORLD > 1:  # a day: the others wait while the first one tokenises
        torch.distributed.init_process_group(
            "gloo" if args.device == "cpu" else "nccl", timeout=datetime.timedelta(days=1)
        )
    with claim(args.folder) if RANK == 0 else contextlib.nullcontext(True) as mine:
        if not mine:
            raise ValueError(f"{args.folder}: another process trains here: wait for it")
        run(
            args.folder, s, source_of(args), args.device,
            save_every=args.save_every, accumulate=args.accumulate, compiled=args.compile,
            keep_every=args.keep_every,
        )  # fmt: skip
    print(f"{args.folder}: trained")


if __name__ == "__main__":
    guarded(main)
