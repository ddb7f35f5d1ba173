"""Fine-tune a pre-trained model in one language, test it in both, and report.

    python eval.py pos runs/align         a task of one run: pos, ner or nli
    python eval.py grid --out runs/tiny   many runs side by side, and the report of them
    python eval.py report runs/tiny       tables, figures and results.json of finished runs

The measures, in percent; all but BZ rotated are the paper's:

    source      fine-tuned and tested on the original language
    BS          bilingual supervised: fine-tuned and tested on the derived language
    BZ          bilingual zero-shot: fine-tuned on the original, tested on the derived language
    Delta       BZ - BS, below zero by what zero-shot costs
    BZ rotated  BZ once the rotation that fits D best has turned the fine-tuned model's derived
                words onto the original ones, whose language embedding they get
                (`alignmlm.rotate`); nothing more is trained
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
from seqeval.metrics.sequence_labeling import get_entities
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
# What an ablation can vary beside them.
OTHER_SETTINGS = [name for name in Settings.__dataclass_fields__ if name not in GRID_SETTINGS]
COLUMNS = ["source", "BS", "BZ", "Delta", "BZ rotated",
           "alignment all", "alignment outside", "alignment outside rotated"]  # fmt: skip

# The paper's numbers, of English: XNLI, WikiANN, and Universal Dependencies. A report joins them to
# its rows by the names of the transformation and the objective.
PUBLISHED = pd.read_csv(StringIO("""
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
"""), sep=r"\s+", index_col=["transform", "objective"])  # fmt: skip

# --------------------------------------------------------------------------------------- tasks
class Task:
    """Part-of-speech tagging, and what the other tasks inherit."""

    title = "POS accuracy"
    counts = 6_000, 1_000  # examples of the built-in language to learn from, and to test on
    epoch_share = 1.0  # of the setting tune_epochs
    generate = staticmethod(synth_lang.generate)  # It gets no self.

    def read(self, path, language):
        sentences = list(synth_lang.read_conllu(path))
        if None in map(self.labels_of, sentences):
            raise ValueError(f"{path}: a sentence has no labels, that is, no parts of speech")
        return sentences

    def labels_of(self, example):
        return example.upos

    def row(self, example, index, derive, tokeniser):
        """The token ids, and the label of each, None where nothing is asked.

        derive gives a sentence in the language of the row."""
        sentence = derive(example, index)
        tokens, labels = [BOS], [None]
        for word, label in zip(sentence.words, self.labels_of(sentence), strict=True):
            ids = tokeniser.encode(word)
            tokens += ids
            # As in BERT a word has its label at its first sub-word, and the others are not asked.
            labels += [label] + [None] * (len(ids) - 1)
        return [*tokens, EOS], [*labels, None]

    def score(self, gold, said):
        """In percent. gold, said: of each row the names of the right labels and of those said."""
        # Accuracy is over all words of all rows, so that long rows count more.
        right = np.concatenate(gold) == np.concatenate(said)
        return 100 * right.sum() / right.size

class Ner(Task):
    """Named entities, as BIO tags of the words."""

    title = "NER F1"  # of whole entities, as CoNLL-2003 counts

    def read(self, path, language):
        return synth_lang.read_bio(path)

    def labels_of(self, example):
        return example.entities

    def score(self, gold, said):
        # seqeval finds (type, first word, last word) of each entity as CoNLL-2003 does: an I- that
        # continues nothing begins one.
        gold, said = set(get_entities(gold)), set(get_entities(said))
        # This is F1. All rows count together, as many of them have no entity.
        return 200 * len(gold & said) / max(len(gold) + len(said), 1)

class Nli(Task):
    """Natural language inference: one label, asked for at BOS of BOS premise EOS hypothesis EOS."""

    title = "NLI accuracy"
    counts = 20_000, 1_000
    epoch_share = 0.5  # The paper fine-tunes for 5 epochs here, and for 10 in the other tasks.
    read = staticmethod(synth_lang.read_inferences)
    generate = staticmethod(synth_lang.generate_inferences)

    def labels_of(self, example):
        return [example.label]

    def row(self, example, index, derive, tokeniser):
        tokens = [BOS]
        # Each is derived by itself, under T_perm by a number of its own. The premise stays first.
        for part, sentence in enumerate([example.premise, example.hypothesis]):
            tokens += tokeniser.encode_sentence(derive(sentence, 2 * index + part))
        return tokens, [example.label] + [None] * (len(tokens) - 1)

TASKS = {"pos": Task(), "ner": Ner(), "nli": Nli()}

def baselines(name, learn, test):
    """Scores without a model, in percent."""
    task = TASKS[name]
    # Always the label that is commonest in the examples to learn from.
    commonest = mode(chain(*map(task.labels_of, learn)))
    gold = [task.labels_of(example) for example in test]
    scores = {"chance": task.score(gold, [[commonest] * len(row) for row in gold])}
    if name == "nli":
        # What single words tell, without their order and what they mean together. A piece of
        # evidence that no pair to learn from had is left out of a test pair.
        bayes = make_pipeline(CountVectorizer(analyzer=evidence), MultinomialNB())
        bayes.fit(learn, [pair.label for pair in learn])
        scores["words alone"] = 100 * bayes.score(test, [pair.label for pair in test])
    return scores

def evidence(pair):
    """The hypothesis's words, and which of them the premise lacks."""
    words = set(pair.hypothesis.words)
    return words | {f"lacking {word}" for word in words - set(pair.premise.words)}

def read_examples(tasks, args):
    """The examples of each task: those to learn from, and those to test on.

    They are read before anything is trained, so that a file which cannot be read is refused at
    once. A label that only the test has is a matter of `evaluate`."""
    if len(args.train) != len(args.test) or len(args.train) not in (0, len(tasks)):
        raise ValueError("--train, --test: give one file of each for each task, or none")
    examples = {}
    for number, name in enumerate(tasks):
        task = TASKS[name]
        if args.train:
            files = args.train[number], args.test[number]
            parts = [list(task.read(file, args.language)) for file in files]
        else:
            # Seeds 1 and 2; the text of pre-training has 0. A few short sentences occur in both.
            parts = [list(task.generate(n, seed)) for seed, n in enumerate(task.counts, 1)]
        examples[name] = parts
    return examples

def make_rows(task, examples, names, tokeniser, s, language):
    """Rows in a language, 0 or 1: token ids, labels and the language, (3, rows, T) int64.

    names[label] is the name of a label."""
    # The words are derived before they are cut into sub-words, and T_trans acts on the ids below.
    derive = tokeniser.derive if language else lambda sentence, index: sentence
    numbers = {name: number for number, name in enumerate(names)} | {None: SILENT}
    longest = min(s.tune_length, s.positions)
    tokens = np.full((len(examples), longest), PAD)
    labels = np.full_like(tokens, SILENT)
    cut = 0
    for index, example in enumerate(examples):
        ids, asked = task.row(example, index, derive, tokeniser)
        # The words that are cut off are neither learned from nor scored.
        cut += len(ids) > longest
        tokens[index, : len(ids)] = ids[:longest]
        labels[index, : len(ids)] = [numbers[name] for name in asked[:longest]]
    if language:
        tokens = derive_ids(tokens, s)
    elif cut:  # A sentence and its counterpart have equally many tokens: this is said once.
        print(f"{cut} of {len(examples)} rows are cut to {longest} tokens", file=sys.stderr)
    return torch.from_numpy(np.stack([tokens, labels, np.full_like(tokens, language)]))

# ---------------------------------------------------------------------------------- fine-tuning
def predict(tagger, tokens, languages):
    """tokens and languages (B, T) int64, padded -> logits (B, T, labels)."""
    # Nothing looks at padding, and so a row's logits do not depend on the rows beside it.
    seen = (tokens != PAD)[:, None, None, :]
    return tagger.classifier(tagger.encode(tokens, languages, attention_mask=seen))

def batches(rows):
    """Rows (3, rows, T) in random order, TUNE_BATCH at a time: (3, B, T).

    Those of about equal length share a batch, so that little of it is padding. They are shuffled
    before they are sorted, so that rows of one length meet others in every epoch."""
    lengths = (rows[0] != PAD).sum(1)
    order = torch.randperm(len(lengths), device=rows.device)
    parts = order[lengths[order].argsort()].split(TUNE_BATCH)
    for number in torch.randperm(len(parts)):
        part = parts[number]
        yield rows[:, part, : lengths[part].max()]

def fine_tune(model, rows, labels, epochs):
    """A tagger trained on rows: a copy of the model with a classifier of so many labels."""
    s = model.settings
    # The seed decides the classifier, the order of the rows and dropout.
    torch.manual_seed(s.seed)
    tagger = copy.deepcopy(model).train()
    tagger.classifier = torch.nn.Linear(s.width, labels, device=rows.device)
    # tiny and small freeze these. Else words of the tuned language move from their counterparts.
    for embeddings in (tagger.word_embeddings, tagger.language_embeddings):
        embeddings.requires_grad_(not s.freeze_embeddings)
    steps = epochs * math.ceil(rows.shape[1] / TUNE_BATCH)
    # Fine-tuning always uses AdamW, as in the paper, even after Muon. The rate rises in the first
    # tenth of the steps and then falls to zero.
    tuning = replace(s, optimizer="adamw", rate=s.tune_rate,
                     steps=steps, warmup=steps // 10, decay_share=1.0)  # fmt: skip
    optimizers = train.make_optimizers(tagger, tuning)
    step = 0
    for _ in range(epochs):
        for tokens, gold, languages in batches(rows):
            logits = predict(tagger, tokens, languages).flatten(0, 1)
            F.cross_entropy(logits, gold.flatten(), ignore_index=SILENT).backward()
            train.update(tagger, optimizers, train.schedule(step, tuning))
            step += 1
    return tagger.eval()

@torch.no_grad()
def measure(tagger, task, rows, names):
    """The task's score, in percent, on rows."""
    # Names are compared, and not numbers, as F1 needs the names of BIO tags. The order of the
    # rows makes no difference.
    names, gold, said = np.array(names), [], []
    for tokens, labels, languages in batches(rows):
        found = predict(tagger, tokens, languages).argmax(2).numpy(force=True)
        for right, answer in zip(labels.numpy(force=True), found, strict=True):
            asked = right != SILENT
            gold.append(names[right[asked]].tolist())
            said.append(names[answer[asked]].tolist())
    return task.score(gold, said)

def read_run(folder):
    """The model and the Tokeniser of a finished run. Raises ValueError without one."""
    if not train.is_finished(folder):
        raise ValueError(f"{folder}: no finished run; let train.py make it, or go on with it")
    # What transformers keeps of a model does not say which experiment it is of.
    settings = json.loads((folder / "settings.json").read_text())["settings"]
    model = from_hf(folder / "model", Settings(**settings))
    return model, train.Tokeniser(folder, model.settings)

def evaluate(folder, name, examples, device=train.DEVICES[0]):
    """Fine-tune and test a run on a task and write folder/NAME.json; returns what it holds."""
    task = TASKS[name]
    learn, test = examples
    model, tokeniser = read_run(folder)
    model.to(device)
    s = model.settings
    known = sorted(set(chain(*map(task.labels_of, learn))))
    unknown = sorted(set(chain(*map(task.labels_of, test))) - set(known))
    if unknown:
        print(f"{name}: no example to learn from has {', '.join(unknown)}: counted as wrong",
              file=sys.stderr)  # fmt: skip
    names = known + unknown  # What only the test has gets a name, but no logit.
    # rows[language] is tokens, labels and languages of learn and then test, (3, examples, T).
    # T_perm draws its order by an example's number, and so all are made together.
    rows = [make_rows(task, learn + test, names, tokeniser, s, language) for language in (0, 1)]
    rows = torch.stack(rows).to(device)
    learn_rows, test_rows = rows.split([len(learn), len(test)], dim=2)
    epochs = math.ceil(task.epoch_share * s.tune_epochs)
    # One tagger serves source, BZ and BZ rotated; the other one is for BS alone.
    zero_shot = fine_tune(model, learn_rows[0], len(known), epochs)
    supervised = fine_tune(model, learn_rows[1], len(known), epochs)
    # Fine-tuning may have moved embeddings, and so the rotation is fitted on the tagger's. It also
    # gives both languages the original one's language embedding.
    dictionary = make_dictionary(s)
    rotated = rotate(zero_shot, dictionary)

    cell = {"task": name, **asdict(s)}
    cell["source"] = measure(zero_shot, task, test_rows[0], names)
    cell["BS"] = measure(supervised, task, test_rows[1], names)
    cell["BZ"] = measure(zero_shot, task, test_rows[1], names)
    cell["Delta"] = cell["BZ"] - cell["BS"]
    cell["BZ rotated"] = measure(rotated, task, test_rows[1], names)
    # Alignment is that of the pre-trained model, before fine-tuning.
    for suffix, scored in (("", model), (" rotated", rotate(model, dictionary))):
        for words, share in alignment_score(scored, dictionary).items():
            cell[f"alignment {words}{suffix}"] = share
    cell |= baselines(name, learn, test)
    write_file(folder / f"{name}.json", json.dumps(cell, indent=2).encode())
    return cell

# -------------------------------------------------------------------------------------- report
def read_cells(folder):
    """What all finished runs in a folder have scored, a row a run and task."""
    cells = []
    for path in sorted(folder.glob("*/*.json")):
        # A run's settings.json is no score.
        if path.stem in TASKS:
            cells.append({"run": path.parent.name, **json.loads(path.read_text())})
    if not cells:
        raise ValueError(f"{folder}: no run here has a score: first eval.py pos RUN")
    # OBJECTIVES has the paper's order.
    cells.sort(key=lambda cell: (cell["transform"], list(OBJECTIVES).index(cell["objective"])))
    return cells

def correlation(alignment, delta):
    """Spearman's rho of alignment and -Delta over rows, as the paper has it, in a sentence.

    It is Pearson's r of the ranks. p is the share of their pairings, all up to 7 rows and 5,040
    random ones beyond, with an r no nearer to 0. The interval is Fisher's, close for ranks."""
    method = PermutationMethod(n_resamples=5_040, rng=np.random.default_rng(0))
    # Rounding errors of BZ - BS are to break no tie.
    test = pearsonr(rankdata(alignment), rankdata(-np.round(delta, 6)), method=method)
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
    paper.columns = "paper: " + paper.columns.str.removeprefix(f"{name}_")
    # A transformation or an objective that the paper does not have gets dashes.
    table = table.join(paper).reset_index()
    # tabulate would write the number 95.0 as 95.
    table = table.astype(object).fillna("-").to_markdown(index=False, disable_numparse=True)
    text = f"{TASKS[name].title}, in percent, mean ± standard deviation over seeds:\n\n{table}\n\n"
    text += f"Always saying the commonest label: {cells['chance'].mean():.1f}.\n"
    if name == "nli":
        text += f"Naive Bayes, told what the premise lacks: {cells['words alone'].mean():.1f}.\n"
    # As in the paper a row is one point, so that seeds do not count as several. Few say little.
    means = groups[["alignment all", "Delta"]].mean()
    if len(means) > 4:
        text += correlation(means["alignment all"], means["Delta"]) + "\n"
    return text + "\n"

def draw_scores(name, cells, path):
    """BS and BZ of every objective, a panel a transformation: mean and deviation over seeds."""
    title = f"{TASKS[name].title}, %"
    # A row for each BS and each BZ, as seaborn wants it.
    scores = cells.melt(["transform", "objective"], ["BS", "BZ"], "score", title)
    grid = sns.catplot(
        scores, kind="bar", errorbar="sd",
        x="objective", y=title, hue="score", col="transform",
    )  # fmt: skip
    grid.set_titles("{col_name}").savefig(path)

def draw_training(folder, runs, path):
    """Alignment outside of D along pre-training, a line an objective, the mean over its seeds."""
    logs = {run: pd.read_json(folder / run / "log.jsonl", lines=True) for run in runs["run"]}
    logs = pd.concat(logs, names=["run"])  # The names of the runs become an index.
    # Without words outside of D there is no such column, and nothing to draw.
    if "outside" in logs:
        grid = sns.relplot(
            runs.merge(logs, on="run"), kind="line", errorbar="sd",
            x="step", y="outside", hue="objective", col="transform",
        )  # fmt: skip
        grid.set_titles("{col_name}").set_ylabels("alignment outside of D, %").savefig(path)

def draw_words(folder, runs, path):
    """The 30 most frequent words of both languages on their first two principal components, before
    pre-training and after it, in the first run of each objective; a line joins a pair."""
    first = runs.drop_duplicates("objective")
    titles = ["before pre-training", *first["objective"]]
    models = [read_run(folder / run)[0] for run in first["run"]]
    # Before its first step a run's model is what its seed makes of its settings.
    s = models[0].settings
    torch.manual_seed(s.seed)
    models.insert(0, MaskedLM(s))
    figure = Figure((4 * len(models), 4), layout="constrained")
    axes = figure.subplots(1, len(models))
    for axis, title, model in zip(axes, titles, models, strict=True):
        # SentencePiece orders ids by frequency. Some of these are single letters. Both languages
        # are put on one plane, so that what separates them can be seen.
        both = torch.cat([words[:30] for words in words_of_both(model)]).detach()  # (60, D)
        original, derived = np.split(PCA(2).fit_transform(both), 2)  # (30, 2) each
        for pair in zip(original, derived, strict=True):
            axis.plot(*np.transpose(pair), color="0.8")
        axis.plot(*original.T, "o", label="original")
        axis.plot(*derived.T, "x", label="derived")
        axis.set_title(title)
    axes[-1].legend()
    figure.savefig(path)

def report(folder, out):
    """Print the tables of all finished runs; write them, their figures and results.json to out."""
    cells = read_cells(folder)
    out.mkdir(parents=True, exist_ok=True)
    # This is written first: below, names are changed for display.
    write_file(out / "results.json", json.dumps(cells, indent=1).encode())
    cells = pd.DataFrame(cells)
    cells["objective"] = [OBJECTIVES[name].label for name in cells["objective"]]
    for name in OTHER_SETTINGS:
        # In an ablation the rows of a table differ in other settings too: these join the name.
        if cells[name].nunique() > 1:
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
    """The variants of an ablation: what each adds to a folder's name, and the settings it changes,
    as in {"-alpha=10": {"alpha": 10.0}}.

    vary: a setting and its values, as texts; without any there is one variant, with no change."""
    if not vary:
        return {"": {}}
    setting, *values = vary
    if setting not in OTHER_SETTINGS or not values:
        raise ValueError(f"--vary: give values after one of {', '.join(OTHER_SETTINGS)}")
    read = train.reader_of(setting)
    return {f"-{setting}={value}": {setting: read(value)} for value in values}

def run_cell(folder, s, examples, args):
    """Train a run and evaluate it on every task, as far as it is not done; returns what failed."""
    try:
        train.run(folder, s, args)
        for name in examples:
            # The file is written whole, when the task is done.
            if not (folder / f"{name}.json").exists():
                evaluate(folder, name, examples[name], args.device)
    except Exception as error:  # The other cells are to go on.
        return f"{folder}: {error!r}"

def grid(args):
    """Run every cell that is not finished, and report."""
    variants = read_variants(args.vary)
    # What cannot be evaluated is refused here, before hours of training.
    if args.train and args.tasks != ["pos"] and "syntax" in "+".join(args.transforms):
        raise ValueError("syntax needs trees, which files for ner and nli do not have")
    examples = read_examples(args.tasks, args)
    jobs = []
    for suffix, transform, objective, seed in product(
        variants, args.transforms, args.objectives, range(args.seeds)
    ):
        s = train.read_options(
            args, transform=transform, objective=objective, seed=seed, **variants[suffix]
        )
        folder = args.out / f"{transform}-{objective}-{seed}{suffix}"
        if not train.is_finished(folder):  # The text of finished runs may be gone.
            train.prepare(args, s, args.out)  # once, before processes would do it side by side
        jobs.append(joblib.delayed(run_cell)(folder, s, examples, args))
    os.environ["TQDM_DISABLE"] = "1"  # in the processes to come: one bar is enough
    # joblib shares the cores out: two jobs on two cores have one thread each.
    where = {"n_jobs": args.jobs}
    if args.scheduler:  # joblib has a backend for Dask, which needs the package `distributed`.
        where = {"backend": "dask", "scheduler_host": args.scheduler}
    with joblib.parallel_config(**where):
        # Results come as they are finished, so that the bar moves.
        done = joblib.Parallel(return_as="generator_unordered")(jobs)
        failures = list(filter(None, tqdm(done, "cells", len(jobs))))
    # What is finished is reported, even if something failed.
    if len(failures) < len(jobs):
        report(args.out, args.out)
    if failures:
        count = f"{len(failures)} of {len(jobs)} cells failed"
        raise ValueError(f"{count}; the same command goes on; {'; '.join(failures)}")

def main():
    parser = synth_lang.Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    # The options of a task's files, which the tasks and the grid share.
    files = synth_lang.Parser(add_help=False)
    option = files.add_argument
    option("--train", nargs="+", default=[], help="examples to learn from, a file for each task")
    option("--test", nargs="+", default=[], help="the same to test on (default: built-in ones)")
    option("--language", default="en", help="to take of an NLI file that has several (%(default)s)")
    for name in TASKS:
        task = commands.add_parser(name, parents=[files], help="fine-tune and test one run")
        task.add_argument("folder", type=Path, help="of a run of train.py")
    runs = commands.add_parser("report", help="tables and figures of finished runs")
    runs.add_argument("folder", type=Path, help="that has the runs' folders")
    runs.add_argument("--results", type=Path, help="folder to write to (default: the same)")
    many = commands.add_parser("grid", parents=[files], help="train many runs, and report")
    # By default it is what `make run` does.
    option = many.add_argument
    shown = {"help": "(%(default)s)", "nargs": "+"}
    option("--out", type=Path, default=Path("runs/tiny"), help="folder for the runs (%(default)s)")
    option("--objectives", choices=OBJECTIVES, default=list(OBJECTIVES), **shown)
    option("--transforms", default=["transliterate+invert"], **shown)
    option("--seeds", type=int, default=2, help="how many (%(default)s)")
    option("--tasks", choices=TASKS, default=["pos"], **shown)
    option("--vary", nargs="+", help="an ablation: a setting and its values")
    option("--jobs", type=int, default=-1, help="cells at a time (as many as there are cores)")
    option("--scheduler", help="address of a Dask cluster whose workers have one thread each")
    # A grid has several of these, and so they have options of their own.
    train.add_options(many, left_out=GRID_SETTINGS)
    args = parser.parse_args()
    if args.command == "grid":
        grid(args)
    elif args.command == "report":
        report(args.folder, args.results or args.folder)
    else:
        examples = read_examples([args.command], args)[args.command]
        print(json.dumps(evaluate(args.folder, args.command, examples), indent=2))

if __name__ == "__main__":
    synth_lang.guarded(main)
