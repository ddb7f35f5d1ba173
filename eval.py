"""Fine-tune a pre-trained model in one language, test it in both, and report.

    python eval.py pos runs/align         a task of one run: pos, ner or nli
    python eval.py grid --out runs/tiny   many runs side by side, and the report of them
    python eval.py report runs/tiny       tables, figures and results.json of finished runs

The measures are the paper's, in percent:

    source      fine-tuned and tested on the original language
    BS          bilingual supervised: fine-tuned and tested on the derived language
    BZ          bilingual zero-shot: fine-tuned on the original, tested on the derived language
    Delta       BZ - BS, below zero by what zero-shot costs
    BZ rotated  BZ once the rotation that fits D best has turned the fine-tuned model's derived
                words onto the original ones (`alignmlm.rotate`); nothing more is trained
    alignment   the share of original words whose nearest derived word is their counterpart
"""

import copy
import json
import math
import os
import sys
from dataclasses import asdict, replace
from io import StringIO
from itertools import chain, product
from pathlib import Path
from statistics import mode

import joblib
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import PermutationMethod, pearsonr, rankdata
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from tqdm import tqdm

import synth_lang
import train
from alignmlm import BOS, EOS, OBJECTIVES, PAD, MaskedLM, Settings, alignment_score, derive_ids
from alignmlm import from_hf, make_dictionary, rotate, words_of_both, write_file

SILENT = -100  # the label of a token at which nothing is asked
TUNE_BATCH = 32  # rows in a step of fine-tuning, as in the paper
GRID_SETTINGS = "transform", "objective", "seed"  # what every grid varies
COLUMNS = ["source", "BS", "BZ", "Delta", "BZ rotated"]  # of a report, with the following
COLUMNS += ["alignment all", "alignment outside", "alignment outside rotated"]

# The paper's numbers, of English: XNLI, WikiANN, and Universal Dependencies.
PUBLISHED = """
transform            objective    nli_BS nli_BZ       ner_BS ner_BZ       pos_BS pos_BZ alignment
transliterate        MLM            76.4   74.9         80.6   78.0         95.0   94.6      90.0
transliterate+invert MLM            73.9   56.7         79.2   35.9         95.0   56.5       0.3
transliterate+syntax MLM            73.5   69.0         71.3   52.3         93.6   91.6      57.3
transliterate        XLM            77.3   77.5         80.8   79.7         95.0   94.8      97.7
transliterate+invert XLM            75.4   67.2         80.0   60.7         95.0   61.8      85.6
transliterate+syntax XLM            76.1   74.1         71.5   59.6         93.7   92.7      98.6
transliterate        DICT-MLM       77.0   75.9         79.3   78.3         95.1   94.8      95.7
transliterate+invert DICT-MLM       74.5   65.3         79.1   59.8         95.0   76.0      64.2
transliterate+syntax DICT-MLM       74.3   72.2         71.4   57.6         93.6   92.6      93.7
transliterate        ALIGN-MLM      75.1   75.5         79.4   78.6         94.9   94.8      98.4
transliterate+invert ALIGN-MLM      75.5   68.8         80.0   64.5         95.0   92.0      95.2
transliterate+syntax ALIGN-MLM      74.7   71.1         71.3   58.3         93.7   92.9      98.2
"""
# A report joins them to its rows by these two names.
PUBLISHED = pd.read_csv(StringIO(PUBLISHED), sep=r"\s+", index_col=["transform", "objective"])

# --------------------------------------------------------------------------------------- tasks
class Task:
    """What is asked of a model. This one asks for each word's part of speech."""

    title = "POS accuracy"
    field = "upos"  # of a Sentence, with the labels of its words
    counts = 6_000, 1_000  # examples of the built-in language to learn from, and to test on
    epoch_share = 1.0  # of the setting tune_epochs
    generate = staticmethod(synth_lang.generate)

    def read(self, path, language):
        return synth_lang.read_conllu(path)

    def labels_of(self, example):
        return getattr(example, self.field)

    def all_labels(self, examples):  # in one list
        return list(chain.from_iterable(map(self.labels_of, examples)))

    def row(self, example, index, derive, encode):
        """The token ids of one word after the other, and what is asked of the first of them.

        derive gives a sentence in the language of the row; encode gives the ids of a word."""
        sentence = derive(example, index)
        yield [BOS], None
        # As in BERT a word has its label at its first sub-word, and the others are not asked.
        for word, label in zip(sentence.words, self.labels_of(sentence), strict=True):
            yield encode(word), label
        yield [EOS], None

    def score(self, answers):
        """In percent. answers: of each row the right labels and those said, arrays of names."""
        # Accuracy is over all words of all rows, so that long rows count more.
        right = asked = 0
        for gold, said in answers:
            right += sum(gold == said)
            asked += len(gold)
        return 100 * right / max(asked, 1)

class Ner(Task):
    """Named entities, as BIO tags of the words."""

    title = "NER F1"  # of whole entities, as CoNLL-2003 counts
    field = "entities"

    def read(self, path, language):
        return synth_lang.read_bio(path)

    def score(self, answers):
        # F1 is 2 |both| / (|gold| + |said|), over the entities of all rows.
        both = total = 0
        for gold, said in answers:
            gold, said = entities(gold), entities(said)
            both += len(gold & said)
            total += len(gold) + len(said)
        return 200 * both / max(total, 1)

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
    epoch_share = 0.5  # The paper fine-tunes for 5 epochs here, and for 10 in the other tasks.
    generate = staticmethod(synth_lang.generate_inferences)

    def read(self, path, language):
        return synth_lang.read_inferences(path, language)

    def labels_of(self, example):
        return [example.label]

    def row(self, example, index, derive, encode):
        yield [BOS], example.label
        # Each of the two is derived by itself: under T_inv the premise still comes first.
        for sentence in (example.premise, example.hypothesis):
            for word in derive(sentence, index).words:
                yield encode(word), None
            yield [EOS], None

def words_alone(learn, test):
    """Accuracy of naive Bayes, which is told the hypothesis's words and which of them the premise
    lacks. It shows what single words give, without their order and what they mean together."""

    def evidence(pair):
        words = set(pair.hypothesis.words)
        return words | {f"lacking {word}" for word in words - set(pair.premise.words)}

    # A piece of evidence that no pair to learn from had is left out of a test pair.
    bayes = make_pipeline(CountVectorizer(analyzer=evidence), MultinomialNB())
    bayes.fit(learn, [pair.label for pair in learn])
    return 100 * bayes.score(test, [pair.label for pair in test])

TASKS = {"pos": Task(), "ner": Ner(), "nli": Nli()}

def read_examples(args):
    """The examples of each task: those to learn from, and those to test on.

    They are read before anything is trained, so that a bad file is refused at once."""
    if {len(args.train), len(args.test)} not in ({0}, {len(args.tasks)}):
        raise ValueError("--train, --test: give one file of each for each task, or none")
    examples = {}
    for number, name in enumerate(args.tasks):
        task = TASKS[name]
        if args.train:
            files = args.train[number], args.test[number]
            parts = [list(task.read(file, args.language)) for file in files]
            if None in map(task.labels_of, chain(*parts)):
                raise ValueError(f"{' or '.join(files)}: a sentence has no labels for {name}")
        else:
            # The text of pre-training has the seed 0.
            parts = [list(task.generate(n, seed)) for seed, n in enumerate(task.counts, 1)]
        examples[name] = parts
    return examples

def make_rows(task, examples, names, languages, s, derived):
    """Rows in one language: [0] their token ids and [1] their labels, (2, rows, T) int64.

    names[label] is the name of a label."""
    # The words are derived before they are cut into sub-words, and T_trans acts on the ids below.
    derive = languages.derive if derived else lambda sentence, index: sentence
    longest = min(s.tune_length, s.positions)
    rows = np.full((2, len(examples), longest), [[[PAD]], [[SILENT]]])
    cut = 0
    for index, example in enumerate(examples):
        tokens, labels = [], []
        for ids, label in task.row(example, index, derive, languages.encode):
            tokens += ids
            labels += [SILENT] * len(ids)
            if label is not None:
                labels[-len(ids)] = names.index(label)  # at the first token of the word
        cut += len(tokens) > longest
        rows[:, index, : len(tokens)] = np.array([tokens, labels])[:, :longest]
    if derived:
        rows[0] = derive_ids(rows[0], s)
    elif cut:  # A sentence and its counterpart have equally many tokens: this is said once.
        print(f"{cut} of {len(examples)} rows are cut to {longest} tokens", file=sys.stderr)
    return torch.from_numpy(rows)

# ---------------------------------------------------------------------------------- fine-tuning
def predict(tagger, tokens, language):
    """tokens (B, T) int64, padded -> logits (B, T, labels)."""
    # Nothing looks at padding, and so a row's logits do not depend on the rows beside it.
    seen = (tokens != PAD)[:, None, None, :]
    hidden = tagger.encode(tokens, torch.full_like(tokens, language), attention_mask=seen)
    return tagger.classifier(hidden)

def batches(rows):
    """Rows (2, rows, T) in random order, TUNE_BATCH at a time: (2, B, T).

    Those of about equal length share a batch, so that little of it is padding. They are shuffled
    before they are sorted, so that rows of one length meet others in every epoch."""
    lengths = (rows[0] != PAD).sum(1)
    order = torch.randperm(len(lengths), device=rows.device)
    parts = order[lengths[order].argsort()].split(TUNE_BATCH)
    for number in torch.randperm(len(parts)):
        part = parts[number]
        yield rows[:, part, : lengths[part].max()]

def fine_tune(model, rows, labels, language, epochs):
    """A tagger trained on rows of a language: a copy of the model with a classifier of labels."""
    s = model.settings
    # The seed decides the classifier, the order of the rows and dropout.
    torch.manual_seed(s.seed)
    tagger = copy.deepcopy(model).train()
    tagger.classifier = torch.nn.Linear(s.width, labels, device=rows.device)
    # Without frozen embeddings the words of one language would move away from the other's.
    for embeddings in (tagger.word_embeddings, tagger.language_embeddings):
        embeddings.requires_grad_(not s.freeze_embeddings)
    steps = epochs * math.ceil(rows.shape[1] / TUNE_BATCH)
    # It is AdamW that fine-tunes, as in the paper, also what Muon has pre-trained. The rate rises
    # in the first tenth of the steps and then falls to zero.
    tuning = replace(s, optimizer="adamw", rate=s.tune_rate)
    tuning = replace(tuning, steps=steps, warmup=steps // 10, decay_share=1.0)
    optimizers = train.make_optimizers(tagger, tuning)
    parts = chain.from_iterable(batches(rows) for _ in range(epochs))
    for step, (tokens, gold) in enumerate(parts):
        logits = predict(tagger, tokens, language).flatten(0, 1)
        F.cross_entropy(logits, gold.flatten(), ignore_index=SILENT).backward()
        train.update(tagger, optimizers, train.schedule(step, tuning))
    return tagger.eval()

@torch.no_grad()
def measure(tagger, task, rows, names, language):
    """The task's score, in percent, on rows of a language."""
    # Names are compared, and not numbers, as F1 needs the names of BIO tags.
    names, answers = np.array(names), []
    for tokens, labels in batches(rows):
        found = predict(tagger, tokens, language).argmax(2).numpy(force=True)
        for gold, said in zip(labels.numpy(force=True), found, strict=True):
            asked = gold != SILENT
            answers.append((names[gold[asked]], names[said[asked]]))
    return task.score(answers)

def read_run(folder):
    """The model and the Languages of a finished run. Raises ValueError or OSError without one."""
    settings = json.loads((folder / "settings.json").read_text())["settings"]
    model = from_hf(folder / "model", Settings(**settings))
    return model, train.Languages(folder, model.settings)

def evaluate(folder, name, examples, device):
    """Fine-tune and test a run on a task and write folder/NAME.json; returns what it holds."""
    task, (learn, test) = TASKS[name], examples
    model, languages = read_run(folder)
    model, s = model.to(device), model.settings
    known = set(task.all_labels(learn))
    unknown = set(task.all_labels(test)) - known
    if unknown:
        text = ", ".join(sorted(unknown))
        print(f"{name}: no example to learn from has {text}: counted as wrong", file=sys.stderr)
    # What only the test has gets a name, but no logit.
    names = [*sorted(known), *sorted(unknown)]
    original = make_rows(task, learn + test, names, languages, s, derived=False).to(device)
    derived = make_rows(task, learn + test, names, languages, s, derived=True).to(device)
    # The rows of the examples to learn from come first, n of them.
    n, epochs = len(learn), math.ceil(task.epoch_share * s.tune_epochs)
    # One tagger serves source, BZ and BZ rotated; the other one is for BS alone.
    zero_shot = fine_tune(model, original[:, :n], len(known), 0, epochs)
    supervised = fine_tune(model, derived[:, :n], len(known), 1, epochs)

    # The last argument tells the language, of which only some objectives have embeddings.
    cell = {"task": name, **asdict(s)}
    cell["source"] = measure(zero_shot, task, original[:, n:], names, 0)
    cell["BS"] = measure(supervised, task, derived[:, n:], names, 1)
    cell["BZ"] = measure(zero_shot, task, derived[:, n:], names, 1)
    cell["Delta"] = cell["BZ"] - cell["BS"]
    # Fine-tuning may have moved embeddings, and so the rotation is fitted on the tagger's. Turned
    # words count as words of the original language, 0.
    dictionary = make_dictionary(s)
    cell["BZ rotated"] = measure(rotate(zero_shot, dictionary), task, derived[:, n:], names, 0)
    # Alignment is that of the pre-trained model, before fine-tuning.
    for suffix, scored in (("", model), (" rotated", rotate(model, dictionary))):
        for words, share in alignment_score(scored, dictionary).items():
            cell[f"alignment {words}{suffix}"] = share
    # What can be had without a model.
    commonest = mode(task.all_labels(learn))
    rows = [np.array(task.labels_of(example)) for example in test]
    cell["chance"] = task.score((row, [commonest] * len(row)) for row in rows)
    if name == "nli":
        cell["words alone"] = words_alone(learn, test)
    write_file(folder / f"{name}.json", json.dumps(cell, indent=2).encode())
    return cell

# -------------------------------------------------------------------------------------- report
def read_cells(folder):
    """What all finished runs in a folder have scored, a row a run and task, as reports say it."""
    cells = []
    for path in sorted(folder.glob("*/*.json")):
        # A run's settings.json is no score.
        if path.stem in TASKS:
            cells.append({"run": path.parent.name, **json.loads(path.read_text())})
    if not cells:
        raise ValueError(f"{folder}: no run here has a score: first eval.py pos RUN")
    # The paper's order of objectives is that of the table.
    cells.sort(key=lambda cell: (cell["transform"], list(OBJECTIVES).index(cell["objective"])))
    return cells

def correlation(alignment, delta):
    """Spearman's rho of alignment and -Delta over rows, as the paper has it, in a sentence.

    It is Pearson's r of the ranks, for which SciPy has both a permutation test, p, over all
    pairings up to 7 rows and 5,040 random ones beyond, and an interval, Fisher's."""
    # Rounding errors of BZ - BS are to break no tie.
    ranks = rankdata(alignment), rankdata(-np.round(delta, 6))
    method = PermutationMethod(n_resamples=5_040, rng=np.random.default_rng(0))
    test = pearsonr(*ranks, method=method)
    low, high = test.confidence_interval()
    return (f"Spearman's rho of alignment and -Delta: {test.statistic:.3f} (p = {test.pvalue:.2g}, "
            f"{len(delta)} rows, 95 % interval {low:.2f} to {high:.2f}).")  # fmt: skip

def spread(values):
    """Mean and standard deviation over seeds, or a dash for what is not defined."""
    deviation = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return "-" if values.isna().any() else f"{values.mean():.1f}{deviation}"

def markdown(name, cells):
    """The cells of a task as a table in the paper's layout, its numbers at the right."""
    groups = cells.groupby(["transform", "objective"], sort=False)
    # Without words outside of D there is no alignment of them.
    table = groups[[column for column in COLUMNS if column in cells]].agg(spread)
    table.insert(0, "seeds", groups.size())
    # Of the published columns those of this task, called by what they are: nli_BS becomes BS.
    paper = PUBLISHED.filter(regex=f"{name}|alignment")
    paper.columns = [f"paper: {column.split('_')[-1]}" for column in paper]
    # A transformation or an objective that the paper does not have gets dashes.
    table = table.reset_index().join(paper, on=["transform", "objective"])
    lines = [f"{TASKS[name].title}, in percent, mean ± standard deviation over seeds:", ""]
    lines += [table.astype(object).fillna("-").to_markdown(index=False, disable_numparse=True), ""]
    lines.append(f"Always saying the commonest label: {cells['chance'].mean():.1f}.")
    if name == "nli":
        lines.append(f"A bag of words (naive Bayes): {cells['words alone'].mean():.1f}.")
    # As in the paper a row is one point, so that seeds do not count as several.
    means = groups[["alignment all", "Delta"]].mean()
    if len(means) > 2:
        lines.append(correlation(means["alignment all"], means["Delta"]))
    return "\n".join([*lines, "", ""])

def draw_scores(name, cells, path):
    """BS and BZ of every objective, a panel a transformation; a dot is a seed."""
    title = f"{TASKS[name].title}, %"
    # A row for each BS and each BZ, as seaborn wants it.
    scores = cells.melt(["transform", "objective"], ["BS", "BZ"], "score", title)
    # A bar is the mean over seeds, a line on it the standard deviation.
    columns = {"x": "objective", "y": title, "hue": "score"}
    grid = sns.catplot(scores, kind="bar", col="transform", errorbar="sd", **columns)
    grid.map_dataframe(sns.stripplot, **columns, dodge=True, palette=["black", "black"])
    grid.set_titles("{col_name}").set_xlabels("").savefig(path)

def draw_training(folder, runs, path):
    """Alignment outside of D along pre-training, a line an objective, the mean over its seeds."""
    logs = []
    for run in runs.itertuples():
        log = pd.read_json(folder / run.run / "log.jsonl", lines=True)
        logs.append(log.assign(transform=run.transform, objective=run.objective))
    logs = pd.concat(logs)
    # Without words outside of D there is no such column, and nothing to draw.
    if "outside" in logs:
        lines = {"x": "step", "y": "outside", "hue": "objective", "col": "transform"}
        grid = sns.relplot(logs, kind="line", errorbar="sd", **lines)
        grid.set_titles("{col_name}").set_ylabels("alignment outside of D, %").savefig(path)

def draw_words(folder, runs, path, count=30):
    """The most frequent words of both languages on their first two principal components, before
    pre-training and after it, in the first run of each objective; a line joins a pair."""
    first = runs.drop_duplicates("objective")
    models = {run.objective: read_run(folder / run.run)[0] for run in first.itertuples()}
    s = models[first["objective"].iloc[0]].settings
    # Before its first step a run's model is what its seed makes of its settings.
    torch.manual_seed(s.seed)
    models = {"before pre-training": MaskedLM(s), **models}
    figure = Figure((4 * len(models), 4), layout="constrained")
    for number, (title, model) in enumerate(models.items(), 1):
        # SentencePiece orders ids by frequency. Some of these are single letters.
        words = torch.cat([words.detach()[:count] for words in words_of_both(model)])
        x, y = PCA(2).fit_transform(words).T.reshape(2, 2, count)  # (2 languages, words) each
        axis = figure.add_subplot(1, len(models), number, title=title)
        # A column is a pair, and so this draws a line for each.
        axis.plot(x, y, color="0.8")
        axis.plot(x[0], y[0], "o", label="original")
        axis.plot(x[1], y[1], "x", label="derived")
    axis.legend()
    figure.savefig(path)

def report(folder, out):
    """Print the tables of all finished runs; write them, their figures and results.json to out."""
    cells = read_cells(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "results.json", json.dumps(cells, indent=1).encode())
    cells = pd.DataFrame(cells)
    cells["objective"] = [OBJECTIVES[name].label for name in cells["objective"]]
    for name in Settings.__dataclass_fields__:
        # In an ablation the rows of a table differ in other settings too: these join the name.
        if name not in GRID_SETTINGS and cells[name].nunique() > 1:
            cells["transform"] += f", {name} " + cells[name].astype(str)
    text = ""
    for name, same in cells.groupby("task", sort=False):
        text += markdown(name, same)
        draw_scores(name, same, out / f"{name}.png")
    # A run stands in as many rows as it has tasks.
    runs = cells.drop_duplicates("run")
    draw_training(folder, runs, out / "training.png")
    draw_words(folder, runs, out / "words.png")
    write_file(out / "report.md", text.encode())
    print(text)

# ---------------------------------------------------------------------------------------- grid
def read_variants(vary):
    """The changes of settings of each variant of an ablation, by what they add to a folder's name.

    vary: a setting and its values, as texts; without any there is one variant, with no change."""
    if not vary:
        return {"": {}}
    setting, *values = vary
    if setting not in Settings.__dataclass_fields__ or setting in GRID_SETTINGS or not values:
        refused = ", ".join(GRID_SETTINGS)
        raise ValueError(f"--vary: give a setting other than {refused}, and its values")
    read = train.reader_of(setting)
    return {f"-{setting}={value}": {setting: read(value)} for value in values}

def run_cell(folder, s, examples, args):
    """Train a run and evaluate it on every task, as far as it is not done; returns what failed."""
    try:
        train.run(folder, s, args)
        for name in examples:
            if not (folder / f"{name}.json").exists():
                evaluate(folder, name, examples[name], args.device)
    except Exception as error:  # The other cells are to go on.
        return f"{folder}: {error}"

def grid(args):
    """Run every cell that is not finished, and report."""
    variants = read_variants(args.vary)
    # A bad file is refused here, before hours of training.
    examples = read_examples(args)
    jobs = []
    for suffix, transform, objective, seed in product(
        variants, args.transforms, args.objectives, range(args.seeds)
    ):
        changes = {"transform": transform, "objective": objective, "seed": seed}
        s = train.read_options(args, **changes, **variants[suffix])
        folder = args.out / f"{transform}-{objective}-{seed}{suffix}"
        if not train.is_finished(folder):  # The text of finished runs may be gone.
            train.prepare(args, s, args.out)  # once, before processes would do it side by side
        jobs.append(joblib.delayed(run_cell)(folder, s, examples, args))
    os.environ["TQDM_DISABLE"] = "1"  # in the processes to come: one bar is enough
    # joblib shares the cores out: two jobs on two cores have one thread each.
    where = {"backend": "loky", "n_jobs": args.jobs}
    # joblib has a backend for Dask, which needs the package `distributed`.
    if args.scheduler:
        where = {"backend": "dask", "scheduler_host": args.scheduler}
    with joblib.parallel_config(**where):
        # Results come as they are finished, so that the bar moves.
        done = joblib.Parallel(return_as="generator_unordered")(jobs)
        failures = list(filter(None, tqdm(done, "cells", len(jobs))))
    # What is finished is reported, even if something failed.
    if len(failures) < len(jobs):
        report(args.out, args.out)
    if failures:
        text = f"{len(failures)} of {len(jobs)} cells failed; the same command goes on"
        raise ValueError("; ".join([text, *failures]))

def main():
    parser = synth_lang.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    # The options of a task's files, which the tasks and the grid share.
    files = synth_lang.Parser(add_help=False)
    option = files.add_argument
    option("--train", nargs="+", default=[], help="examples to learn from, a file a task")
    option("--test", nargs="+", default=[], help="the same to test on (built-in ones)")
    option("--language", default="en", help="of a file for nli that has several (%(default)s)")
    for name in TASKS:
        one = commands.add_parser(name, parents=[files], help="fine-tune and test one run")
        one.add_argument("folder", type=Path, help="of a run of train.py")
        one.add_argument("--device", choices=train.DEVICES, default=train.DEVICES[0])
        one.set_defaults(tasks=[name])
    several = commands.add_parser("report", help="tables and figures of finished runs")
    several.add_argument("folder", type=Path, help="that has the runs' folders")
    several.add_argument("--results", type=Path, help="folder to write to (the same)")
    every = commands.add_parser("grid", parents=[files], help="train many runs, and report")
    option = every.add_argument
    shown = {"help": "(%(default)s)", "nargs": "+"}
    option("--out", type=Path, default=Path("runs/tiny"), help="folder for the runs (%(default)s)")
    option("--objectives", choices=OBJECTIVES, default=list(OBJECTIVES), **shown)
    option("--transforms", default=["transliterate+invert"], **shown)
    option("--seeds", type=int, default=2, help="how many (%(default)s)")
    option("--tasks", choices=TASKS, default=["pos"], **shown)
    option("--vary", nargs="+", help="an ablation: a setting and its values")
    option("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    option("--scheduler", help="address of a Dask cluster whose workers have one thread each")
    # A grid has several of these, and so they have options of their own.
    train.add_options(every, left_out=GRID_SETTINGS)
    args = parser.parse_args()
    if args.command == "grid":
        grid(args)
    elif args.command == "report":
        report(args.folder, args.results or args.folder)
    else:
        examples = read_examples(args)[args.command]
        print(json.dumps(evaluate(args.folder, args.command, examples, args.device), indent=2))

if __name__ == "__main__":
    synth_lang.guarded(main)
