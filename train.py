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
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import synth_lang
from alignmlm import BOS, EOS, PAD, PRESETS, SPECIALS, Batch, MaskedLM, Settings
from alignmlm import ask_translations, make_dictionary, mask_tokens, pair_translations
from alignmlm import preset, save_tensors, to_hf, write_text

# ------------------------------------------------------------------------------ text to arrays

BLOCK = 1_000  # sentences: the original language has every other block, the derived one the rest
PARTS = "original", "derived", "counterpart"  # a file each; the last is the derived one's original


@dataclass(frozen=True)
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
    """Train a unigram SentencePiece model of `pieces` ids, the shared specials first."""
    sentencepiece.set_random_generator_seed(0)  # of the sample below
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(sentence.words) for sentence in sentences),
            model_prefix=str(path.with_suffix("")),
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


class Languages:
    """From the words of the original language to the ids of either.

    A derived id is its original's moved by the settings' shift, which is the transformation
    "transliterate"; all others act on words. Words are cut into sub-words one at a time, so that
    none depends on its neighbours and a sentence and its counterpart have equally many.
    """

    def __init__(self, tokenizer: Path, s: Settings, order: synth_lang.OrderModel):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        self.shift, self.order = s.shift, order
        names = synth_lang.parse_transform(s.transform)
        self.names = tuple(name for name in names if name != "transliterate")

    def derive(self, sentence: synth_lang.Sentence, index: int) -> synth_lang.Sentence:
        """Words, labels and trees in the derived order; index seeds what is random."""
        return synth_lang.transform(sentence, self.names, index=index, order=self.order)[0]

    def encode(self, words: list[str], derived: bool) -> list[list[int]]:
        """The ids of each word: one or more, none of them special."""
        shift = self.shift if derived else 0
        return [[id + shift for id in self._encode_word(word)] for word in words]

    @functools.lru_cache(maxsize=1 << 20)  # noqa: B019  there is one of these a process
    def _encode_word(self, word: str) -> list[int]:
        return self.pieces.encode(word) or [self.pieces.unk_id()]


class Packer:
    """Sentences into a file of rows of `length` int32 ids, with nothing padded.

    A row is BOS and the running text, every sentence closed by EOS; a sentence that a row's end
    cuts goes on in the next, and what is left at the end is dropped.
    """

    def __init__(self, path: Path, length: int):
        self.file, self.length = open(path, "wb"), length  # noqa: SIM115
        self.row, self.rows = [BOS], 0

    def add(self, words: list[list[int]]) -> None:
        """A sentence, as the ids of each of its words."""
        self.row += [*itertools.chain.from_iterable(words), EOS]
        while len(self.row) >= self.length:
            np.array(self.row[: self.length], np.int32).tofile(self.file)
            self.row[: self.length] = [BOS]
            self.rows += 1

    def close(self) -> int:
        """How many rows were written."""
        self.file.close()
        return self.rows


@dataclass
class Corpus:
    """Packed ids on disk, memory-mapped, (rows, T) int32 each."""

    languages: Languages
    original: np.ndarray  # one half of the text
    derived: np.ndarray  # the other half, transformed; its ids already shifted
    counterpart: np.ndarray  # that other half untransformed, token for token beside it

    @staticmethod
    def open(folder: Path, s: Settings, order) -> "Corpus":
        arrays = [np.memmap(folder / f"{part}.bin", np.int32, "r") for part in PARTS]
        languages = Languages(folder / "tokenizer.model", s, order)
        return Corpus(languages, *(array.reshape(-1, s.positions) for array in arrays))


def corpus_name(source: Source, s: Settings) -> str:
    """The name of the corpus's folder, which changes with all that the corpus is made of."""
    files = [Path(p).stat() for p in (*source.corpus, *source.treebank, source.order) if p]
    stamps = [(stat.st_size, stat.st_mtime_ns) for stat in files]
    names = synth_lang.parse_transform(s.transform)
    text = (dataclasses.asdict(source), stamps, synth_lang.GRAMMAR, synth_lang.WORDS)
    key = json.dumps((text, names, s.vocab_size, s.positions))
    return f"data-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def order_of(source: Source) -> synth_lang.OrderModel:
    """The word order that `syntax` gives the derived language."""
    if source.order:
        return synth_lang.learn_order(synth_lang.read_conllu(source.order))
    return synth_lang.SOV


def prepare(source: Source, s: Settings, root: Path) -> Corpus:
    """The corpus of this text under this transformation, made on first use in a folder of root.

    The original language and the derived one come from different halves of the text. The folder
    appears whole or not at all, so several runs may start at once.
    """
    folder, order = root / corpus_name(source, s), order_of(source)
    if folder.exists():
        return Corpus.open(folder, s, order)

    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="making-data-") as made:
        tokenizer = Path(made, "tokenizer.model")
        train_tokenizer(source.read(), s.pieces, tokenizer)
        languages = Languages(tokenizer, s, order)
        original, derived, counterpart = (
            Packer(Path(made, f"{p}.bin"), s.positions) for p in PARTS
        )
        sentences = tqdm(source.read(), "tokenising", unit=" sentences", mininterval=1)
        for index, sentence in enumerate(sentences):
            ids = languages.encode(sentence.words, derived=False)
            if index // BLOCK % 2 == 0:
                original.add(ids)
            else:
                words = languages.derive(sentence, index).words
                derived.add(languages.encode(words, derived=True))
                counterpart.add(ids)
        if not all([packer.close() for packer in (original, derived, counterpart)]):
            text = ", ".join((*source.corpus, *source.treebank)) or "the built-in language"
            raise synth_lang.InputError(
                f"{text}: too little text for a sequence of "
                f"{s.positions} tokens in each half ({BLOCK} sentences in turn): give more"
            )
        with contextlib.suppress(OSError):  # another run has just made the same
            os.rename(made, folder)
            os.mkdir(made)  # for its owner to remove
    return Corpus.open(folder, s, order)


# ------------------------------------------------------------------------------------- batches


@functools.lru_cache(maxsize=8)
def shuffled(rows: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows)


def draw(rows: int, count: int, step: int, seed: tuple[int, ...]) -> list[int]:
    """Which of the rows step number `step` takes: shuffled epochs, one after another."""
    places = (divmod(place, rows) for place in range(step * count, (step + 1) * count))
    return [shuffled(rows, (*seed, epoch))[place] for epoch, place in places]


def make_batch(corpus: Corpus, s: Settings, dictionary: np.ndarray, step: int) -> Batch:
    """Step number `step`'s batch: half original, half derived; with XLM, half of it pairs."""
    pairs = s.batch // 2 if s.objective == "xlm" else 0
    half = (s.batch - pairs) // 2
    original = corpus.original[draw(len(corpus.original), half, step, (s.seed, 1))]
    derived = corpus.derived[draw(len(corpus.derived), half, step, (s.seed, 2))]
    tokens = np.concatenate([original, derived])
    languages = np.repeat([[0], [1]], half, axis=0) + np.zeros_like(tokens)
    positions = np.zeros_like(tokens) + np.arange(s.positions)
    if pairs:
        sides = [a.reshape(-1, s.positions // 2) for a in (corpus.counterpart, corpus.derived)]
        parallel = math.ceil(s.parallel_share * len(sides[0]))
        rows = draw(parallel, pairs, step, (s.seed, 3))
        paired = pair_translations(sides[0][rows], sides[1][rows])
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
    """AdamW; weight decay on matrices alone, as BERT has it."""
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
        tensors[name] = parameter.detach()
        for kind, tensor in optimizer.state[parameter].items():
            tensors[f"{kind} {name}"] = tensor
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
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
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            print(f"{path}: damaged ({error}): going on from the one before", file=sys.stderr)
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
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))
    return open(path, "a")


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM go into a list, so that the step can be finished and saved."""
    noted = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda n, _: noted.append(n)) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def pretrain(
    corpus: Corpus, s: Settings, folder: Path, device: str,
    save_every: int, accumulate: int, compiled: bool,
) -> None:  # fmt: skip
    """Train to the last step, from wherever `folder`'s checkpoints are; writes folder/model.

    accumulate: in how many slices a batch is computed, one after another, to need less memory.
    """
    torch.manual_seed(s.seed)
    model = MaskedLM(s).to(device)
    optimizer = make_optimizer(model, s)
    start, skipped = load_checkpoint(folder, model, optimizer)
    pairs = make_dictionary(s)
    dictionary = torch.from_numpy(pairs).to(device)
    network = torch.compile(model) if compiled else model
    if WORLD > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
    share = s.batch // (WORLD * accumulate)
    firsts = range(RANK * accumulate * share, (RANK + 1) * accumulate * share, share)
    model.train()

    losses, skips, streak = torch.zeros(2, device=device), 0, 0
    clock, logged = time.perf_counter(), start
    quiet = RANK > 0 or "TQDM_DISABLE" in os.environ
    with (
        tqdm(total=s.steps, initial=start, disable=quiet, unit="step", mininterval=1) as bar,
        noted_signals() as signals,
        ThreadPoolExecutor(1) as ahead,
        open_log(folder / "log.jsonl", start) as log,
    ):
        upcoming = ahead.submit(make_batch, corpus, s, pairs, start)
        for step in range(start, s.steps):
            batch = upcoming.result()
            upcoming = ahead.submit(make_batch, corpus, s, pairs, step + 1)
            torch.manual_seed(hash((s.seed, step, RANK)))  # of dropout
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, s)
            for first in firsts:
                part = batch.to(device, slice(first, first + share))
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
            done = step + 1
            bar.update()

            last = done == s.steps
            if not (done % LOG_EVERY == 0 or done % save_every == 0 or last or signals):
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
            if streak >= MAX_STREAK:
                raise ValueError(
                    f"{folder}: no finite gradient in {MAX_STREAK} steps in a row, up to step "
                    f"{done}: try a lower --rate in a new folder (the last checkpoint is good)"
                )
            losses.zero_()
            clock, logged = time.perf_counter(), done
            if RANK == 0 and not last and (done % save_every == 0 or signals):
                save_checkpoint(folder, done, line["skipped"], model, optimizer)
            if signals and not last:
                sys.exit(128 + signals[0])
    if RANK == 0:
        to_hf(model, folder / "model")
        for path in folder.glob("checkpoint-*"):
            path.unlink()


# ------------------------------------------------------------------------------------- command


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
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--accumulate", type=int, default=1, help="slices of a batch (%(default)s)")
    parser.add_argument("--save-every", type=int, default=1000, help="steps (%(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="(%(default)s)")
    group = parser.add_argument_group("settings of the experiment (default: the preset's)")
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction)
        else:
            group.add_argument(name, type=field.type, metavar=field.type.__name__)


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
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }


def refuse_other(path: Path, record: dict) -> None:
    """A folder's settings stay what they were: ValueError with those that now differ."""
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text())
        thens = {part: dict(there[part]) for part in ("settings", "source", "corpus")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}): use a new folder") from error
    for part, then in thens.items():
        now = json.loads(json.dumps(record[part]))
        differ = [f"{k} {then.get(k)} (now {now[k]})" for k in now if then.get(k) != now[k]]
        if differ:
            raise ValueError(f"{path}: has other settings: {', '.join(differ)}: use a new folder")


def guarded(main) -> None:
    """Run a command; what its user can mend is one line on stderr and exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename:
            line = f"{error.filename}: {error.strerror}: check the path, its rights and free space"
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(2)


def run(
    folder: Path, s: Settings, source: Source, device: str,
    save_every: int = 1000, accumulate: int = 1, compiled: bool = False,
) -> None:  # fmt: skip
    """Everything from the text to folder/model, or as much of it as is still to be done."""
    if min(save_every, accumulate) < 1:
        raise ValueError("--save-every and --accumulate must be at least 1")
    if s.batch % (WORLD * accumulate):
        raise ValueError(f"batch {s.batch} cannot be cut into {WORLD * accumulate} equal slices")
    record = record_of(s, source)
    refuse_other(folder / "settings.json", record)
    if (folder / "model" / "config.json").exists():
        return
    if RANK > 0:  # the first process makes the corpus, the others find it made
        torch.distributed.barrier()
    corpus = prepare(source, s, folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        if not (folder / "tokenizer.model").exists():  # a second name for the corpus's, for eval.py
            os.link(folder.parent / corpus_name(source, s) / "tokenizer.model",
                    folder / "tokenizer.model")  # fmt: skip
        write_text(folder / "settings.json", json.dumps(record, indent=2) + "\n")
        if WORLD > 1:
            torch.distributed.barrier()
    pretrain(corpus, s, folder, device, save_every, accumulate, compiled)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the run; the corpus is made beside it")
    add_options(parser)
    args = parser.parse_args()
    s = preset(args.preset, **given_settings(args))
    if args.threads:
        torch.set_num_threads(args.threads)
    if WORLD > 1:
        torch.distributed.init_process_group("gloo" if args.device == "cpu" else "nccl")
    if WORLD > 1 and args.device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    run(
        args.folder, s, source_of(args), args.device,
        save_every=args.save_every, accumulate=args.accumulate, compiled=args.compile,
    )  # fmt: skip
    print(f"{args.folder}: trained")


if __name__ == "__main__":
    guarded(main)
