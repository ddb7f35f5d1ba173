"""Pre-train on an original language and one derived from it.

    python train.py runs/align --objective align --preset tiny
    python train.py runs/ewt --corpus books.txt --treebank en_ewt-ud-train.conllu --preset small
    torchrun --nproc-per-node 8 train.py runs/big --preset paper --corpus wiki.txt

The text is the built-in language of synth_lang.py, or plain text (--corpus), trees (--treebank), or
both. It is tokenised once, into a folder that all runs over the same text share. A run's folder
holds settings.json, log.jsonl, the newest checkpoints, and at the end model/, which eval.py and
transformers open. The same command again goes on from the last checkpoint.

Everything random in step i is a function of (seed, i) alone. A checkpoint therefore needs no state
of any generator, and neither where a run was stopped nor how many processes shared it shows.
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
from safetensors.torch import save_file
from tqdm import tqdm

import synth_lang
from alignmlm import BOS, EOS, PAD, PRESETS, SPECIALS, Batch, MaskedLM, Settings
from alignmlm import (
    ask_translations,
    make_dictionary,
    mask_tokens,
    pair_translations,
    preset,
    to_hf,
)

# ------------------------------------------------------------------------------ text to arrays

LANGUAGES = "original", "derived"
BLOCK = 1_000  # sentences: the original language has every other block, the derived one the rest


@dataclass(frozen=True)
class Source:
    """Where the text comes from; the built-in language if no file is given."""

    corpus: tuple[str, ...] = ()
    treebank: tuple[str, ...] = ()
    order: str | None = None  # treebank of the language whose order `syntax` borrows
    sentences: int = 100_000  # of the built-in language

    def read(self) -> Iterator[synth_lang.Sentence]:
        if not (self.corpus or self.treebank):
            yield from synth_lang.generate(self.sentences, seed=0)
        for path in self.treebank:
            yield from synth_lang.read_conllu(path)
        for path in self.corpus:
            yield from synth_lang.read_text(path)


class Tokenizer:
    """SentencePiece, a word at a time, so that no sub-word depends on the word's neighbours."""

    def __init__(self, path: str | Path):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.unknown = self.pieces.unk_id()

    @functools.lru_cache(maxsize=1 << 20)  # noqa: B019  one per process, as long-lived as it
    def encode(self, word: str) -> list[int]:
        """Ids of one word of the original language, at least one; all are SPECIALS or greater."""
        return self.pieces.encode(word) or [self.unknown]


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


class Packer:
    """Sentences into a file of rows of `length` int32 ids, with nothing padded.

    A row is BOS and the running text, every sentence closed by EOS; a sentence that a row's end
    cuts goes on in the next, and what is left at the end is dropped. A text and its counterpart
    stay side by side in their two files, since their sentences have equal lengths.
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


class Languages:
    """From the original language's words to either language's ids.

    A derived id is its original id moved by the settings' shift, which is the transformation
    "transliterate"; all others act on words, before they are cut into sub-words.
    """

    def __init__(self, tokenizer: Tokenizer, s: Settings, order=None):
        self.tokenizer, self.shift, self.order = tokenizer, s.shift, order
        names = synth_lang.parse_transform(s.transform)
        self.names = tuple(name for name in names if name != "transliterate")

    def derive(self, sentence: synth_lang.Sentence, index: int) -> synth_lang.Sentence:
        """Words, labels and trees in the derived order; index seeds the random ones."""
        return synth_lang.transform(sentence, self.names, index=index, order=self.order)[0]

    def encode(self, words: list[str], derived: bool) -> list[list[int]]:
        """The ids of each word."""
        shift = self.shift if derived else 0
        return [[id + shift for id in self.tokenizer.encode(word)] for word in words]


@dataclass
class Corpus:
    """Token ids on disk, memory-mapped; derived ones already shifted."""

    languages: Languages
    original: np.ndarray  # (n, T) int32, from one half of the text
    derived: np.ndarray  # (m, T) int32, from the other
    pairs: tuple[np.ndarray, np.ndarray]  # (p, T / 2) int32 each: that other half, and it derived

    @staticmethod
    def open(folder: Path, s: Settings, order) -> "Corpus":
        def rows(name, width):
            return np.memmap(folder / f"{name}.bin", np.int32, "r").reshape(-1, width)

        halves = [rows(f"pairs_{name}", s.positions // 2) for name in LANGUAGES]
        return Corpus(
            Languages(Tokenizer(folder / "tokenizer.model"), s, order),
            *(rows(name, s.positions) for name in LANGUAGES),
            (halves[0], halves[1]),
        )


def prepare(source: Source, s: Settings, root: Path) -> Corpus:
    """The corpus of this text under this transformation, made on first use in a folder of root.

    The original language and the derived one come from different halves of the text. The folder
    appears whole or not at all, so several runs may start at once.
    """
    names = synth_lang.parse_transform(s.transform)
    files = [p for p in (*source.corpus, *source.treebank, source.order) if p]
    for path in files:
        if not Path(path).is_file():
            raise synth_lang.InputError(f"{path}: no such file: check the path")
    stamps = [(Path(p).stat().st_size, Path(p).stat().st_mtime_ns) for p in files]
    key = repr((source, stamps, names, s.vocab_size, s.positions))
    folder = root / f"data-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    order = synth_lang.learn_order(synth_lang.read_conllu(source.order)) if source.order else None
    if folder.exists():
        return Corpus.open(folder, s, order)

    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="making-data-") as made:
        made = Path(made)
        train_tokenizer(source.read(), s.pieces, made / "tokenizer.model")
        languages = Languages(Tokenizer(made / "tokenizer.model"), s, order)
        original, derived = (Packer(made / f"{n}.bin", s.positions) for n in LANGUAGES)
        pairs = [Packer(made / f"pairs_{n}.bin", s.positions // 2) for n in LANGUAGES]
        for index, sentence in enumerate(tqdm(source.read(), "tokenising", unit=" sentences")):
            ids = languages.encode(sentence.words, derived=False)
            if index // BLOCK % 2 == 0:
                original.add(ids)
            else:
                counterpart = languages.derive(sentence, index).words
                counterpart = languages.encode(counterpart, derived=True)
                derived.add(counterpart)
                pairs[0].add(ids)
                pairs[1].add(counterpart)
        rows = [packer.close() for packer in (original, derived, *pairs)]
        if not all(rows):
            raise synth_lang.InputError(
                f"{', '.join(files) or 'the built-in language'}: too little text for a sequence of "
                f"{s.positions} tokens in each half ({BLOCK} sentences in turn): give more"
            )
        with contextlib.suppress(OSError):  # another run has just made the same
            os.rename(made, folder)
            made.mkdir()  # for its owner to remove
    return Corpus.open(folder, s, order)


# ------------------------------------------------------------------------------------- batches


@functools.lru_cache(maxsize=8)
def shuffled(rows: int, seed: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows)


def draw(array: np.ndarray, count: int, step: int, seed: tuple[int, ...]) -> np.ndarray:
    """Which rows step number `step` takes, `count` of them: shuffled epochs, one after another."""
    places = np.arange(step * count, (step + 1) * count)
    epochs, places = np.divmod(places, len(array))
    return np.array(
        [shuffled(len(array), (*seed, e))[p] for e, p in zip(epochs, places, strict=True)]
    )


def make_batch(corpus: Corpus, s: Settings, dictionary: np.ndarray, step: int) -> Batch:
    """Step number `step`'s batch: half original, half derived; with XLM, half of it pairs."""
    pairs = s.batch // 2 if s.objective == "xlm" else 0
    half = (s.batch - pairs) // 2
    original = corpus.original[draw(corpus.original, half, step, (s.seed, 1))]
    derived = corpus.derived[draw(corpus.derived, half, step, (s.seed, 2))]
    tokens = np.concatenate([original, derived])
    languages = np.repeat([[0], [1]], half, axis=0) + np.zeros_like(tokens)
    positions = np.zeros_like(tokens) + np.arange(s.positions)
    if pairs:
        parallel = corpus.pairs[0][: math.ceil(s.parallel_share * len(corpus.pairs[0]))]
        rows = draw(parallel, pairs, step, (s.seed, 3))
        paired = pair_translations(corpus.pairs[0][rows], corpus.pairs[1][rows])
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


def rate_at(step: int, s: Settings) -> float:
    """Linear warm-up to the peak, then linear decay to zero at the last step."""
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
    """Weights and optimizer after `step` steps, as one safetensors file; the last two are kept.

    The file is whole or absent: written under a temporary name, flushed to disk, then renamed. Its
    checksum lets a resume tell a damaged one, which safetensors alone would not.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        for kind, tensor in optimizer.state[parameter].items():
            tensors[f"{kind} {name}"] = tensor
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"step": str(step), "skipped": str(skipped), "crc32": checksum(tensors)}
    path = folder / f"checkpoint-{step:08d}.safetensors"
    save_file(tensors, f"{path}.part", metadata)
    descriptor = os.open(f"{path}.part", os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    os.replace(f"{path}.part", path)
    for old in sorted(folder.glob("checkpoint-*.safetensors"))[:-2]:
        old.unlink()


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return str(crc)


def load_checkpoint(folder: Path, model, optimizer) -> tuple[int, int]:
    """Go back to the newest undamaged checkpoint; returns its (step, skipped), or (0, 0)."""
    for path in sorted(folder.glob("checkpoint-*.safetensors"), reverse=True):
        try:
            with safe_open(path, "pt") as file:
                metadata, tensors = (
                    file.metadata(),
                    {
                        n: file.get_tensor(n)
                        for n in file.keys()  # noqa: SIM118
                    },
                )
            if checksum(tensors) != metadata["crc32"]:
                raise ValueError("its checksum is wrong")
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            print(f"{path}: damaged, the one before it is used ({error})", file=sys.stderr)
            continue
        for name, parameter in model.named_parameters():
            parameter.data.copy_(tensors[name])
            kinds = ("step", "exp_avg", "exp_avg_sq")
            device = parameter.device
            optimizer.state[parameter] = {k: tensors[f"{k} {name}"].to(device) for k in kinds}
        return int(metadata["step"]), int(metadata["skipped"])
    return 0, 0


def trim_log(path: Path, step: int) -> None:
    """Take out the lines beyond the checkpoint that training goes on from."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".part")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)


def pretrain(
    corpus: Corpus, s: Settings, folder: Path, device: str,
    save_every: int = 1000, accumulate: int = 1, compiled: bool = False,
) -> None:  # fmt: skip
    """Train to the last step, from wherever `folder`'s checkpoints are; writes folder/model.

    accumulate: in how many slices a batch is computed, one after another, to need less memory.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(s.seed)
    model = MaskedLM(s).to(device)
    optimizer = make_optimizer(model, s)
    start, skipped = load_checkpoint(folder, model, optimizer)
    if rank == 0:
        trim_log(folder / "log.jsonl", start)
    pairs = make_dictionary(s)
    dictionary = torch.from_numpy(pairs).to(device)
    network = torch.compile(model) if compiled else model
    if world > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
    model.train()

    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: signals.append(received))
    share = s.batch // (world * accumulate)
    slices = [
        slice(first * share, (first + 1) * share)
        for first in range(rank * accumulate, (rank + 1) * accumulate)
    ]
    total_loss, total_mlm, skips, streak = (torch.zeros((), device=device) for _ in range(4))
    clock, logged = time.perf_counter(), start
    bar = tqdm(total=s.steps, initial=start, disable=rank > 0, unit="step", mininterval=1)
    with ThreadPoolExecutor(1) as ahead, open(folder / "log.jsonl", "a") as log:
        upcoming = ahead.submit(make_batch, corpus, s, pairs, start)
        for step in range(start, s.steps):
            batch = upcoming.result()
            upcoming = ahead.submit(make_batch, corpus, s, pairs, step + 1)
            torch.manual_seed(hash((s.seed, step, rank)))  # of dropout
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, s)
            for part in slices:
                with torch.autocast("cuda", torch.bfloat16, enabled=device != "cpu"):
                    loss, mlm = network(batch.to(device, part), dictionary)
                (loss / len(slices)).backward()
                total_loss += loss.detach() / len(slices)
                total_mlm += mlm / len(slices)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            # A fused optimizer leaves a step out by itself; to ask for the value here would wait.
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()
            optimizer.zero_grad()
            skips += optimizer.found_inf
            streak = (streak + 1) * optimizer.found_inf
            done = step + 1
            bar.update()

            if done % LOG_EVERY and done < s.steps and not signals:
                continue
            if rank == 0:
                speed = (done - logged) * s.batch * s.positions / (time.perf_counter() - clock)
                line = {
                    "step": done,
                    "loss": total_loss.item() / (done - logged),
                    "mlm": total_mlm.item() / (done - logged),
                    "rate": rate_at(step, s),
                    "tokens_per_second": round(speed),
                    "skipped": skipped + int(skips.item()),
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix(mlm=f"{line['mlm']:.3f}", tokens_s=f"{speed:,.0f}")
            if streak >= MAX_STREAK:
                raise ValueError(
                    f"{folder}: no finite gradient in {MAX_STREAK} steps in a row, up to step "
                    f"{done}: try a lower --rate in a new folder (the last checkpoint is good)"
                )
            total_loss.zero_()
            total_mlm.zero_()
            clock, logged = time.perf_counter(), done
            if rank == 0 and (done % save_every == 0 or signals) and done < s.steps:
                save_checkpoint(folder, done, skipped + int(skips.item()), model, optimizer)
            if signals:
                sys.exit(128 + signals[0])
    if rank == 0:
        to_hf(model, folder / "model")
        for path in folder.glob("checkpoint-*"):
            path.unlink()


# ------------------------------------------------------------------------------------- command


def add_options(parser: argparse.ArgumentParser) -> None:
    """Text, machine, --preset, and one option for every setting, to change it."""
    parser.add_argument("--corpus", nargs="*", default=[], metavar="TEXT", help="plain text")
    parser.add_argument("--treebank", nargs="*", default=[], metavar="CONLLU", help="trees")
    parser.add_argument("--order", metavar="CONLLU", help="`syntax` takes its word order from this")
    parser.add_argument(
        "--sentences",
        type=int,
        default=Source.sentences,
        help="of the built-in language (%(default)s)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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


def refuse_other(path: Path, record: dict) -> None:
    """A folder's settings stay what they were: ValueError with those that now differ."""
    if not path.exists():
        return
    there = json.loads(path.read_text())
    for part in ("settings", "source"):
        now, then = json.loads(json.dumps(record[part])), there[part]
        differ = [f"{k} {then.get(k)} (now {now[k]})" for k in now if then.get(k) != now[k]]
        if differ:
            raise ValueError(f"{path}: has other settings: {', '.join(differ)}: use a new folder")


def write_json(path: Path, value) -> None:
    """All or nothing: under a temporary name, then renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def guarded(main) -> None:
    """Run a command; what its user can mend is one line on stderr and exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def run(folder: Path, s: Settings, source: Source, device: str, **options) -> None:
    """Everything from the text to folder/model, or as much of it as is still to be done."""
    record = {
        "settings": dataclasses.asdict(s),
        "source": dataclasses.asdict(source),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    refuse_other(folder / "settings.json", record)
    if (folder / "model" / "config.json").exists():
        return
    corpus = prepare(source, s, folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", record)
    pretrain(corpus, s, folder, device, **options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="of this run; its parent keeps the shared corpora"
    )
    add_options(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    s = preset(args.preset, **given_settings(args))
    run(
        args.folder, s, source_of(args), args.device,
        save_every=args.save_every, accumulate=args.accumulate, compiled=args.compile,
    )  # fmt: skip
    print(f"{args.folder}: trained")


if __name__ == "__main__":
    guarded(main)
