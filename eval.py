"""Fine-tune a pre-trained model in one language, test it in both, and report.

    python eval.py pos runs/align         a task of one run: pos, ner or nli
    python eval.py grid --out runs/tiny   every objective, transformation and seed, and the report
    python eval.py report runs/tiny       tables, figures and results.json of finished runs

The measures are the paper's. BZ, bilingual zero-shot: fine-tuned on the original language, tested
on the derived one. BS, bilingual supervised: fine-tuned and tested on the derived one. Delta = BZ -
BS is what zero-shot costs. "source" is fine-tuned and tested on the original language. "BZ rotated"
is BZ after `alignmlm.rotate`, for which nothing more is trained.
"""

import copy
import dataclasses
import io
import itertools
import json
import os
import sys
import warnings
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import scipy.stats
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import synth_lang
import train
from alignmlm import BOS, EOS, OBJECTIVES, PAD, MaskedLM, Settings, alignment_score, derive_ids
from alignmlm import from_hf, make_dictionary, rotate, words_of_both, write_file

SILENT = -100  # the label of a token at which nothing is asked
TUNE_BATCH = 32  # rows in a step of fine-tuning, as in the paper
SCORES = ["source", "BS", "BZ", "Delta", "BZ rotated"]

# The paper's numbers for English: BS and BZ of NLI, NER and POS, and alignment, in percent.
PUBLISHED_COLUMNS = ["nli BS", "nli BZ", "ner BS", "ner BZ", "pos BS", "pos BZ", "alignment"]
PUBLISHED = {
    ("transliterate", "mlm"): [76.4, 74.9, 80.6, 78.0, 95.0, 94.6, 90.0],
    ("transliterate+invert", "mlm"): [73.9, 56.7, 79.2, 35.9, 95.0, 56.5, 0.3],
    ("transliterate+syntax", "mlm"): [73.5, 69.0, 71.3, 52.3, 93.6, 91.6, 57.3],
    ("transliterate", "xlm"): [77.3, 77.5, 80.8, 79.7, 95.0, 94.8, 97.7],
    ("transliterate+invert", "xlm"): [75.4, 67.2, 80.0, 60.7, 95.0, 61.8, 85.6],
    ("transliterate+syntax", "xlm"): [76.1, 74.1, 71.5, 59.6, 93.7, 92.7, 98.6],
    ("transliterate", "dict"): [77.0, 75.9, 79.3, 78.3, 95.1, 94.8, 95.7],
    ("transliterate+invert", "dict"): [74.5, 65.3, 79.1, 59.8, 95.0, 76.0, 64.2],
    ("transliterate+syntax", "dict"): [74.3, 72.2, 71.4, 57.6, 93.6, 92.6, 93.7],
    ("transliterate", "align"): [75.1, 75.5, 79.4, 78.6, 94.9, 94.8, 98.4],
    ("transliterate+invert", "align"): [75.5, 68.8, 80.0, 64.5, 95.0, 92.0, 95.2],
    ("transliterate+syntax", "align"): [74.7, 71.1, 71.3, 58.3, 93.7, 92.9, 98.2],
}


# --------------------------------------------------------------------------------------- tasks
class Task:
    """What is asked of each word of a sentence. The other tasks differ in a method or two."""

    measure = "accuracy"
    counts = 6_000, 1_000  # examples of the built-in language to learn from, and to test on
    generate = staticmethod(synth_lang.generate)
    read = staticmethod(synth_lang.read_conllu)

    def labels_of(self, example):
        """The names of the example's labels, one a word."""
        return example.upos

    def row(self, example, to_language):
        """Token ids and their labels, a name each or None, without the EOS at the end.

        to_language turns a sentence into itself in one of the languages and the ids of its words.
        A label is asked for at the first sub-word of its word."""
        sentence, words = to_language(example)
        tokens, labels = [BOS], [None]
        for ids, label in zip(words, self.labels_of(sentence), strict=True):
            tokens += ids
            labels += [label] + [None] * (len(ids) - 1)
        return tokens, labels

    def score(self, answers):
        """In percent, of (right, found) pairs: the labels of a row, as lists of names."""
        right = found = 0
        for gold, answer in answers:
            right += sum(map(str.__eq__, gold, answer))
            found += len(gold)
        return 100 * right / found


class Ner(Task):
    """Named entities as BIO tags."""

    measure = "F1"  # of whole entities, as CoNLL-2003 counts
    read = staticmethod(synth_lang.read_bio)

    def labels_of(self, example):
        return example.entities

    def score(self, answers):
        both = either = 0
        for gold, answer in answers:
            gold, answer = entities(gold), entities(answer)
            both += len(gold & answer)
            either += len(gold) + len(answer)
        return 200 * both / max(either, 1)


def entities(tags):
    """The entities in BIO tags, well-formed or not: a set of (type, first word, last word + 1)."""
    found = set()
    start, previous = 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        # An I- tag that continues nothing of its type begins an entity, as in CoNLL-2003.
        if tag.startswith("B-") or tag[2:] != previous[2:]:
            if previous != "O":
                found.add((previous[2:], start, place))
            start = place
        previous = tag
    return found


class Nli(Task):
    """Natural language inference: one label, asked for at BOS of BOS premise EOS hypothesis EOS."""

    counts = 20_000, 1_000
    generate = staticmethod(synth_lang.generate_inferences)
    read = staticmethod(synth_lang.read_inferences)

    def labels_of(self, example):
        return [example.label]

    def row(self, example, to_language):
        tokens = [BOS]
        for words in (to_language(example.premise)[1], to_language(example.hypothesis)[1]):
            tokens += [EOS] * (len(tokens) > 1) + list(itertools.chain(*words))
        return tokens, [example.label] + [None] * (len(tokens) - 1)


TASKS = {"pos": Task(), "ner": Ner(), "nli": Nli()}


def read_examples(task, files):
    """The examples to learn from and those to test on; built-in ones where a file is None."""
    parts = []
    for part, path in enumerate(files):
        if path is None:
            parts.append(list(task.generate(task.counts[part], seed=part + 1)))
        else:
            parts.append(list(task.read(path)))
    return parts


def make_rows(task, examples, languages, s, derived):
    """The rows of examples in one language: (tokens (T,) int64, names of labels or None) each."""
    lost = 0
    rows = []
    for index, example in enumerate(examples):

        def to_language(sentence, index=index):
            if derived:
                sentence = languages.derive(sentence, index)
            return sentence, [languages.encode(word) for word in sentence.words]

        tokens, labels = task.row(example, to_language)
        room = min(s.tune_length, s.positions) - 1
        lost += len(tokens) > room
        ids = np.array([*tokens[:room], EOS])
        rows.append((derive_ids(ids, s) if derived else ids, [*labels[:room], None]))
    if lost:
        print(f"{lost} of {len(rows)} rows are cut to {room + 1} tokens", file=sys.stderr)
    return rows


# ---------------------------------------------------------------------------------- fine-tuning
class Tagger(nn.Module):
    """The encoder and a linear layer on its hidden states, the head of every task."""

    def __init__(self, encoder, names):
        super().__init__()
        self.encoder = encoder
        self.names = names
        self.classifier = nn.Linear(encoder.settings.width, len(names))

    def forward(self, tokens, language):
        """tokens (B, T) int64, padded -> logits (B, T, names)."""
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            languages = torch.full_like(tokens, language)
            seen = (tokens != PAD)[:, None, None, :]
            hidden = self.encoder.encode(tokens, languages, attention_mask=seen)
            hidden = F.dropout(hidden, self.encoder.settings.dropout, self.training)
            return self.classifier(hidden).float()


def batches(rows, order):
    """Rows in this order, TUNE_BATCH at a time, of about equal length: little is padding."""
    lengths = np.array([len(tokens) for tokens, _ in rows])
    for pool in np.array_split(order, max(1, len(order) // (16 * TUNE_BATCH))):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        for start in range(0, len(pool), TUNE_BATCH):
            yield [rows[i] for i in pool[start : start + TUNE_BATCH]]


def pad(rows, device):
    tokens = [torch.from_numpy(tokens) for tokens, _ in rows]
    return pad_sequence(tokens, batch_first=True, padding_value=PAD).to(device)


def fine_tune(model, rows, names, language):
    """A Tagger trained on rows of a language; the model that is given stays as it was."""
    s, device = model.settings, model.head_bias.device
    torch.manual_seed(s.seed)
    rng = np.random.default_rng([s.seed, 5])
    tagger = Tagger(copy.deepcopy(model), names).to(device).train()
    tagger.encoder.word_embeddings.weight.requires_grad_(not s.freeze_embeddings)
    optimizers = train.make_optimizers(tagger, dataclasses.replace(s, optimizer="adamw"), s.tune_rate)
    epochs = [list(batches(rows, rng.permutation(len(rows)))) for _ in range(s.tune_epochs)]
    steps = [batch for epoch in epochs for batch in epoch]
    schedule = dataclasses.replace(s, steps=len(steps), warmup=-(-len(steps) // 10), decay_share=1)
    number = {name: i for i, name in enumerate(names)}
    for step, batch in enumerate(steps):
        labels = [torch.tensor([number.get(name, SILENT) for name in row]) for _, row in batch]
        labels = pad_sequence(labels, batch_first=True, padding_value=SILENT).to(device)
        logits = tagger(pad(batch, device), language)
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=SILENT).backward()
        train.update(tagger, optimizers, train.schedule(step, schedule))
    return tagger.eval()


@torch.no_grad()
def measure(tagger, task, rows, language):
    """The task's score, in percent, on rows of a language."""
    answers = []
    for batch in batches(rows, np.arange(len(rows))):
        found = tagger(pad(batch, tagger.classifier.weight.device), language).argmax(2).cpu()
        for (_, labels), said in zip(batch, found, strict=True):
            asked = [place for place, label in enumerate(labels) if label is not None]
            answers.append((
                [labels[place] for place in asked], [tagger.names[said[place]] for place in asked]
            ))  # fmt: skip
    return task.score(answers)


def read_run(folder):
    """The model and the Languages of a finished run. Raises ValueError if it is not one."""
    path = folder / "settings.json"
    try:
        s = Settings(**json.loads(path.read_text())["settings"])
        return from_hf(folder / "model", s), train.Languages(folder, s)
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no finished run of train.py: {error}") from error


def evaluate(folder, name, files, device):
    """Fine-tune and test a run on a task and write folder/NAME.json; returns what it holds."""
    task = TASKS[name]
    model, languages = read_run(folder)
    model.to(device)
    s = model.settings
    learn, test = read_examples(task, files)
    names = sorted({label for example in learn for label in task.labels_of(example)})
    unknown = {label for example in test for label in task.labels_of(example)} - set(names)
    if unknown:
        print(f"{files[1]}: {min(unknown)} is not in {files[0]}: counted as wrong", file=sys.stderr)
    zero_shot = fine_tune(model, make_rows(task, learn, languages, s, False), names, 0)
    supervised = fine_tune(model, make_rows(task, learn, languages, s, True), names, 1)
    original = make_rows(task, test, languages, s, False)
    derived = make_rows(task, test, languages, s, True)
    cell = {"task": name, "objective": s.objective, "transform": s.transform, "seed": s.seed}
    cell["source"] = measure(zero_shot, task, original, 0)
    cell["BS"] = measure(supervised, task, derived, 1)
    cell["BZ"] = measure(zero_shot, task, derived, 1)
    cell["Delta"] = cell["BZ"] - cell["BS"]
    dictionary = make_dictionary(s)
    turned = rotate(model, dictionary)
    # The rows of the derived words alone: fine-tuning may have changed the others.
    with torch.no_grad():
        rows = turned.word_embeddings.weight[s.language_size :]
        zero_shot.encoder.word_embeddings.weight[s.language_size :] = rows
    cell["BZ rotated"] = measure(zero_shot, task, derived, 0)
    for prefix, scored in (("", model), (" rotated", turned)):
        for words, share in alignment_score(scored, dictionary).items():
            cell[f"alignment {words}{prefix}"] = share
    cell["settings"] = dataclasses.asdict(s)
    train.write_file(folder / f"{name}.json", json.dumps(cell, indent=2).encode())
    return cell

# -------------------------------------------------------------------------------------- report
def read_cells(folder):
    """The cells of all finished runs below a folder, one a row of a DataFrame, in a fixed order."""
    cells = []
    for path in sorted(folder.glob("*/*.json")):
        if path.stem in TASKS:
            cell = json.loads(path.read_text())
            cells.append(cell | {"run": path.parent} | cell["settings"])
    if not cells:
        raise ValueError(f"{folder}: holds no finished run: nothing to report")
    table = pd.DataFrame(cells)
    table["objective"] = pd.Categorical(table["objective"], OBJECTIVES, ordered=True)
    # An ablation: what varies, beside what every grid varies, tells the rows apart.
    for name in Settings.__dataclass_fields__:
        if name not in ("objective", "transform", "seed") and table[name].nunique() > 1:
            table["transform"] += f", {name} " + table[name].astype(str)
    return table.sort_values(["task", "transform", "objective", "seed"], ignore_index=True)


def correlation(alignment, delta):
    """Spearman's rho of alignment and -Delta, its p by permutation, and the middle 95 % of rho over
    bootstrap samples; a sentence for the report. Source: the paper, for rho and p."""
    # Rounded, so that rounding errors of BZ - BS break no tie.
    x, y = np.array(alignment), -np.round(delta, 6)

    def rho(x, y):
        return scipy.stats.spearmanr(x, y).statistic

    rng = np.random.default_rng(0)
    p = scipy.stats.permutation_test(
        (x,), lambda x: rho(x, y), permutation_type="pairings", n_resamples=5_000, rng=rng
    ).pvalue
    samples = rng.integers(len(x), size=(1_000, len(x)))
    with warnings.catch_warnings(action="ignore"):  # rho is not defined if all values are equal.
        low, high = np.nanpercentile([rho(x[i], y[i]) for i in samples], [2.5, 97.5])
    return (f"Spearman's rho of alignment and -Delta: {rho(x, y):.3f} (p = {p:.2g}, {len(x)} rows, "
            f"95 % of bootstrap samples {low:.2f} to {high:.2f})")  # fmt: skip


def spread(values):
    """Mean and standard deviation over seeds, or a dash for what is not defined."""
    deviation = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return "-" if values.isna().any() else f"{values.mean():.1f}{deviation}"


def markdown(name, cells):
    """The cells of a task as a table in the paper's layout, its numbers at the right."""
    columns = [*SCORES, "alignment all", "alignment outside", "alignment outside rotated"]
    heads = ["transformation", "objective", "seeds", *columns, "paper: BS", "BZ", "alignment"]
    lines = [f"{name.upper()}, {TASKS[name].measure}:\n", " | ".join(heads)]
    lines.append(" | ".join(["---"] * 2 + ["---:"] * (len(heads) - 2)))
    groups = cells.groupby(["transform", "objective"], observed=True)
    for (transform, objective), same in groups:
        published = dict(zip(PUBLISHED_COLUMNS, PUBLISHED.get((transform, objective), ())))
        row = [transform, OBJECTIVES[objective].label, len(same)]
        row += [spread(same[column]) for column in columns]
        row += [published.get(f"{name} {score}", "-") for score in ("BS", "BZ")]
        lines.append(" | ".join(map(str, [*row, published.get("alignment", "-")])))
    text = "\n".join([lines[0], *(f"| {line} |" for line in lines[1:])])
    means = groups[["alignment all", "Delta"]].mean()
    if len(means) > 2:
        text += f"\n\n{correlation(means['alignment all'], means['Delta'])}."
    return text + "\n"


def panels(titles):
    figure = Figure(figsize=(1 + 4 * len(titles), 3.6), layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize="medium")
    return figure, axes


def save(figure, path):
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    write_file(path, data.getvalue())


def draw_scores(name, cells, path):
    """BS and BZ of every objective, a panel a transformation; a dot is a seed."""
    transforms = list(cells["transform"].unique())
    figure, axes = panels(transforms)
    for transform, axis in zip(transforms, axes, strict=True):
        same = cells[cells["transform"] == transform]
        means = same.groupby("objective", observed=True)[["BS", "BZ"]].mean()
        means.rename(index=lambda o: OBJECTIVES[o].label).plot.bar(ax=axis, rot=0, color=["0.8", "C0"])
        for bar, score in ((-0.13, "BS"), (0.13, "BZ")):
            places = same["objective"].cat.remove_unused_categories().cat.codes + bar
            axis.plot(places, same[score], "k.")
        axis.set_xlabel("")
        axis.set_ylabel(f"{name.upper()} {TASKS[name].measure}, %")
    save(figure, path)


def draw_training(cells, path):
    """Alignment outside of D along pre-training, a line an objective, the mean over its seeds."""
    transforms = list(cells["transform"].unique())
    figure, axes = panels(transforms)
    for transform, axis in zip(transforms, axes, strict=True):
        same = cells[cells["transform"] == transform]
        for objective, runs in same.groupby("objective", observed=True)["run"]:
            logs = [pd.read_json(run / "log.jsonl", lines=True) for run in runs.unique()]
            lines = pd.concat(logs).groupby("step")["outside"]
            axis.plot(lines.mean(), label=OBJECTIVES[objective].label)
        axis.set_xlabel("step of pre-training")
        axis.set_ylabel("alignment outside of D, %")
        axis.legend()
    save(figure, path)


def draw_words(cells, path, count=30):
    """The most frequent words of both languages in the plane of their first two principal
    components, before and after pre-training; a line joins the two of a pair."""
    runs = cells.drop_duplicates("objective").set_index("objective")["run"]
    models = {OBJECTIVES[objective].label: read_run(run)[0] for objective, run in runs.items()}
    last = list(models.values())[-1]
    torch.manual_seed(last.settings.seed)
    figure, axes = panels(["before pre-training", *models])
    for axis, model in zip(axes, [MaskedLM(last.settings), *models.values()], strict=True):
        original, derived = [words.detach()[:count] for words in words_of_both(model)]
        words = torch.cat([original, derived])
        words = words - words.mean(0)
        x, y = (words @ torch.linalg.svd(words).Vh[:2].T).T.numpy()
        axis.plot([x[:count], x[count:]], [y[:count], y[count:]], color="0.8", linewidth=0.8)
        axis.plot(x[:count], y[:count], "o", markersize=4, label="original")
        axis.plot(x[count:], y[count:], "x", markersize=4, label="derived")
    axes[0].legend()
    save(figure, path)


def report(folder, out):
    """Write results.json, report.md and figures of all finished cells; returns the tables."""
    cells = read_cells(folder)
    out.mkdir(parents=True, exist_ok=True)
    tasks = [name for name in TASKS if name in set(cells["task"])]
    text = ""
    for name in tasks:
        same = cells[cells["task"] == name]
        text += markdown(name, same) + "\n"
        draw_scores(name, same, out / f"{name}.png")
    draw_training(cells, out / "training.png")
    draw_words(cells, out / "words.png")
    write_file(out / "results.json", cells.drop(columns="run").to_json(orient="records", indent=1).encode())
    write_file(out / "report.md", text.encode())
    return text


# ---------------------------------------------------------------------------------------- grid
def run_cell(folder, s, source, tasks, args):
    """Train a run and evaluate it on every task, as far as it is not done; returns what failed."""
    try:
        train.run(folder, s, source, args)
        for name, files in tasks.items():
            if not (folder / f"{name}.json").exists():
                evaluate(folder, name, files, args.device)
    except Exception as error:  # The other cells are to go on.
        return f"{folder}: {error}"
    return ""


def grid_cells(args):
    """The Settings of every cell, by its folder, and the Source."""
    setting, *values = args.vary or ["seed"]
    kind = type(getattr(Settings, setting))
    cells = {}
    for transform, objective, seed in itertools.product(args.transforms, args.objectives, range(args.seeds)):
        for value in values or [seed]:
            name = f"{transform}-{objective}-{seed}" + (f"-{setting}={value}" if values else "")
            changes = {"transform": transform, "objective": objective, "seed": seed}
            cells[args.out / name], source = train.read_options(args, **changes | {setting: kind(value)})
    return cells, source


def grid(args):
    """Every objective under every transformation with every seed; what is finished is kept."""
    cells, source = grid_cells(args)
    files = itertools.zip_longest(args.train, args.test, fillvalue=None)
    tasks = dict(itertools.zip_longest(args.tasks, files, fillvalue=(None, None)))
    for s in {s.transform: s for s in cells.values()}.values():
        train.prepare(source, s, args.out)  # once, before processes would do it side by side
    os.environ["TQDM_DISABLE"] = "1"  # of the processes to come: one bar is enough
    backend = "loky"
    if args.scheduler:
        from dask.distributed import Client

        Client(args.scheduler)
        backend = "dask"
    jobs = [joblib.delayed(run_cell)(folder, s, source, tasks, args) for folder, s in cells.items()]
    failures = []
    with joblib.parallel_config(backend, n_jobs=args.jobs):
        for failure in tqdm(joblib.Parallel(return_as="generator_unordered")(jobs), "cells", len(jobs)):
            failures += [failure] if failure else []
    for failure in failures:
        print(failure, file=sys.stderr)
    print(report(args.out, args.results or args.out))
    if failures:
        raise ValueError(f"{len(failures)} of {len(cells)} cells failed: the same command goes on")


def main():
    parser = synth_lang.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in TASKS:
        one = commands.add_parser(name, help=f"fine-tune and test one run on {name.upper()}")
        one.add_argument("folder", type=Path, help="of a run of train.py")
        one.add_argument("--train", metavar="FILE", help="examples to learn from (built-in ones)")
        one.add_argument("--test", metavar="FILE")
        one.add_argument("--device", default="cpu")
    several = commands.add_parser("report", help="tables and figures of finished runs")
    several.add_argument("folder", type=Path)
    every = commands.add_parser("grid", help="every objective, transformation and seed")
    every.add_argument("--out", type=Path, default=Path("runs/tiny"))
    every.add_argument("--tasks", nargs="+", choices=TASKS, default=["pos"])
    every.add_argument("--train", nargs="+", metavar="FILE", default=[], help="of each task")
    every.add_argument("--test", nargs="+", metavar="FILE", default=[])
    every.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    every.add_argument("--transforms", nargs="+", default=["transliterate+invert"])
    every.add_argument("--seeds", type=int, default=2)
    every.add_argument("--vary", nargs="+", metavar="SETTING VALUE", help="an ablation")
    every.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    every.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster to run them on")
    train.add_options(every)
    for command in (several, every):
        command.add_argument("--results", type=Path, help="folder to write to (the runs' own)")
    args = parser.parse_args()
    if args.command == "grid":
        grid(args)
    elif args.command == "report":
        print(report(args.folder, args.results or args.folder))
    else:
        cell = evaluate(args.folder, args.command, (args.train, args.test), args.device)
        print(json.dumps(cell, indent=2))


if __name__ == "__main__":
    train.guarded(main)
