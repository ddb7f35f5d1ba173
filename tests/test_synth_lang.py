"""synth_lang.py: the transformations, the built-in language and the command line."""
# ruff: noqa: SIM905  (a sentence is easier to read in one string; marks of all scripts)

import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

import synth_lang as sl
from synth_lang import InputError, Sentence, generate, restore, transform

UPOS = set("ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split())
RELATIONS = "nsubj obj obl advmod amod det case acl:relcl punct conj nmod:poss flat".split()
NAMES = ["transliterate", "invert", "permute", "syntax"]
names = st.lists(st.sampled_from(NAMES), max_size=5)
any_text = st.text(st.characters(exclude_categories=()), max_size=5)  # lone surrogates too
any_word = st.sampled_from([".", "!", "。", "...", "a", "\ud800"]) | any_text

def is_tree(heads):
    """There is one root, and the head of the head of ... any word is at last 0."""
    above = reached = np.array([0, *heads])
    for _ in heads:
        reached = above[reached]
    return heads.count(0) == 1 and not reached.any()

def is_bio(tags):
    pairs = itertools.pairwise(["O", *tags])
    return all(tag[0] != "I" or before[1:] == tag[1:] for before, tag in pairs)

@st.composite
def sentences(draw, form=any_word):
    """Any words with any labels: a tree that need not be projective, BIO that may be ill formed."""
    words = draw(st.lists(form, max_size=9))
    below = draw(st.permutations(range(len(words))))
    heads = [0] * len(words)
    for rank in range(1, len(words)):
        heads[below[rank]] = below[draw(st.integers(0, rank - 1))] + 1
    return Sentence(
        words,
        [draw(st.sampled_from(["NOUN", "VERB", "PROPN", "ADJ", "PUNCT"])) for _ in words],
        heads,
        [draw(st.sampled_from(RELATIONS)) for _ in words],
        [draw(st.sampled_from(["O", "B-PER", "I-PER", "I-LOC"])) for _ in words],
    )

# ------------------------------------------------------------------------------- transformations
@given(sentences(), names, st.integers(0, 99), st.integers(0, 99))
def test_restore_is_the_inverse_and_a_composition_is_its_parts(sentence, names, seed, index):
    derived, steps = transform(sentence, names, seed=seed, index=index)
    assert restore(derived, steps) == sentence
    assert is_bio(derived.entities) or not names
    # train.py transliterates ids of sub-words, and relies on it that this changes no order.
    others = [name for name in names if name != "transliterate"]
    _, plain = transform(sentence, others, seed, index)
    _, spelled = transform(sentence, ["transliterate", *others], seed, index)
    assert [places for _, places, _ in spelled[1:]] == [places for _, places, _ in plain]
    for name in names:
        sentence, _ = transform(sentence, [name], seed, index)
    assert sentence == derived

@given(sentences(), st.lists(st.sampled_from(NAMES[1:]), max_size=4))
def test_labels_and_trees_travel_with_the_words(sentence, names):
    def facts(s):
        heads = [s.words[head - 1] if head else None for head in s.heads]
        types = [tag[1:] for tag in s.entities]
        return set(zip(s.words, s.upos, heads, s.deprels, types, strict=True))

    sentence.words = [f"word{number}" for number in range(len(sentence.words))]
    derived, _ = transform(sentence, names)
    assert facts(derived) == facts(sentence)
    assert not derived.words or is_tree(derived.heads)

def test_an_entity_comes_out_as_one():
    words, tags = "x Ann Mary Lee Bo y".split(), ["O", "B-PER", "I-PER", "I-PER", "B-PER", "O"]
    derived, _ = transform(Sentence(words, entities=tags), ["invert"])
    assert derived.words == "y Bo Lee Mary Ann x".split()
    assert derived.entities == ["O", "B-PER", "B-PER", "I-PER", "I-PER", "O"]

@pytest.mark.parametrize("words, expected", [
    ("a b c .", "c b a ."), ("a b !", "b a !"), ("a b", "b a"), ("a ?", "a ?"), (". a", "a ."),
    ("a . .", ". a ."), ("a b ,", ", b a"), ("?", "?"), ("", ""), ("a b …", "b a …"),
    ("a b ...", "b a ..."), ("a b ?!", "b a ?!"), ("我 去 。", "去 我 。"),
    ("我 去 ！", "去 我 ！"), ("यह घर ।", "घर यह ।"), ("هل تأتي ؟", "تأتي هل ؟"),
])  # fmt: skip
def test_inversion_keeps_the_final_mark_last(words, expected):
    assert transform(Sentence(words.split()), ["invert"])[0].words == expected.split()
    derived = transform(Sentence(words.split()), ["transliterate", "invert"])[0]
    assert derived.words == list(map(sl.transliterate_word, expected.split()))

def test_permutation_depends_on_seed_and_index():
    sentence, contexts = Sentence(list("abcdefghijkl")), itertools.product(range(10), repeat=2)
    assert len({str(sl.permuted_order(sentence, seed, index)) for seed, index in contexts}) == 100

@given(any_text, any_text)
def test_transliteration_is_a_bijection_onto_a_printable_script(one, other):
    braille = sl.transliterate_word(one)
    assert all("\u2800" <= char <= "\u28ff" for char in braille)
    assert len(braille.split()) == bool(one)  # no white space
    assert sl.restore_word(braille) == one
    assert (braille == sl.transliterate_word(other)) == (one == other)

@pytest.mark.parametrize("word", ["abc", "\u28ff", "\u28c3\u2800", "\u2900"])
def test_what_is_no_transliteration_is_refused(word):
    with pytest.raises(InputError, match="no transliterated word"):
        sl.restore_word(word)

@given(sentences())
def test_a_fifth_transformation_is_one_entry_and_one_function(sentence):
    def first_word_last(sentence, **context):
        return [*range(1, len(sentence.words)), 0][: len(sentence.words)]

    def mirrored(word):
        return word[::-1]

    fifth = sl.Transformation(first_word_last, spell=mirrored, unspell=mirrored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sl.TRANSFORMS, "fifth", fifth)
        derived, steps = transform(sentence, sl.parse_transform("fifth+syntax+fifth+transliterate"))
        assert restore(derived, steps) == sentence and is_bio(derived.entities)
        assert transform(Sentence(["a", "b", "cd"]), ["fifth"])[0].words == ["b", "dc", "a"]

# ---------------------------------------------------------------------------------------- syntax
RED_HOUSE = Sentence(
    "the red house has walls .".split(), "DET ADJ NOUN VERB NOUN PUNCT".split(),
    [3, 3, 4, 0, 4, 4], "det amod nsubj root obj punct".split())  # fmt: skip

def test_order_is_learned_applied_and_kept_as_json():
    assert transform(RED_HOUSE, ["syntax"])[0].words == "the house red walls has .".split()
    backwards, _ = transform(RED_HOUSE, ["invert"])
    learned = sl.learn_order([RED_HOUSE])
    for model in (learned, json.loads(json.dumps(learned))):
        assert transform(backwards, ["syntax"], order=model)[0].words == RED_HOUSE.words
    back = sl.learn_order([backwards])
    assert transform(RED_HOUSE, ["syntax"], order=back)[0].words == backwards.words

def test_an_unseen_pair_keeps_its_order_and_punctuation_its_place():
    first = Sentence([".", "fell"], ["PUNCT", "VERB"], [2, 0], ["punct", "root"])
    for order in ({}, sl.learn_order([first] * 9)):
        assert transform(RED_HOUSE, ["syntax"], order=order)[0] == RED_HOUSE

def test_a_cycle_of_heads_keeps_its_words():
    cycle = Sentence(["a", "b"], ["NOUN", "NOUN"], [2, 1], ["nmod", "nmod"])
    assert sorted(transform(cycle, ["syntax"])[0].words) == ["a", "b"]

def test_smoothing_falls_back_on_the_relation():
    """Never seen with this tag, the adjective goes where other `amod` go; and names are nouns."""
    model = {"NOUN head amod": 3}
    verbal = Sentence(["walking", "stick"], ["VERB", "PROPN"], [2, 0], ["amod:x", "root"])
    assert transform(verbal, ["syntax"], order=model)[0].words == ["stick", "walking"]
    model["NOUN amod/VERB head/PROPN"] = 9  # Once seen with its tag, it goes there.
    assert transform(verbal, ["syntax"], order=model)[0].words == ["walking", "stick"]

orders = st.dictionaries(st.from_regex(r"\AVERB [abcd] [abcd]\Z"), st.integers(0, 2), min_size=6)

@given(orders, st.lists(st.sampled_from("abcd"), max_size=6))
def test_who_wins_over_more_of_the_others_stands_first(order, row):
    def points(place):
        leads = [order.get(f"VERB {row[place]} {other}", 0)
                 - order.get(f"VERB {other} {row[place]}", 0) for other in row]  # fmt: skip
        return sum(np.sign(leads))

    items = {place: f"{kind}/NOUN" for place, kind in enumerate(row)}
    # The sort keeps the order of equals.
    assert sl.arrange(order, "VERB", items) == sorted(items, key=points, reverse=True)

def test_subtrees_move_as_wholes_and_gaps_close():
    """A tree that is not projective: "a hearing is scheduled on the issue today" (McDonald)."""
    words = "a hearing is scheduled on the issue today .".split()
    heads = [2, 4, 4, 0, 7, 7, 2, 4, 4]
    upos = "DET NOUN AUX VERB ADP DET NOUN NOUN PUNCT".split()
    deprels = "det nsubj:pass aux root case det nmod obl punct".split()
    derived, _ = transform(Sentence(words, upos, heads, deprels), ["syntax"])
    assert derived.words == "a the issue on hearing today scheduled is .".split()

def test_long_chains_and_wide_rows_take_seconds():
    rng = random.Random(0)
    relations = [rng.choice(RELATIONS) for _ in range(1600)]
    begin = time.monotonic()
    # A chain is deeper than Python's recursion, and a list has 1,599 dependents of one head.
    for heads in (range(1600), [0] + [1] * 1599):
        sentence = Sentence(["w"] * 1600, ["NOUN"] * 1600, list(heads), relations)
        derived, steps = transform(sentence, ["syntax", "invert"])
        assert restore(derived, steps) == sentence
    assert time.monotonic() - begin < 20

@pytest.mark.parametrize("labels", [{}, {"upos": ["NOUN"]}, {"heads": [0], "deprels": ["root"]}])
def test_syntax_alone_asks_for_trees(labels):
    sentence = Sentence(["a"], **labels)
    with pytest.raises(InputError, match="needs tags and trees; give CoNLL-U"):
        transform(sentence, ["syntax"])
    assert transform(sentence, ["invert", "permute", "transliterate"])

def test_english_in_french_order_puts_adjectives_after_nouns(real_data):
    english = list(sl.read_conllu(real_data / "ud" / "en_ewt-ud-test.conllu"))
    french = list(sl.read_conllu(real_data / "ud" / "fr_gsd-ud-test.conllu"))
    for like, usual in ((english, "NOUN amod head"), (french, "NOUN head amod")):
        order = sl.learn_order(like)
        counts = sl.learn_order(transform(s, ["syntax"], order=order)[0] for s in english)
        assert counts[usual] > 0.9 * (counts["NOUN amod head"] + counts["NOUN head amod"])

# ---------------------------------------------------------------------------------- the language
@cache
def language():
    return list(generate(12_000, seed=1)), list(generate(3_000, seed=2))

@cache
def pairs():
    return list(sl.generate_inferences(8001, seed=1))

def digest(sentences):
    columns = [[s.words, s.upos, s.heads, s.deprels, s.entities] for s in sentences]
    return hashlib.sha256(repr(columns).encode()).hexdigest()[:16]

def test_the_language_is_the_one_that_scores_were_measured_with():
    """Its sentences, pairs and derived sentences stay as they are, in any process, whatever its
    hashes of strings are."""
    assert digest(generate(2000, seed=7)) == "8b6ee832b9287b03"
    assert digest(pair.hypothesis for pair in pairs()[:1000]) == "a7167fb0fe587b65"
    moved = [transform(s, NAMES, 5, index)[0] for index, s in enumerate(generate(200, seed=9))]
    assert digest(moved) == "0fb98a10c4650976"
    assert digest(generate(200, seed=8)) != digest(generate(200, seed=9))

def test_generated_sentences_and_pairs_are_valid():
    short = [s for pair in pairs()[:1000] for s in (pair.premise, pair.hypothesis)]
    for s in language()[1] + short:
        assert is_tree(s.heads) and is_bio(s.entities) and set(s.upos) <= UPOS
        # Only trees without crossing arcs keep their order if an empty model orders them.
        assert sl.syntax_order(s, order={}) == list(range(len(s.words)))
        assert s.words[-1] in {".", "!", "?"} and " ".join(s.words).split() == s.words
        assert [deprel == "root" for deprel in s.deprels] == [head == 0 for head in s.heads]
        for upos, tag in zip(s.upos, s.entities, strict=True):
            assert upos == "PROPN" if tag[0] == "B" else upos in ("PROPN", "ADP") or tag == "O"
    for pair in pairs():
        # Neither the lengths nor the tags tell anything of the label.
        assert len(pair.hypothesis.words) + 1 == len(pair.premise.words) <= 10
        assert pair.hypothesis.upos.count("ADJ") == 1
    assert Counter(pair.label for pair in pairs()) == dict.fromkeys(sl.INFERENCES, 2667)

def share_guessed(cues_of, train, test):
    """How often a word has the tag that was the most frequent one where its cue was the same."""
    known = defaultdict(Counter)
    for s in train:
        for cue, tag in zip(cues_of(s), s.upos, strict=True):
            known[cue][tag] += 1
    right = []
    for s in test:
        for cue, tag in zip(cues_of(s), s.upos, strict=True):
            right.append(tag == max(known[cue], key=known[cue].get, default=None))
    return np.mean(right)

def test_tags_need_the_word():
    """A word's most frequent tag is right 93 to 97 times in a hundred; its neighbours' tags tell
    about half, as in natural text (EWT: 83 and 51); and reversed, they mislead."""
    def neighbours(s):
        return zip(["^", *s.upos[:-1]], [*s.upos[1:], "$"], strict=True)

    train, test = language()
    assert 0.93 < share_guessed(lambda s: s.words, train, test) < 0.97
    assert 0.4 < share_guessed(neighbours, train, test) < 0.55
    assert share_guessed(neighbours, train, [transform(s, ["invert"])[0] for s in test]) < 0.3

# ------------------------------------------------------------------------------------- inference
NEGATIONS = set(sl.CLOSED_CLASSES["negation"].partition(":")[2].split())

def test_labels_are_true():
    """The label, worked out from the words alone, in a second way."""
    senses, edits, wrong = defaultdict(set), Counter(), 0
    for name in ("person", "thing", "place"):
        size = int(sl.OPEN_CLASSES[name].split()[1])
        for topic, rank in itertools.product(range(sl.TOPICS), range(size)):
            for form in sl.open_word(name, topic, rank)[0]:
                senses[form].add((name, topic, rank))
    for pair in pairs():
        premise, hypothesis = set(pair.premise.words), set(pair.hypothesis.words)
        new = hypothesis - premise - NEGATIONS
        # A noun is more general if it is the most frequent one of its class and topic, rank 0.
        general = {(*sense[:2], 0) for word in premise for sense in senses[word]}
        if hypothesis & NEGATIONS != premise & NEGATIONS:
            assert len(new) <= 1  # the adverb that takes the place of a negation
            edit, label = "negated", "contradiction"
        elif not new:
            edit, label = "omitted", "entailment"
        elif any(senses[word] & general for word in new):
            edit, label = "general", "entailment"
        else:
            edit, label = "other", "neutral"
        edits[edit] += 1
        wrong += label != pair.label
    assert wrong < 0.005 * len(pairs())  # Homonyms are rare.
    assert len(edits) == 4 and min(edits.values()) > 300

def new_words(pair):
    return [f"new {word}" for word in {*pair.hypothesis.words} - {*pair.premise.words}]

@pytest.mark.parametrize("features, least, most", [
    (lambda pair: pair.premise.words, 0, 0.38),
    (lambda pair: pair.hypothesis.words, 0.6, 0.7),
    (lambda pair: pair.hypothesis.words + new_words(pair), 0.85, 0.95),
])
def test_words_carry_most_of_the_evidence(features, least, most):
    labels = [pair.label for pair in pairs()]
    bayes = make_pipeline(CountVectorizer(analyzer=features, binary=True), MultinomialNB())
    bayes.fit(pairs()[:6000], labels[:6000])
    assert least < bayes.score(pairs()[6000:], labels[6000:]) < most

# ------------------------------------------------------------------------------ the command line
CONLLU = """# sent_id = 1
# text = vámonos al mar
1-2\tvámonos\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No
1\tvamos\tir\tVERB\tV\tMood=Imp\t0\troot\t0:root\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t1:obj\tEntity=B-PER
2.1\tempty\t_\t_\t_\t_\t_\t_\t1:dep\t_
3-4\tal\t_\t_\t_\t_\t_\t_\t_\t_
3\ta\ta\tADP\t_\t_\t5\tcase\t5:case\tGloss=to|Entity=I-PER
4\tel\tel\tDET\t_\t_\t5\tdet\t5:det\t_
5\tmar\tmar\tNOUN\t_\t_\t1\tobl\t1:obl\tEntity=I-LOC|x=y

# a comment alone

# sent_id = 2
1\ta b\u2028c\t_\tX\t_\t_\t_\t_\t_\t_

"""

def kept(content):
    """What comes back of a treebank: all but multi-word tokens, "3-4", and empty nodes, "3.1"."""
    return re.sub(r"(?m)^\d+[-.]\d+\t.*\n", "", content)

def run(*arguments, stdin=None):
    command = [sys.executable, sl.__file__, *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, input=stdin)

def there_and_back(folder, content, names):
    file, out = f"{folder}/file", f"{folder}/out"
    Path(file).write_bytes(content.encode())
    sl.main(["transform", "--transform", names, file, "-o", out])
    sl.main(["restore", out, "-o", f"{folder}/back"])
    assert sorted(path.name for path in folder.iterdir()) == ["back", "file", "out"]
    return (folder / "back").read_bytes().decode()

@pytest.mark.parametrize("names", ["transliterate+invert", "permute", "invert+permute"])
def test_a_treebank_is_restored_from_itself(tmp_path, names):
    assert there_and_back(tmp_path, CONLLU, names) == kept(CONLLU)
    derived = next(sl.read_conllu(tmp_path / "out"))
    assert is_bio(derived.entities) and is_tree(derived.heads)
    once = (tmp_path / "out").read_bytes().decode()
    assert "|Old=5:1:mar\n" in once and "# sent_id = 1\n# text = vámonos al mar\n" in once
    assert there_and_back(tmp_path, once, "permute+invert") == once

def test_a_real_treebank_is_restored(tmp_path, real_data):
    content = (real_data / "ud" / "fr_gsd-ud-test.conllu").read_bytes().decode()
    assert there_and_back(tmp_path, content, "transliterate+syntax") == kept(content)

cells = st.text(st.characters(exclude_characters="\t\n\r", codec="utf-8"), max_size=4)

@settings(max_examples=60)
@given(st.lists(sentences(cells), min_size=1, max_size=3), st.data())
def test_any_treebank_is_restored(tmp_path_factory, treebank, data):
    content = ""
    for number, sentence in enumerate(treebank):
        content += f"# sent_id = {number}\n"
        for word, form in enumerate(sentence.words, start=1):
            columns = [data.draw(cells) or "x" for _ in range(10)]
            columns[0], columns[1], columns[3] = str(word), form, sentence.upos[word - 1]
            columns[6], columns[7] = str(sentence.heads[word - 1]), sentence.deprels[word - 1]
            content += "\t".join(columns) + "\n"
        content += "\n"
    if all(len(s.words) < 2 or set(s.words) != {"_"} for s in treebank) and treebank[0].words:
        names = data.draw(st.sampled_from(["transliterate+syntax", "invert", "syntax+permute"]))
        assert there_and_back(tmp_path_factory.mktemp("x"), content, names) == content

def test_files_hold_what_the_functions_give(tmp_path):
    folder = tmp_path / "new" / "place"
    file, inverted, out = (f"{folder}/{name}" for name in ("original.conllu", "inverted", "out"))
    sl.main(["generate", "--sentences", "60", "--seed", "6", "--out", str(folder)])
    assert [path.name for path in folder.iterdir()] == ["original.conllu"]
    originals = list(generate(60, seed=6))
    assert list(sl.read_conllu(file)) == originals
    sl.main(["transform", "--transform", "invert", file, "-o", inverted])
    order = sl.learn_order(sl.read_conllu(inverted))
    options = ["--transform", "syntax+permute", "--order", inverted, "--seed", "3"]
    sl.main(["transform", *options, file, "-o", out])
    for index, (old, new) in enumerate(zip(originals, sl.read_conllu(out), strict=True)):
        assert new == transform(old, ["syntax", "permute"], 3, index, order)[0]

def test_text_is_derived_sentence_by_sentence_also_from_a_pipe(tmp_path):
    out = tmp_path / "out"
    inversion = ["transform", "--transform", "invert", "-o", out]
    assert run(*inversion, stdin="  One, two! Three\r\n\r\nfour.").returncode == 0
    assert out.read_text() == "two , One !\nThree\nfour .\n"
    assert run(*inversion, stdin=CONLLU).returncode == 0
    assert run("restore", "/dev/stdin", "-o", out, stdin=out.read_text()).returncode == 0
    assert out.read_text() == kept(CONLLU)

@pytest.mark.parametrize("arguments, message", [
    ("transform text --transform invert,permute", "are transliterate, invert, permute, syntax"),
    ("transform text --transform invert+", "no transformation ''"),
    ("transform text --transform syntax", "syntax needs tags and trees"),
    ("transform short", "short:4: 9 columns"),
    ("restore good", "good:1: MISC without Old="),
    ("generate --seed", "argument --seed: expected one argument"),
    ("translate text", "invalid choice: 'translate'"),
    ("generate --out good/below", "Not a directory"),
    ("transform text --out pipe", "pipe: no regular file"),
])
def test_bad_input_gives_one_line_and_status_2(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["synth_lang.py"])
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("good").write_text(CONLLU)
    Path("short").write_text(CONLLU.replace("0:root\t_\n", "0:root\n"))
    Path("text").write_text("Some text.\n")
    before = set(Path().rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        sl.guarded(lambda: sl.main(["-o", "out", *arguments.split()]))
    error = capsys.readouterr().err
    assert error.startswith("synth_lang.py: ") and error.count("\n") == 1
    assert message in error and ("; " in error or "Errno" in error)
    assert set(Path().rglob("*")) == before

def test_ctrl_c_gives_one_line_and_status_130(tmp_path):
    command = [sys.executable, sl.__file__, "transform", "-o", tmp_path / "out"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdin.write("A sentence.\n" * 100_000)  # more than a pipe holds: it is being read
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and error == "\nsynth_lang.py: interrupted\n"
    assert not any(tmp_path.iterdir())
