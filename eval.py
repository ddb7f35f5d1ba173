"""Fine-tune a pre-trained model in one language, test it in both, and report.

    python eval.py pos runs/align         a task of one run: pos, ner or nli
    python eval.py grid --out runs/tiny   every objective, transformation and seed, and the report
    python eval.py report runs/tiny       tables, figures and results.json of finished runs

The measures are the paper's, in percent:

    source      fine-tuned and tested on the original language
    BS          bilingual supervised: fine-tuned and tested on the derived language
    BZ          bilingual zero-shot: fine-tuned on the original, tested on the derived language
    Delta       BZ - BS, what zero-shot costs
    BZ rotated  BZ after `alignmlm.rotate`, for which nothing more is trained
    alignment   the share of original words whose nearest derived word is their counterpart

The file goes from the tasks to fine-tuning, to the report, to the grid and the command line.
"""

import copy
import dataclasses
import io
import itertools
import json
import math
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

import joblib
import matplotlib
import numpy as np
import pandas as pd
import scipy.stats
import seaborn as sns
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import synth_lang
import train
from alignmlm import BOS, EOS, OBJECTIVES, PAD, MaskedLM, Settings, alignment_score, derive_ids
from alignmlm import from_hf, make_dictionary, rotate, words_of_both, write_file

SILENT = -100  # the label of a token at which nothing is asked
TUNE_BATCH = 32  # rows in a step of fine-tuning, as in the paper
COLUMNS = ["source", "BS", "BZ", "Delta", "BZ rotated"]
COLUMNS += ["alignment all", "alignment outside", "alignment outside rotated"]
BASELINES = {
    "chance": "Always saying the commonest label",
    "words alone": "A bag of words without a model (naive Bayes)",
}

# The paper's numbers, of English.
PUBLISHED = """
transform            objective  nli_BS nli_BZ  ner_BS ner_BZ  pos_BS pos_BZ  alignment
transliterate        MLM          76.4   74.9    80.6   78.0    95.0   94.6       90.0
transliterate+invert MLM          73.9   56.7    79.2   35.9    95.0   56.5        0.3
transliterate+syntax MLM          73.5   69.0    71.3   52.3    93.6   91.6       57.3
transliterate        XLM          77.3   77.5    80.8   79.7    95.0   94.8       97.7
transliterate+invert XLM          75.4   67.2    80.0   60.7    95.0   61.8       85.6
transliterate+syntax XLM          76.1   74.1    71.5   59.6    93.7   92.7       98.6
transliterate        DICT-MLM     77.0   75.9    79.3   78.3    95.1   94.8       95.7
transliterate+invert DICT-MLM     74.5   65.3    79.1   59.8    95.0   76.0       64.2
transliterate+syntax DICT-MLM     74.3   72.2    71.4   57.6    93.6   92.6       93.7
transliterate        ALIGN-MLM    75.1   75.5    79.4   78.6    94.9   94.8       98.4
transliterate+invert ALIGN-MLM    75.5   68.8    80.0   64.5    95.0   92.0       95.2
transliterate+syntax ALIGN-MLM    74.7   71.1    71.3   58.3    93.7   92.9       98.2
"""
PUBLISHED = pd.read_csv(io.StringIO(PUBLISHED), sep=r"\s+", index_col=["transform", "objective"])


# --------------------------------------------------------------------------------------- tasks
class Task:
    """Part-of-speech tags: a label is asked for at each word. Other tasks differ in a method."""

    title = "POS accuracy"
    counts = 6_000, 1_000  # examples of the built-in language to learn from, and to test on
    epochs_share = 1.0  # of the setting tune_epochs

    def generate(self, count, seed):
        return synth_lang.generate(count, seed)

    def read(self, path, language):
        return synth_lang.read_conllu(path)

    def labels_of(self, example):
        return example.upos

    def derive(self, example, languages, index):
        """The example in the derived order; index is the seed of what is random in it."""
        return languages.derive(example, index)

    def row(self, example, encode):
        """Token ids and labels, a name each or None, without the EOS at the end.

        encode gives the ids of a word. The label stands at the first sub-word of its word."""
        tokens, labels = [BOS], [None]
        for word, label in zip(example.words, self.labels_of(example), strict=True):
            ids = encode(word)
            tokens += ids
            labels += [label] + [None] * (len(ids) - 1)
        return tokens, labels

    def score(self, answers):
        """In percent. answers: of each row the right labels and those said, two lists of names."""
        right = asked = 0
        for gold, said in answers:
            right += sum(a == b for a, b in zip(gold, said, strict=True))
            asked += len(gold)
        return 100 * right / asked

    def baselines(self, learn, test):
        """Scores without a model: of always saying the commonest label."""
        labels = Counter()
        for example in learn:
            labels.update(self.labels_of(example))
        commonest = max(labels, key=labels.get)
        gold = [self.labels_of(example) for example in test]
        return {"chance": self.score([(row, [commonest] * len(row)) for row in gold])}


class Ner(Task):
    """Named entities, as BIO tags of the words."""

    title = "NER F1"  # of whole entities, as CoNLL-2003 counts

    def read(self, path, language):
        return synth_lang.read_bio(path)

    def labels_of(self, example):
        return example.entities

    def score(self, answers):
        both = either = 0
        for gold, said in answers:
            gold, said = entities(gold), entities(said)
            both += len(gold & said)
            either += len(gold) + len(said)
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

    title = "NLI accuracy"
    counts = 20_000, 1_000
    epochs_share = 0.5  # The paper fine-tunes for 5 epochs here, and for 10 in the other tasks.

    def generate(self, count, seed):
        return synth_lang.generate_inferences(count, seed)

    def read(self, path, language):
        return synth_lang.read_inferences(path, language)

    def labels_of(self, example):
        return [example.label]

    def derive(self, example, languages, index):
        premise = languages.derive(example.premise, index)
        hypothesis = languages.derive(example.hypothesis, index)
        return dataclasses.replace(example, premise=premise, hypothesis=hypothesis)

    def row(self, example, encode):
        tokens = [BOS]
        for word in example.premise.words:
            tokens += encode(word)
        tokens.append(EOS)
        for word in example.hypothesis.words:
            tokens += encode(word)
        return tokens, [example.label] + [None] * (len(tokens) - 1)

    def baselines(self, learn, test):
        return super().baselines(learn, test) | {"words alone": words_alone(learn, test)}


def words_alone(learn, test):
    """Accuracy of naive Bayes on the hypothesis's words, and on those that the premise lacks.

    It shows how much of a corpus can be had without comparing sentences. Counts are smoothed by
    adding one."""

    def evidence(pair):
        words = set(pair.hypothesis.words)
        lacking = words - set(pair.premise.words)
        return [*words, *(("lacking", word) for word in lacking)]

    labels = Counter(pair.label for pair in learn)
    counts = {label: Counter() for label in labels}
    for pair in learn:
        counts[pair.label].update(evidence(pair))
    kinds = len(set().union(*counts.values()))
    right = 0
    for pair in test:
        scores = {}
        for label, count in counts.items():
            total = count.total() + kinds
            scores[label] = math.log(labels[label])
            scores[label] += sum(math.log((count[item] + 1) / total) for item in evidence(pair))
        right += max(scores, key=scores.get) == pair.label
    return 100 * right / len(test)


TASKS = {"pos": Task(), "ner": Ner(), "nli": Nli()}


def read_examples(args):
    """Of each task the examples to learn from and those to test on: {name: (learn, test)}.

    They are read before anything is trained, so that a bad file is refused at once."""
    if {len(args.train), len(args.test)} not in ({0}, {len(args.tasks)}):
        raise ValueError("--train, --test: give one file of each for each task, or none")
    examples = {}
    for number, name in enumerate(args.tasks):
        task = TASKS[name]
        if args.train:
            paths = args.train[number], args.test[number]
            learn, test = [list(task.read(path, args.language)) for path in paths]
        else:
            learn, test = [list(task.generate(n, seed)) for seed, n in enumerate(task.counts, 1)]
        if None in map(task.labels_of, learn + test):
            raise ValueError(f"{name}: {', '.join(paths)}: a sentence without labels")
        examples[name] = learn, test
        unknown = set(label_names(task, test)) - set(label_names(task, learn))
        if unknown:
            text = f"{name}: no example to learn from has {', '.join(sorted(unknown))}"
            print(f"{text}: counted as wrong", file=sys.stderr)
    return examples


def label_names(task, examples):
    return sorted(set().union(*map(task.labels_of, examples)))


def make_rows(task, examples, names, languages, s, derived):
    """The rows of examples in one language, and how many of them had to be cut.

    A row is its token ids and its labels, (T,) int64 each; names[label] is a label's name."""
    number = {name: i for i, name in enumerate(names)} | {None: SILENT}
    room = min(s.tune_length, s.positions) - 1
    rows, cut = [], 0
    for index, example in enumerate(examples):
        if derived:
            example = task.derive(example, languages, index)
        tokens, labels = task.row(example, languages.encode)
        cut += len(tokens) > room
        tokens = np.array([*tokens[:room], EOS])
        labels = [number[label] for label in [*labels[:room], None]]
        if derived:
            tokens = derive_ids(tokens, s)
        rows.append((torch.from_numpy(tokens), torch.tensor(labels)))
    return rows, cut


# ---------------------------------------------------------------------------------- fine-tuning
class Tagger(nn.Module):
    """The encoder and a linear layer on its hidden states, the head of every task."""

    def __init__(self, encoder, labels):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.settings.width, labels)

    def forward(self, tokens, language):
        """tokens (B, T) int64, padded -> logits (B, T, labels)."""
        with torch.autocast("cuda", torch.bfloat16, enabled=tokens.is_cuda):
            languages = torch.full_like(tokens, language)
            seen = (tokens != PAD)[:, None, None, :]
            hidden = self.encoder.encode(tokens, languages, attention_mask=seen)
            hidden = F.dropout(hidden, self.encoder.settings.dropout, self.training)
            return self.classifier(hidden).float()


def batches(rows, device):
    """Token ids and labels, (B, T) each, of rows in their order but for their lengths.

    Of 16 batches at a time those of about equal length go together, so that little is padding."""
    for first in range(0, len(rows), 16 * TUNE_BATCH):
        pool = sorted(rows[first : first + 16 * TUNE_BATCH], key=lambda row: len(row[0]))
        for start in range(0, len(pool), TUNE_BATCH):
            batch = pool[start : start + TUNE_BATCH]
            tokens = pad_sequence([row[0] for row in batch], True, PAD)
            labels = pad_sequence([row[1] for row in batch], True, SILENT)
            yield tokens.to(device), labels.to(device)


def fine_tune(model, rows, labels, language, epochs):
    """A Tagger for so many labels, trained on rows of a language; the given model is unchanged."""
    s, device = model.settings, model.head_bias.device
    torch.manual_seed(s.seed)
    rng = np.random.default_rng([s.seed, 5])
    tagger = Tagger(copy.deepcopy(model), labels).to(device).train()
    tagger.encoder.word_embeddings.weight.requires_grad_(not s.freeze_embeddings)
    # Fine-tuning takes AdamW, whatever pre-training took, and the paper's linear decay.
    steps = epochs * math.ceil(len(rows) / TUNE_BATCH)
    s = dataclasses.replace(
        s, optimizer="adamw", steps=steps, warmup=math.ceil(steps / 10), decay_share=1.0
    )
    optimizers = train.make_optimizers(tagger, s, s.tune_rate)
    step = 0
    for _ in range(epochs):
        order = rng.permutation(len(rows))
        for tokens, gold in batches([rows[i] for i in order], device):
            logits = tagger(tokens, language).flatten(0, 1)
            F.cross_entropy(logits, gold.flatten(), ignore_index=SILENT).backward()
            train.update(tagger, optimizers, train.schedule(step, s))
            step += 1
    return tagger.eval()


@torch.no_grad()
def measure(tagger, task, rows, names, language):
    """The task's score, in percent, on rows of a language."""
    answers = []
    for tokens, labels in batches(rows, tagger.classifier.weight.device):
        found = tagger(tokens, language).argmax(2)
        for gold, said in zip(labels, found, strict=True):
            asked = gold != SILENT
            gold = [names[label] for label in gold[asked].tolist()]
            answers.append((gold, [names[label] for label in said[asked].tolist()]))
    return task.score(answers)


def read_run(folder):
    """The model and the Languages of a finished run. Raises ValueError if it is not one."""
    path = folder / "settings.json"
    try:
        s = Settings(**json.loads(path.read_text())["settings"])
        return from_hf(folder / "model", s), train.Languages(folder, s)
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no finished run of train.py: {error}") from error


def evaluate(folder, name, examples, device):
    """Fine-tune and test a run on a task and write folder/NAME.json; returns what it holds."""
    task, (learn, test) = TASKS[name], examples
    model, languages = read_run(folder)
    model.to(device)
    s = model.settings
    # A label that only the test has gets a number that no Tagger can say.
    names = label_names(task, learn)
    labels = len(names)
    names += sorted(set(label_names(task, test)) - set(names))
    learn_rows, cut_1 = make_rows(task, learn, names, languages, s, False)
    derived_learn, cut_2 = make_rows(task, learn, names, languages, s, True)
    test_rows, cut_3 = make_rows(task, test, names, languages, s, False)
    derived_test, cut_4 = make_rows(task, test, names, languages, s, True)
    cut = cut_1 + cut_2 + cut_3 + cut_4
    if cut:
        room = min(s.tune_length, s.positions)
        all_rows = 2 * (len(learn) + len(test))
        print(f"{name}: {cut} of {all_rows} rows are cut to {room} tokens", file=sys.stderr)

    epochs = math.ceil(s.tune_epochs * task.epochs_share)
    zero_shot = fine_tune(model, learn_rows, labels, 0, epochs)
    supervised = fine_tune(model, derived_learn, labels, 1, epochs)
    cell = {"task": name, **dataclasses.asdict(s), **task.baselines(learn, test)}
    cell["source"] = measure(zero_shot, task, test_rows, names, 0)
    cell["BS"] = measure(supervised, task, derived_test, names, 1)
    cell["BZ"] = measure(zero_shot, task, derived_test, names, 1)
    cell["Delta"] = cell["BZ"] - cell["BS"]
    # Only the derived words take their turned rows: fine-tuning may have changed the others.
    dictionary = make_dictionary(s)
    turned = rotate(model, dictionary)
    E = zero_shot.encoder.word_embeddings.weight.detach()
    E[s.language_size :] = turned.word_embeddings.weight.detach()[s.language_size :]
    cell["BZ rotated"] = measure(zero_shot, task, derived_test, names, 0)
    for words, share in alignment_score(model, dictionary).items():
        cell[f"alignment {words}"] = share
    for words, share in alignment_score(turned, dictionary).items():
        cell[f"alignment {words} rotated"] = share
    write_file(folder / f"{name}.json", json.dumps(cell, indent=2).encode())
    return cell


# -------------------------------------------------------------------------------------- report
def read_cells(folder):
    """What all finished runs in a folder have scored, one object a run and task."""
    cells = []
    for path in sorted(folder.glob("*/*.json")):
        if path.stem in TASKS:
            cells.append({"run": path.parent.name, **json.loads(path.read_text())})
    if not cells:
        raise ValueError(f"{folder}: holds no finished run: nothing to report")
    return cells


def arrange(cells):
    """The cells as a DataFrame, with the objectives' labels in the order of OBJECTIVES."""
    table = pd.DataFrame(cells)
    label = {name: objective.label for name, objective in OBJECTIVES.items()}
    objectives = pd.Categorical(table["objective"].map(label), label.values())
    table["objective"] = objectives.remove_unused_categories()
    # In an ablation what else varies tells the rows apart.
    for name in Settings.__dataclass_fields__:
        if name not in ("objective", "transform", "seed") and table[name].nunique() > 1:
            table["transform"] += f", {name} " + table[name].astype(str)
    return table.sort_values(["transform", "objective", "seed"], ignore_index=True)


def correlation(alignment, delta):
    """Spearman's rho of alignment and -Delta, as the paper has it, as a sentence.

    p is of a permutation test, exact for few rows; the interval is of bootstrap samples of rows."""
    x = np.array(alignment)
    y = -np.round(delta, 6)  # Rounding errors of BZ - BS are to break no tie.

    def rho(x, y):
        return scipy.stats.spearmanr(x, y).statistic

    rng = np.random.default_rng(0)
    with warnings.catch_warnings(action="ignore"):  # rho is not defined if all values are equal.
        test = scipy.stats.permutation_test(
            (x,), lambda x: rho(x, y), permutation_type="pairings", n_resamples=5_000, rng=rng
        )
        samples = rng.integers(len(x), size=(1_000, len(x)))
        low, high = np.nanpercentile([rho(x[rows], y[rows]) for rows in samples], [2.5, 97.5])
    return (
        f"Spearman's rho of alignment and -Delta: {test.statistic:.3f} (p = {test.pvalue:.2g}, "
        f"{len(x)} rows, 95 % of bootstrap samples {low:.2f} to {high:.2f})."
    )


def spread(values):
    """Mean and standard deviation over seeds, or a dash for what is not defined."""
    deviation = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return "-" if values.isna().any() else f"{values.mean():.1f}{deviation}"


def markdown(name, cells):
    """The cells of a task as a table in the paper's layout, its numbers at the right."""
    groups = cells.reindex(columns=[*cells, *(set(COLUMNS) - set(cells))])
    groups = groups.groupby(["transform", "objective"], observed=True)
    table = groups.size().to_frame("seeds").join(groups[COLUMNS].agg(spread)).reset_index()
    paper = PUBLISHED[[f"{name}_BS", f"{name}_BZ", "alignment"]].add_prefix("paper: ")
    table = table.join(paper, on=["transform", "objective"]).astype(object).fillna("-")
    text = f"{TASKS[name].title}, in percent, mean ± standard deviation over seeds:\n\n"
    text += table.to_markdown(index=False, disable_numparse=True, stralign="right") + "\n\n"
    for baseline, meaning in BASELINES.items():
        if baseline in cells and cells[baseline].notna().all():
            text += f"{meaning}: {cells[baseline].mean():.1f}.\n"
    means = groups[["alignment all", "Delta"]].mean()
    if len(means) > 2:
        text += correlation(means["alignment all"], means["Delta"]) + "\n"
    return text


def draw_scores(name, cells, path):
    """BS and BZ of every objective, a panel a transformation; a dot is a seed."""
    title = f"{TASKS[name].title}, %"
    scores = cells.melt(["transform", "objective"], ["BS", "BZ"], "score", title)
    axes = {"x": "objective", "y": title, "hue": "score"}
    grid = sns.catplot(scores, kind="bar", col="transform", errorbar="sd", **axes)
    grid.map_dataframe(sns.stripplot, **axes, dodge=True, palette=["black", "black"])
    grid.set_titles("{col_name}").set_xlabels("").savefig(path)


def draw_training(cells, folder, path):
    """Alignment outside of D along pre-training, a line an objective, the mean over its seeds."""
    logs = []
    for _, cell in cells.drop_duplicates("run").iterrows():
        lines = (folder / cell["run"] / "log.jsonl").read_text().splitlines()
        log = pd.DataFrame(map(json.loads, lines), columns=["step", "outside"])
        logs.append(log.assign(transform=cell["transform"], objective=cell["objective"]))
    logs = pd.concat(logs).rename(columns={"outside": "alignment outside of D, %"})
    grid = sns.relplot(
        logs, kind="line", x="step", y="alignment outside of D, %", hue="objective",
        col="transform", errorbar="sd",
    )  # fmt: skip
    grid.set_titles("{col_name}").savefig(path)


def draw_words(cells, folder, path, count=30):
    """The most frequent words of both languages in the plane of their first two principal
    components, before and after pre-training; a line joins the two of a pair."""
    models = {}
    for _, cell in cells.drop_duplicates("objective").iterrows():
        model, _ = read_run(folder / cell["run"])
        if not models:
            torch.manual_seed(model.settings.seed)
            models["before pre-training"] = MaskedLM(model.settings)
        models[f"{cell['objective']}, {cell['transform']}"] = model
    planes = []
    for title, model in models.items():
        words = torch.cat([words.detach()[:count] for words in words_of_both(model)])
        U, S, _ = torch.linalg.svd(words - words.mean(0), full_matrices=False)
        plane = pd.DataFrame((U * S)[:, :2].numpy(), columns=["x", "y"])
        pairs = len(plane) // 2
        plane["pair"] = np.arange(len(plane)) % pairs
        plane["language"] = ["original"] * pairs + ["derived"] * pairs
        planes.append(plane.assign(model=title))
    grid = sns.FacetGrid(pd.concat(planes), col="model", sharex=False, sharey=False)
    line = {"units": "pair", "estimator": None, "color": "0.8", "linewidth": 0.8}
    grid.map_dataframe(sns.lineplot, x="x", y="y", **line)
    grid.map_dataframe(sns.scatterplot, x="x", y="y", hue="language", style="language")
    grid.set_titles("{col_name}").add_legend().savefig(path)


def report(folder, out):
    """Write results.json, report.md and figures of all finished runs; returns the tables."""
    cells = read_cells(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "results.json", json.dumps(cells, indent=1).encode())
    table = arrange(cells)
    matplotlib.use("Agg")  # No window is to open.
    text = ""
    for name, same in table.groupby("task", sort=False):
        text += markdown(name, same) + "\n"
        draw_scores(name, same, out / f"{name}.png")
    draw_training(table, folder, out / "training.png")
    draw_words(table, folder, out / "words.png")
    write_file(out / "report.md", text.encode())
    return text


# ---------------------------------------------------------------------------------------- grid
def read_variants(vary):
    """What an ablation changes, by what it adds to a folder's name.

    ["alpha", "1", "10"] -> {"-alpha=1": {"alpha": 1.0}, "-alpha=10": {"alpha": 10.0}}"""
    if not vary:
        return {"": {}}
    setting, *values = vary
    field = Settings.__dataclass_fields__.get(setting)
    if field is None or setting in ("objective", "transform", "seed") or not values:
        raise ValueError(f"--vary {setting}: give a setting that a grid has once, and its values")
    kind = json.loads if field.type is bool else field.type
    try:
        return {f"-{setting}={value}": {setting: kind(value)} for value in values}
    except ValueError as error:
        raise ValueError(f"--vary {setting}: {error}") from error


def grid_cells(args):
    """The Settings of every cell, by its folder, and the Source of their text."""
    if args.objective or args.transform or args.seed is not None:
        raise ValueError("a grid takes --objectives, --transforms and --seeds")
    variants = read_variants(args.vary)
    cells = {}
    for transform, objective, seed, suffix in itertools.product(
        args.transforms, args.objectives, range(args.seeds), variants
    ):
        changes = {"transform": transform, "objective": objective, "seed": seed}
        folder = args.out / f"{transform}-{objective}-{seed}{suffix}"
        cells[folder], source = train.read_options(args, **changes, **variants[suffix])
    return cells, source


def run_cell(folder, s, source, examples, args):
    """Train a run and evaluate it on every task, as far as it is not done; returns what failed."""
    try:
        train.run(folder, s, source, args)
        for name in examples:
            if not (folder / f"{name}.json").exists():
                evaluate(folder, name, examples[name], args.device)
    except Exception as error:  # The other cells are to go on.
        return f"{folder}: {error}"
    return None


def grid(args):
    """Run every cell that is not finished, and report."""
    cells, source = grid_cells(args)
    examples = read_examples(args)
    for s in cells.values():
        train.prepare(source, s, args.out)  # once, before processes would do it side by side
    os.environ["TQDM_DISABLE"] = "1"  # in the processes to come: one bar is enough
    where = {"backend": "loky", "n_jobs": args.jobs}  # It shares the cores out among the jobs.
    if args.scheduler:
        where = {"backend": "dask", "scheduler_host": args.scheduler}
    job = joblib.delayed(run_cell)
    jobs = [job(folder, s, source, examples, args) for folder, s in cells.items()]
    failures = []
    with joblib.parallel_config(**where):
        done = joblib.Parallel(return_as="generator_unordered")(jobs)
        for failure in tqdm(done, "cells", len(jobs)):
            if failure:
                failures.append(failure)
    for failure in failures:
        print(failure, file=sys.stderr)
    print(report(args.out, args.results or args.out))
    if failures:
        raise ValueError(f"{len(failures)} of {len(cells)} cells failed: the same command goes on")


def main():
    parser = synth_lang.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, task in TASKS.items():
        one = commands.add_parser(name, help=f"fine-tune and test one run: {task.title}")
        one.add_argument("folder", type=Path, help="of a run of train.py")
        one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        one.set_defaults(tasks=[name])
    several = commands.add_parser("report", help="tables and figures of finished runs")
    several.add_argument("folder", type=Path, help="of a grid")
    every = commands.add_parser("grid", help="every objective, transformation and seed")
    every.add_argument("--out", type=Path, default=Path("runs/tiny"))
    every.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    every.add_argument("--transforms", nargs="+", default=["transliterate+invert"])
    every.add_argument("--seeds", type=int, default=2, help="how many of each")
    every.add_argument("--tasks", nargs="+", choices=TASKS, default=["pos"])
    every.add_argument("--vary", nargs="+", metavar=("SETTING", "VALUE"), help="an ablation")
    every.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    every.add_argument("--scheduler", metavar="ADDRESS",
                       help="of a Dask cluster to run on, its workers with one thread each")
    for name in (*TASKS, "grid"):
        command = commands.choices[name]
        command.add_argument("--train", nargs="+", metavar="FILE", default=[],
                             help="examples to learn from, a file a task (built-in ones)")
        command.add_argument("--test", nargs="+", metavar="FILE", default=[])
        command.add_argument("--language", default="en", help="of a file for nli that has several")
    for command in (several, every):
        command.add_argument("--results", type=Path, help="folder to write to (the runs' own)")
    train.add_options(every)
    args = parser.parse_args()
    if args.command == "grid":
        grid(args)
    elif args.command == "report":
        print(report(args.folder, args.results or args.folder))
    else:
        examples = read_examples(args)[args.command]
        print(json.dumps(evaluate(args.folder, args.command, examples, args.device), indent=2))


if __name__ == "__main__":
    train.guarded(main)
