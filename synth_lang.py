"""A synthetic language, and the transformations that derive a second language from any first one.

ALIGN-MLM (Tang et al. 2022, arXiv 2211.08547) asks what makes a model multilingual with pairs of
languages whose every difference is known: the second is *derived* from the first.

    transliterate   another script: a bijection of the words
    invert          the words in reverse; a final '.', '!' or '?' stays last
    permute         the words of each sentence at random, seeded
    syntax          the dependents of nouns and verbs in another language's order, learned

They compose (`transliterate+invert`), labels travel with their words, and each returns what its
exact inverse needs. Before them come a built-in first language and readers for others.
"""

import argparse
import json
import random
import re
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate, chain, combinations, count, pairwise, permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np


class InputError(ValueError):
    """The user's input is at fault: one line that names the place and the mend."""


@dataclass(slots=True)
class Sentence:
    """Words and their labels; a list of labels, where there is one, has one entry a word."""

    words: list[str]
    upos: list[str] | None = None  # tags of Universal Dependencies
    heads: list[int] | None = None  # of each word its head's 1-based position; 0 for the root
    deprels: list[str] | None = None  # relations of Universal Dependencies
    entities: list[str] | None = None  # BIO tags: `B-PER`, `I-PER`, `O`
    spans: list[tuple[int, int]] = field(default_factory=list)  # answers: 0-based, half-open


INFERENCES = ("entailment", "neutral", "contradiction")


@dataclass(slots=True)
class Inference:
    """Two sentences, and which of INFERENCES holds: the premise entails the hypothesis, or..."""

    premise: Sentence
    hypothesis: Sentence
    label: str


@dataclass(slots=True)
class Question:
    """A question and the text that it is asked of: the `spans` of its sentences are the answers."""

    question: Sentence
    context: list[Sentence]


# ---------------------------------------------------------------------------------- the language
# `a = b|c*2`: an `a` is one of these, `c` twice as likely. Any other line is a rule: a phrase, the
# chance that it has a dependent (`*`: again and again), the place and relation of that, and what it
# is. Rules apply from top to bottom; `a+x` is an `a` that follows the rules of `x` too. Places: `[`
# first of the row so far, `]` last, `<` just before the top, `>` just after; of several, one at
# random. `of/ADP` is that word with its tag.
# A word's tag must need the word, as in natural text (where the tags of both neighbours tell half
# of the tags, the word itself nine in ten): so words have several tags, and much may be left out or
# stand elsewhere. Still order tells: reversed, the sentences look like no other.
GRAMMAR = """
sentence    = finite+aside+end*9|thing+noun+aside+end
finite      = verb+subject+tense+adverbials*6|adjective+subject+being+adverbials
relative    = verb+tense+adverbials+as-subject*3|act+subject+tense+adverbials+as-object*2
verb        = affect*5|act*4|give*4|say*2
agent       = person+noun*4|thing+noun*2|he*4|PER|institution
object      = thing+noun*3|idea+noun*2|person+noun*2|place+noun|him*3|PER|ORG|amount
setting     = place+noun*3|thing+noun*2|idea+noun|LOC*3|him*2
affect      1     ]]]]][   obj           object
give        .3    >        iobj          person+noun*2|him
give        1     ]]]]][   obj           object
say         .7    ]]]]][   ccomp         finite|finite+mark
say         .3    ]        xcomp         give+to+adverbials|act+to+adverbials
subject     .88   [[[[>]   nsubj         agent
tense       .4    [<<<<<   aux           modal*4|have*3|be*3|do*3
being       .85   [<<<<<   cop           be
adverbials  .08   <<>      advmod        not/PART
adverbials  .1    >]       compound:prt  particle
adverbials  .24*  [<>]     advmod        free*4|manner+degree*4|fast
adverbials  .3*   [<>]     obl           setting+case
adverbials  .07   []       advcl         finite+mark
adverbials  .12   ]        conj          finite+joined
to          1     <        mark          to/PART
mark        1     [        mark          subordinator
as-subject  1     [        nsubj         who
as-object   .6    [        obj           who
noun        .06   <        compound      thing
noun        .3*   [[]      amod          adjective+degree*5|participle
noun        .06   [[]      nummod        number
noun        .44   [        det           determiner
noun        .07   [        nmod:poss     his*2|PER+genitive
noun        .16   ]        nmod          setting+case
noun        .07   ]        conj          object+joined
noun        .1    ]        acl:relcl     relative
degree      .15   [        advmod        degree-word
adjective   .08   ]        conj          adjective+joined
case        .9    [        case          adposition
genitive    1     ]        case          's/PART
amount      1     []       nummod        number
joined      1     [        cc            conjunction
joined      .2    [        punct         ,/PUNCT
PER         .4    ]        flat          surname
LOC         .3    [        compound      North/PROPN|Lake/PROPN|New/PROPN
ORG         .6    ]        flat          Company/PROPN|Club/PROPN|Press/PROPN
institution 1     ]        nmod          LOC+of
of          1     [        case          of/ADP
aside       .07   []       discourse     interjection
aside       .04   ]        vocative      PER
end         1     ]        punct         ./PUNCT*6|!/PUNCT|?/PUNCT
"""

# Closed classes: tag, and words, frequent ones first; after `/` those for the plural. Open classes:
# tag, how many words a topic has, the endings of their forms (a noun's numbers; a verb's -s, base,
# -ed, -ing), and the class whose stems they share, if any. A sentence mostly keeps to the words of
# a topic, and each head to its favourites in it: beyond its tag a word is known by its company.
WORDS = """
determiner    DET   the a this that every some no another each any / the all some these no those
he            PRON  it he she this that someone one / they we you these all some many those
him           PRON  it him her that this one nothing / them us you all these some those
his           PRON  its his her one's / their our your
who           PRON  that who which
be            AUX   is was / are were
have          AUX   has had / have had
do            AUX   does did / do did
modal         AUX   will can would must may could should might
adposition    ADP   of in to with on for at from by about like over under after near before since
particle      ADP   up out off down over in on around by past
subordinator  SCONJ if because when after while since before as until like though so
conjunction   CCONJ and or but yet nor so
free          ADV   then now when so there still how never just once too before well soon around
degree-word   ADV   very so too quite more almost rather just even
interjection  INTJ  oh well no yes so please look right
number        NUM   two 3 ten four 12 seven 5 one 40 six 1984 nine 100
amount        SYM   % $ £
institution   PROPN University Bank Museum
person        NOUN  8  -,s
thing         NOUN  10 -,s
place         NOUN  6  -,s
idea          NOUN  8  -,s
act           VERB  7  s,-,ed,ing
affect        VERB  5  s,-,ed,ing thing
give          VERB  6  s,-,ed,ing
say           VERB  4  s,-,ed,ing
adjective     ADJ   12 -
participle    ADJ   5  ed         affect
manner        ADV   12 ly         adjective
fast          ADV   5  -          adjective
PER           PROPN 10 -
LOC           PROPN 8  -
ORG           PROPN 6  -
surname       PROPN 8  -          LOC
"""
TOPICS = 24
ENDING = {"modal": 1, "do": 1, "to/PART": 1, "have": 2, "be": 3}  # that a verb has beside these
ENTITIES = {"PER": "PER", "LOC": "LOC", "ORG": "ORG", "institution": "ORG"}
RECURSIVE = {"conj", "ccomp", "xcomp", "advcl", "acl:relcl", "nmod"}


@cache
def _language() -> tuple[dict, dict, dict]:
    """The phrases that are others; the rules of each phrase; the classes of words."""
    phrases, rules, classes = {}, {}, {}
    for name, first, *rule, text in map(str.split, GRAMMAR.splitlines()[1:]):
        weighted = [option.partition("*") for option in text.split("|")]
        options = [way.split("+") for way, _, times in weighted for _ in range(int(times or 1))]
        if first == "=":
            phrases[name] = options
        else:
            rule = float(first.strip("*")), "*" in first, *rule, options
            rules.setdefault(name, []).append(rule)
    for name, tag, *rest in map(str.split, WORDS.splitlines()[1:]):
        if rest[0].isdecimal():
            classes[name] = tag, int(rest[0]), rest[1].split(","), (rest[2:] or [name])[0]
        else:
            numbers = [words.split() for words in " ".join(rest).split(" / ")]
            classes[name] = tag, 0, numbers[0], numbers[-1]
    return phrases, rules, classes


@cache
def _word(leaf: str, topic: int, rank: int) -> tuple[list[str], int]:
    """The forms of a word of an open class, and a number that decides its company."""
    tag, _, endings, source = _language()[2][leaf]
    rng = random.Random(f"{source} {topic} {rank}")  # nothing else: no text's seed
    parts = (
        "b bl br c ch cl cr d dr f fl fr g gr h j l m n p pl pr qu r s sh sl sp st t tr v w",
        "a e i o u a e i o u ai ea ee oo ou",
        "b ct d ft ld lk ll lm lp lt m mp n nd ng rb rd rk rl rm rn rp sk sp st",
        "ant el en er et il in om or ow",
    )
    stem = "".join(rng.choice(part.split()) for part in parts[: 3 + (rank > 0)])
    stem = stem.capitalize() if tag == "PROPN" else stem
    return [stem + ending.strip("-") for ending in endings], rng.randrange(1000)


class Node(SimpleNamespace):
    """A word of a phrase in the making, and what is known of it."""

    __eq__, __hash__ = object.__eq__, object.__hash__  # each is itself


ABOVE = Node(position=0, upos="", number=0, depth=0)  # the root's head


def _top(random, topic: int, leaf: str, deprel: str, head: Node) -> Node:
    """The word at the top of a phrase. Its form is chosen when its dependents are known."""
    plural = random() < 0.35 and deprel != "compound"
    if leaf == "who" or deprel in ("det", "aux", "cop", "acl:relcl"):
        plural = head.plural  # agreement
    word, _, upos = leaf.partition("/")
    forms, number, rank = [word], 0, 0
    if not upos:
        upos, size, *lists = _language()[2][leaf]
        rank = int(((size or len(lists[plural])) + 1) ** random()) - 1  # Zipf: about 1 / (rank + 1)
        if size:
            rank += head.number if random() < 0.6 else 0  # the head's favourites come first
            topic = topic if random() < 0.85 else int(random() * TOPICS)
            rank %= size
            forms, number = _word(leaf, topic, rank)
        else:
            forms = [lists[plural][rank]]
    if leaf in ENDING and head.upos == "VERB":
        head.form = ENDING[leaf]
    form = {"NOUN": None, "VERB": None if random() < 0.55 else 2}.get(upos, 0)  # None: by number
    return Node(forms=forms, form=form, upos=upos, deprel=deprel, head=head, number=number,
                plural=plural and upos != "PROPN", depth=head.depth + (deprel in RECURSIVE),
                entity="O", leaf=leaf, topic=topic, rank=rank)  # fmt: skip


def _phrase(random, topic: int, options: list, deprel: str, head: Node) -> list[Node]:
    """The Nodes of a random phrase. Phrases stand side by side, so that trees are projective."""
    phrases, rules, _ = _language()
    applied = []
    while options:
        leaf, *more = options[int(random() * len(options))]
        applied = [*chain(*(rules.get(name, ()) for name in (leaf, *more))), *applied]
        options = phrases.get(leaf)
    top = _top(random, topic, leaf, deprel, head)
    row, at = [[top]], 0
    for chance, repeated, places, relation, dependent in applied:
        if relation in RECURSIVE:
            chance *= 0.6**top.depth  # the deeper the rarer, so that sentences end
        while random() < chance:
            words = _phrase(random, topic, dependent, relation, top)
            to = {"[": 0, "<": at, ">": at + 1, "]": len(row)}[places[int(random() * len(places))]]
            row.insert(to, words)
            at += to <= at
            if not repeated:
                break
    if deprel in ("nsubj", "nummod"):
        head.plural = top.plural or deprel == "nummod"
    if top.form is None:  # she looks, they look; a look, two looks
        top.form = int(top.plural)
    nodes = list(chain(*row))
    if leaf in ENTITIES:  # an outer name overrules those inside it
        name = [n for n in nodes if n.head is not top or n.deprel not in ("case", "cc", "punct")]
        for node in name:
            node.entity = ("B-" if node is name[0] else "I-") + ENTITIES[leaf]
    return nodes


def _sentence(nodes: list[Node]) -> Sentence:
    for position, node in enumerate(nodes, start=1):
        node.position = position
    rows = [(n.forms[n.form], n.upos, n.head.position, n.deprel, n.entity) for n in nodes]
    return Sentence(*map(list, zip(*rows, strict=True)))


def generate(n: int, seed: int = 0) -> Iterator[Sentence]:
    """`n` random sentences of the built-in language: words, tags, trees, entities.

    The same (n, seed) gives the same in any process; another seed, others of the same language.
    """
    uniform = random.Random(seed).random
    for _ in range(n):
        topic = int(TOPICS * uniform() ** 2)  # some are more frequent than others
        yield _sentence(_phrase(uniform, topic, _language()[0]["sentence"], "root", ABOVE))


# ---------------------------------------------------------------------- inferences and questions
# Premise and hypothesis tell of the same things and of one event. What a noun's modifiers say is a
# fact of its own, out of the reach of `not`: so only nouns are made more or less precise, and what
# that does to the label is the same with a `not` and without. Rank 0 of the nouns of a class and
# topic is the general word for the others; adjectives of ranks 2k and 2k + 1 are opposites. Where
# scope would matter no sentence is taken: several clauses, quantifiers, "may" (it may, it may not).
CLAUSE = [[verb, "subject", "tense", "adverbials", "end"] for verb in ("affect", "give")]
WIDE = "no not never every each all any some someone many another one one's nothing may might could"
MODIFIERS = [("amod", ["adjective"]), ("amod", ["participle"]), ("nmod", ["setting", "case"])]


def _plain(nodes: list[Node]) -> bool:
    words, clauses = {node.forms[node.form] for node in nodes}, RECURSIVE - {"nmod"}
    return words.isdisjoint(WIDE.split()) and clauses.isdisjoint(n.deprel for n in nodes)


def _topics(nodes: list[Node]) -> list[tuple]:
    """What is spoken of: phrases that share none of it neither imply nor exclude each other."""
    spoken = [n for n in nodes if n.upos in ("NOUN", "PROPN", "PRON", "NUM", "SYM", "ADJ")]
    return [(n.leaf, n.topic, n.upos == "ADJ" and n.rank // 2) for n in spoken]


def _below(nodes: list[Node], top: Node) -> list[Node]:
    """The phrase of `top`: one piece, as trees are projective."""
    phrase = [top]
    for head in phrase:  # it grows meanwhile
        phrase += [node for node in nodes if node.head is head]
    return [node for node in nodes if node in phrase]


def _rename(node: Node, rank: int) -> None:
    node.rank, (node.forms, node.number) = rank, _word(node.leaf, node.topic, rank)


def _toggle(rng, nodes: list[Node], negation: Node) -> None:
    if negation in nodes:
        nodes.remove(negation)
    else:
        nodes.insert(nodes.index(negation.head) + (rng.random() < 1 / 3), negation)  # as in GRAMMAR


def _swap(nodes: list[Node], subject: Node, target: Node) -> None:
    one, other = _below(nodes, subject), _below(nodes, target)
    start, end = nodes.index(one[0]), nodes.index(other[-1]) + 1
    nodes[start:end] = [*other, *nodes[start + len(one) : end - len(other)], *one]
    subject.deprel, target.deprel = target.deprel, subject.deprel


def _move(rng, nodes: list[Node], modifier: list[Node], noun: Node | None = None) -> None:
    """Takes a modifier away; to the noun, if there is one."""
    nodes[:] = [node for node in nodes if node not in modifier]
    if noun:
        top = next(node for node in modifier if node.head not in modifier)
        at = nodes.index(noun) + (top.deprel == "nmod" or rng.random() < 1 / 3)  # as in GRAMMAR
        top.head, nodes[at:at] = noun, modifier


def _add(rng, nodes: list[Node], nouns: list[Node], spoken: list[tuple], room: int) -> None:
    """Adds a modifier of at most `room` words that speaks of something new; or draws in vain."""
    noun, (deprel, what) = rng.choice(nouns), rng.choice(MODIFIERS)
    modifier = _phrase(rng.random, noun.topic, [what], deprel, noun)
    if len(modifier) <= room and _plain(modifier) and {*spoken}.isdisjoint(_topics(modifier)):
        _move(rng, nodes, modifier, noun)
        spoken += _topics(modifier)


def generate_inferences(n: int, seed: int = 0) -> Iterator[Inference]:
    """`n` random pairs of sentences of the built-in language, as many of each of INFERENCES.

    The hypothesis comes first and knows nothing of the label. The premise is made of it by an edit
    that decides the label, and by others that do not: it becomes more precise, to a length that
    knows nothing of the label either.
    """
    rng, labels = random.Random(f"inference {seed}"), []
    while n > 0:
        nodes = _phrase(rng.random, int(TOPICS * rng.random() ** 2), CLAUSE, "root", ABOVE)
        verb = next(node for node in nodes if node.head is ABOVE)
        nouns, spoken = [n for n in nodes if n.head is verb and n.upos == "NOUN"], _topics(nodes)
        if len(nouns) < 2 or nodes[-1].forms == ["?"] or not _plain(nodes):
            continue
        _add(rng, nodes, nouns, spoken, room=2)
        general, *specific = rng.sample(nouns, len(nouns))
        _rename(general, 0)
        for noun in specific:
            _rename(noun, noun.rank or 1)
        (negation,) = _phrase(rng.random, 0, [["not/PART"]], "advmod", verb)
        if rng.random() < 0.5:  # as many with it as without
            _toggle(rng, nodes, negation)
        tops = [n for n in nodes if n.head in nouns and n.deprel in ("amod", "nmod")]
        told = _topics(nouns + tops)  # of nothing twice: no "red white X", no "animal and dog"
        if not tops or len({*told}) < len(told) or len(nodes) > 12:
            continue
        top, heads = rng.choice(tops), {node.head for node in nodes}
        modifier, others = _below(nodes, top), [noun for noun in nouns if noun is not top.head]
        core = [n for n in nodes if n is verb or (n in nouns and n.deprel in ("nsubj", "obj"))]
        ways = {
            "entailment": [(_add, rng, nodes, nouns, spoken, 1)],
            "neutral": [(_rename, rng.choice(specific), 0)]
            + [(_move, rng, nodes, modifier, noun) for noun in (None, rng.choice(others))],
            "contradiction": [(_toggle, rng, nodes, negation)]
            + [(_rename, top, top.rank ^ 1)] * (top.leaf == "adjective" and top not in heads),
        }
        told = [n.deprel for n in core] == ["nsubj", "root", "obj"]  # by order: who did it to whom
        if told and core[0].plural == core[2].plural and negation not in nodes:
            ways["contradiction"].append((_swap, nodes, core[0], core[2]))
        hypothesis = _sentence(nodes)
        labels = labels or rng.sample(INFERENCES, 3)
        label = labels.pop()
        way, *arguments = rng.choice(ways[label])
        way(*arguments)
        if rng.random() < 0.5:
            _rename(general, rng.randrange(1, _language()[2][general.leaf][1]))
        spoken += _topics(nodes)
        size = len(hypothesis.words) + rng.randint(1, 3)
        while len(nodes) < size:
            _add(rng, nodes, nouns, spoken, size - len(nodes))
        yield Inference(_sentence(nodes), hypothesis, label)
        n -= 1


def generate_questions(n: int, seed: int = 0) -> Iterator[Question]:
    """`n` random questions of the built-in language, each of three sentences on one topic: one of
    them with a phrase of its verb replaced by "who" or "which". No other sentence has that verb."""
    rng, sentence = random.Random(f"question {seed}"), _language()[0]["sentence"]
    while n > 0:
        topic = int(TOPICS * rng.random() ** 2)
        rows = [_phrase(rng.random, topic, sentence, "root", ABOVE) for _ in range(3)]
        nodes = rng.choice(rows)
        others = {node.forms[node.form] for row in rows if row is not nodes for node in row}
        verb = next(node for node in nodes if node.head is ABOVE)
        tops = [n for n in nodes if n.head is verb and n.deprel in ("nsubj", "obj", "obl")]
        top = rng.choice([n for n in tops if n.upos in ("NOUN", "PROPN")] or [verb])
        answer = _below(nodes, top)
        told = verb.upos == "VERB" and nodes[-1].forms != ["?"] and others.isdisjoint(verb.forms)
        if top is verb or not told or len(answer) > 5 or sum(map(len, rows)) > 40:
            continue
        context, start = [*map(_sentence, rows)], nodes.index(answer[0])
        context[rows.index(nodes)].spans = [(start, start + len(answer))]
        top.forms = ["who" if top.leaf in ("person", "PER") else "which"]
        top.form, top.upos, top.entity = 0, "PRON", "O"
        nodes[-1].forms = ["?"]
        kept = [node for node in nodes if node is top or node not in answer]
        yield Question(_sentence(kept), context)
        n -= 1


# ----------------------------------------------------------------------------------- the readers
# A file is read in pieces: a sentence, and the text before, between and after what is read of it.
WORD = re.compile(r"((?:Mr|Mrs|Ms|Dr|St)\.|\w+(?:['\u2019-]\w+|[.,]\d+)*|\.{2,}|-{2,}|[^\w\s])")
SENTENCE = re.compile(  # up to a '.', '!' or '?', white space and no lower case; or to a line's end
    r".+?(?<!\bMr|\bMs|\bDr|\bSt)(?<!\bMrs)[.!?]++[\"'\u201d\u2019)»]*+\s++(?![a-z])|.*\n|.+"
)
BIO_TAG = re.compile(r"O|[BI]-\S+")


def _blocks(path, comment="\n") -> Iterator[list[tuple[str, str]]]:
    """A UTF-8 file, read bit by bit, in blocks: (place, line with its end). A block ends with a
    blank line; in plain text, which has no comments, also where the next line is not indented."""
    block, empty = [], True
    try:
        with open(path, "rb") as file:  # in bytes: str.splitlines would split at U+2028 too
            for number, data in enumerate(file, start=1):
                line = data.decode("utf-8")
                flush = comment == "\n" and not line[0].isspace()
                if block and (flush or not block[-1][1].strip()):
                    yield block
                    block = []
                block.append((f"{path}:{number}", line))
                empty = empty and (line.startswith(comment) or not line.strip())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file that can be read") from None
    except UnicodeDecodeError:
        message = f"{path}:{number}: bytes that are not UTF-8; convert the file"
        raise InputError(message) from None
    if empty:
        raise InputError(f"{path}: empty; give a file with at least one sentence")
    yield block


def _text_pieces(path) -> Iterator[tuple[list[str], Sentence]]:
    for block in _blocks(path):
        for text in SENTENCE.findall("".join(line for _, line in block)):
            parts = WORD.split(text)
            yield parts[::2], Sentence(parts[1::2])


def read_text(path) -> Iterator[Sentence]:
    """The sentences of a plain text: words only, punctuation split off. Raises InputError."""
    return (sentence for _, sentence in _text_pieces(path) if sentence.words)


def _conllu_pieces(path) -> Iterator[tuple[list[str], Sentence]]:
    for block in _blocks(path, comment="#"):
        words, rest = {}, [""]
        for place, line in block:
            columns = line.split("\t")
            is_word = line.strip() and line[0] != "#"
            if is_word and len(columns) != 10:
                raise InputError(f"{place}: {len(columns)} columns; CoNLL-U has 10, split by tabs")
            if not is_word or re.fullmatch(r"\d+[-.]\d+", columns[0]):
                rest[-1] += line  # a comment; or a multi-word token or an empty node: no words
                continue
            number, form, lemma, upos, xpos, feats, head, deprel, deps, misc = columns
            if number != str(len(words) + 1):
                raise InputError(f"{place}: word {number!r}; number the words 1, 2, 3...")
            words[place] = form, upos, head, deprel
            rest[-1] += f"{number}\t"
            rest += [f"\t{lemma}\t", f"\t{xpos}\t{feats}\t", "\t", f"\t{deps}\t{misc}"]
        numbers = {str(number): number for number in range(len(words) + 1)}
        for place, (_, _, head, _) in words.items():
            if head not in numbers:
                raise InputError(f"{place}: head {head!r}; give 0 or a word of the sentence")
        forms, upos, heads, deprels = ([word[i] for word in words.values()] for i in range(4))
        heads = [numbers[head] for head in heads]
        lost = sorted({*range(len(heads))}.difference(_tree(heads)[1]))
        if lost or heads.count(0) > 1:
            place = [*words][lost[0] if lost else 0]
            raise InputError(f"{place}: no tree; let all heads lead to one word, whose head is 0")
        yield rest, Sentence(forms, upos, heads, deprels)


def read_conllu(path) -> Iterator[Sentence]:
    """The sentences of a treebank in CoNLL-U: words, UPOS, heads, relations; multi-word tokens and
    empty nodes are no words (https://universaldependencies.org/format.html). Raises InputError."""
    return (sentence for _, sentence in _conllu_pieces(path) if sentence.words)


def read_bio(path) -> Iterator[Sentence]:
    """The sentences of a file with a word and its entity tag a line: `index word tag ...`, as in
    Universal NER, or `word ... tag`, as in CoNLL-2003. An `I-` that continues nothing (IOB1)
    becomes `B-`. Raises InputError."""
    for block in _blocks(path, comment="#"):
        words, tags = [], []
        for place, line in block:
            columns = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
            comment = line.startswith("# ") and (" = " in line or len(columns) < 3)
            if not line.strip() or comment or columns[0] == "-DOCSTART-":
                continue
            indexed = "\t" in line and columns[0] == str(len(words) + 1) and len(columns) > 2
            word, tag = columns[1:3] if indexed else (columns[0], columns[-1])
            if len(columns) < 2 or not BIO_TAG.fullmatch(tag):
                raise InputError(f"{place}: tag {tag!r}; give a word and O, B-TYPE or I-TYPE")
            words.append(word)
            tags.append(tag)
        if words:
            yield Sentence(words, entities=_move_entities(tags, range(len(tags))))


MALFORMED = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
# A pair's columns in MNLI and XNLI; in XNLI's training data, which was translated by machine.
PAIRS = ("sentence1", "sentence2", "gold_label"), ("premise", "hypo", "label")


def _json(text: str):
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    return value


def read_inferences(path) -> Iterator[Inference]:
    """The English pairs of a file of MNLI or XNLI: tab-separated with a header, quotes being text,
    or a JSON object a line. Those without a gold label (`-`) are left out. Raises InputError."""
    header, some = None, False
    for place, line in chain.from_iterable(_blocks(path)):
        cells = line.rstrip("\r\n").split("\t")
        if not line.strip():
            continue
        if header is None:
            header = [] if line[0] == "{" else cells
        if header and len(cells) != len(header):
            raise InputError(f"{place}: {len(cells)} columns; the header has {len(header)}")
        try:
            row = dict(zip(header, cells, strict=True)) if header else _json(line)
            names = PAIRS[0] if "sentence1" in row else PAIRS[1]
            premise, hypothesis = (Sentence(WORD.findall(row[name])) for name in names[:2])
            label, language = row[names[2]], row.get("language", "en")
        except MALFORMED:
            message = f"{place}: no {', '.join(PAIRS[0])}; give MNLI or XNLI as published"
            raise InputError(message) from None
        if cells == header or label == "-" or language != "en":
            continue
        label = "contradiction" if label == "contradictory" else label
        if label not in INFERENCES:
            raise InputError(f"{place}: label {label!r}; give {', '.join(INFERENCES)} or -")
        if not (premise.words and hypothesis.words):
            raise InputError(f"{place}: a sentence without words; mend or remove the line")
        yield Inference(premise, hypothesis, label)
        some = True
    if not some:
        raise InputError(f"{path}: empty; give a file with at least one labelled pair in English")


def read_questions(path) -> Iterator[Question]:
    """The questions of a file of SQuAD or XQuAD that have an answer: all words that it touches; no
    sentence of the context ends within it. Raises InputError."""
    text, last = "".join(line for _, line in chain.from_iterable(_blocks(path))), None
    try:
        for paragraph in chain(*(article["paragraphs"] for article in _json(text)["data"])):
            context = paragraph["context"]
            words, places = WORD.findall(context), [m.span() for m in WORD.finditer(context)]
            starts, ends = [start for start, _ in places], [end for _, end in places]
            cuts = {bisect_left(starts, match.end()) for match in SENTENCE.finditer(context)}
            for asked in paragraph["qas"]:
                last, question, spans = asked["id"], WORD.findall(asked["question"]), {}
                if asked.get("is_impossible") is True:
                    continue
                for at, answer in ((a["answer_start"], a["text"]) for a in asked["answers"]):
                    if at < 0 or not answer.strip() or not context.startswith(answer, at):
                        raise InputError(f"{path}: question {last!r}: {answer!r} is not at {at} of "
                                         "its context; give the file as published")  # fmt: skip
                    spans[bisect_right(ends, at), bisect_left(starts, at + len(answer))] = None
                if not (question and spans):
                    raise InputError(f"{path}: question {last!r}: no words or no answer; remove it")
                inside = {cut for cut in cuts for start, end in spans if start < cut < end}
                yield Question(Sentence(question), [
                    Sentence(words[a:b], spans=[(i - a, j - a) for i, j in spans if a <= i < b])
                    for a, b in pairwise(sorted({0, len(words), *cuts} - inside))
                ])  # fmt: skip
    except MALFORMED as error:
        message = f"{path}: no SQuAD, after question {last!r}; give the file as published"
        raise error if isinstance(error, InputError) else InputError(message) from None
    if last is None:
        raise InputError(f"{path}: empty; give a file with at least one question")


# --------------------------------------------------------------------------- the transformations
TRANSFORMS = ("transliterate", "invert", "permute", "syntax")


def parse_transform(text: str) -> tuple[str, ...]:
    """The names in `transliterate+invert`, in their order. Raises InputError for an unknown one."""
    names = tuple(text.split("+"))
    if unknown := set(names).difference(TRANSFORMS):
        raise InputError(f"no transformation {min(unknown)!r}; there are {', '.join(TRANSFORMS)}")
    return names


def transliterate_word(word: str, back: bool = False) -> str:
    """The word in Braille, a pattern U+2800 to U+28FF for each byte of its UTF-8: a bijection.
    With `back`, the word of such Braille. Raises InputError if there is none."""
    if not back:
        return "".join([chr(0x2800 + byte) for byte in word.encode("utf-8", "surrogatepass")])
    try:
        return bytes([ord(char) - 0x2800 for char in word]).decode("utf-8", "surrogatepass")
    except ValueError:
        raise InputError(f"{word!r} is no transliterated word; give a derived text") from None


def _tree(heads: list[int]) -> tuple[list[list[int]], list[int]]:
    """Each position with its dependents, in their order; all that hangs from the root, top down."""
    rows: list[list[int]] = [[] for _ in range(len(heads) + 1)]  # the last is for head 0
    for position, head in enumerate(heads):
        rows[position].append(position)
        rows[head - 1].append(position)
    reached = rows.pop()
    for head in reached:
        reached += [position for position in rows[head] if position != head]
    return rows, reached


def _items(sentence: Sentence, head: int, row: list[int]):
    """The kind of head (None: its row has no order), the positions that move and their items.
    Punctuation stays; subtypes (`acl:relcl`) are left out, as treebanks differ in them."""
    kind = {"NOUN": "NOUN", "PROPN": "NOUN", "VERB": "VERB"}.get(sentence.upos[head])
    relations = {i: sentence.deprels[i].partition(":")[0] for i in row} | {head: "head"}
    moving = [i for i in row if relations[i] != "punct"]
    return kind, moving, tuple((relations[i], sentence.upos[i]) for i in moving)


class OrderModel(Counter):
    """In what order a language puts the head and the dependents of a noun or a verb: model[kind, a,
    b] counts how often a came before b under a head of that kind; a and b are items, (relation,
    tag), or relations alone, to fall back on."""

    __hash__ = object.__hash__  # for the cache: each model is itself


ORDERS = [np.array(list(permutations(range(size)))) for size in range(8)]  # the given order first


@cache
def _best_order(model: OrderModel, kind: str, items: tuple[tuple[str, str], ...]) -> list[int]:
    """The order of the items in which the log-odds of "a comes before b" add up to the most; of
    equals, the given one. All orders of up to 7 items are tried; of more items, what most wants to
    be before all the others comes first, until 7 are left."""
    odds = np.zeros((len(items), len(items)))
    for (i, a), (j, b) in permutations(enumerate(items), 2):
        p = 0.5  # for smoothing: what is known so far counts as one observation more
        for first, second in ((a[0], b[0]), (a, b)):
            before, after = model[kind, first, second], model[kind, second, first]
            p = (before + p) / (before + after + 1)
        odds[i, j] = np.log(p / (1 - p))
    order, left = [], list(range(len(items)))
    while len(left) >= len(ORDERS):
        order.append(max(left, key=lambda item: odds[item, left].sum()))
        left.remove(order[-1])
    orders = np.array(left)[ORDERS[len(left)]]
    first, second = np.triu_indices(len(left), 1)
    scores = odds[orders[:, first], orders[:, second]].sum(axis=1).round(9)
    return order + orders[scores.argmax()].tolist()


def learn_order(sentences: Iterable[Sentence]) -> OrderModel:
    """The order of a treebank's language, in pairs (the aim is Wang and Eisner's, TACL 2016)."""
    model = OrderModel()
    for sentence in sentences:
        for head, row in enumerate(_tree(sentence.heads)[0]):
            kind, _, items = _items(sentence, head, row)
            for a, b in combinations(items if kind else (), 2):
                model.update([(kind, a, b), (kind, a[0], b[0])])
    return model


# A language to imitate without a treebank: verbs last, adjectives after nouns, postpositions.
SOV = OrderModel()
for _row in (
    "VERB discourse vocative advcl nsubj obl iobj obj ccomp xcomp advmod head aux mark conj cc",
    "NOUN cc acl det nmod compound head flat amod nummod case cop aux mark conj",
):
    SOV.update((_row[:4], a, b) for a, b in combinations(_row[5:].split(), 2))


def read_order(treebank: str | None) -> OrderModel:
    """The order of the language of a treebank in CoNLL-U; without one, SOV."""
    return learn_order(read_conllu(treebank)) if treebank else SOV


def _syntax_order(sentence: Sentence, model: OrderModel) -> list[int]:
    """Subtrees move as wholes (one with gaps is first drawn together); punctuation keeps its place
    in its row, so that a final '.' stays final."""
    if None in (sentence.upos, sentence.heads, sentence.deprels):
        raise InputError("syntax needs dependency trees: give a CoNLL-U file")
    rows, top_down = _tree(sentence.heads)
    phrases: dict[int, list[int]] = {}
    for head in reversed(top_down):
        kind, moving, items = _items(sentence, head, rows[head])
        best = iter(_best_order(model, kind, items) if kind else range(len(items)))
        row = [moving[next(best)] if i in moving else i for i in rows[head]]
        phrases[head] = [word for i in row for word in ([i] if i == head else phrases[i])]
    return phrases[top_down[0]] if top_down else []


def _move_entities(tags: list[str], order: Iterable[int]) -> list[str]:
    """The BIO tags of words in a new order: neighbours of one entity in one piece, `B-` first."""
    starts = (tag[0] == "B" or tag[1:] != last[1:] for last, tag in pairwise(["O", *tags]))
    numbers = list(accumulate(starts))  # of the entities, from 1 on
    moved, before = [], 0
    for old in order:
        prefix = "O" if tags[old] == "O" else "I" if numbers[old] == before else "B"
        moved.append(prefix + tags[old][1:])
        before = numbers[old]
    return moved


def _reorder(sentence: Sentence, order: list[int]) -> Sentence:
    """The words as `order` lists them, with their labels; a span is stretched over its words."""
    place = dict(zip(order, range(len(sentence.words)), strict=True))
    columns = (sentence.words, sentence.upos, sentence.heads, sentence.deprels)
    words, upos, heads, deprels = (column and [column[old] for old in order] for column in columns)
    heads = heads and [head and place[head - 1] + 1 for head in heads]
    entities = sentence.entities and _move_entities(sentence.entities, order)
    inside = [[place[word] for word in range(*span)] for span in sentence.spans]
    spans = [(min(places), max(places) + 1) for places in inside]
    return Sentence(words, upos, heads, deprels, entities, spans)


def transform(sentence: Sentence, names: Iterable[str], seed=0, index=0, order=SOV):
    """The sentence after the named transformations, one by one, and the steps for `invert`: where
    each word came from (None: none moved), and the entities and spans before. `permute` depends on
    seed and index, the sentence's number; `syntax` on the OrderModel. Raises InputError."""
    steps, size = [], len(sentence.words)
    for name in chain(*map(parse_transform, names)):
        places = None
        if name == "invert":
            final = {*".!?", *map(transliterate_word, ".!?")}
            moving = size - any(word in final for word in sentence.words[-1:])
            places = [*reversed(range(moving)), *range(moving, size)]
        elif name == "permute":
            places = list(range(size))
            random.Random(f"{seed}/{index}").shuffle(places)  # a string: alike in any process
        elif name == "syntax":
            places = _syntax_order(sentence, order)
        steps.append((places, sentence.entities, sentence.spans))
        if places is None:
            words = [transliterate_word(word) for word in sentence.words]
            sentence = replace(sentence, words=words)
        else:
            sentence = _reorder(sentence, places)
    return sentence, steps


def invert(sentence: Sentence, steps: list[tuple]) -> Sentence:
    """The sentence that `transform` was given: its steps undone, the last one first."""
    for places, entities, spans in reversed(steps):
        if places is None:
            words = [transliterate_word(word, back=True) for word in sentence.words]
            sentence = replace(sentence, words=words)
        else:
            back = sorted(range(len(places)), key=places.__getitem__)
            sentence = replace(_reorder(sentence, back), entities=entities, spans=spans)
    return sentence


# ------------------------------------------------------------------------------ the command line
def _format(sentence: Sentence) -> str:
    """A line of text, words and spaces; of a sentence with a tree, a block of CoNLL-U."""
    text = " ".join(sentence.words)
    if sentence.heads is None:
        return text + "\n"
    blank = ["_"] * len(sentence.words)
    misc = [f"Entity={tag}" for tag in sentence.entities or []] or blank
    tree = (sentence.upos, blank, blank, sentence.heads, sentence.deprels)
    rows = zip(count(1), sentence.words, blank, *tree, blank, misc, strict=False)
    return "\n".join([f"# text = {text}", *("\t".join(map(str, row)) for row in rows), "", ""])


def _generate_files(args) -> dict[str, list[str]]:
    """The built-in language and its derivative, parallel, as text and trees; and the dictionary."""
    names, originals = parse_transform(args.transform), list(generate(args.sentences, args.seed))
    derived = [transform(s, names, seed=args.seed, index=i)[0] for i, s in enumerate(originals)]
    files = {}
    for side, sentences in ((f"{args.out}/original", originals), (f"{args.out}/derived", derived)):
        files[f"{side}.txt"] = [_format(Sentence(sentence.words)) for sentence in sentences]
        files[f"{side}.conllu"] = [_format(sentence) for sentence in sentences]
    words = sorted({word for sentence in originals for word in sentence.words})
    dictionary = [f"{word}\t{transliterate_word(word)}\n" for word in words]
    return files | {f"{args.out}/dictionary.tsv": dictionary}


def _transform_file(args) -> dict[str, list[str]]:
    """The derived text or treebank; beside it, what the way back needs, a line of JSON a piece."""
    names = parse_transform(args.transform)
    order = read_order(args.order)
    treebank = ".conllu" in Path(args.file).name
    derived, undo = [], [json.dumps(treebank) + "\n"]
    pieces = _conllu_pieces(args.file) if treebank else _text_pieces(args.file)
    for index, (rest, sentence) in enumerate(pieces):
        sentence, steps = transform(sentence, names, seed=args.seed, index=index, order=order)
        undo.append(json.dumps([rest, [places for places, *_ in steps]]) + "\n")
        derived += [_format(sentence)] if sentence.words else []
    return {args.out: derived, f"{args.out}.undo": undo}


def _invert_file(args) -> dict[str, list[str]]:
    """The file that `transform` was given, byte for byte."""
    undo = f"{args.file}.undo"
    try:
        treebank, *pieces = [_json(line) for _, line in chain(*_blocks(undo))]
        texts = (Sentence(line[:-1].split(" ")) for _, line in chain(*_blocks(args.file)))
        sentences = read_conllu(args.file) if treebank else texts
        original = []
        for rest, steps in pieces:
            sentence = next(sentences) if len(rest) > 1 else Sentence([])
            sentence = invert(sentence, [(places, None, []) for places in steps])
            columns = (sentence.words, sentence.upos, sentence.heads, sentence.deprels)
            cells = chain(*zip(*(map(str, column) for column in columns if column), strict=True))
            original += chain(*zip(rest, [*cells, ""], strict=True))
        if next(sentences, None):
            raise IndexError
        "".join(original)  # a TypeError if there is other than text
    except (StopIteration, IndexError, *MALFORMED) as error:
        if str(error).startswith(args.file):  # of a reader, which names the place
            raise
        raise InputError(f"{undo}: does not fit {args.file}; run transform again") from None
    return {args.out: original}


def _write(path: str, parts: list[str]) -> None:
    """Writes a file that takes its name when it is complete."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8", newline="") as file:
            file.writelines(parts)
        part.replace(path)
    except OSError as error:
        if part.exists():
            part.unlink()
        raise InputError(f"{path}: {error.strerror}; give a place that can be written") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, 2 if the user's input is at fault."""
    run = {"generate": _generate_files, "transform": _transform_file, "invert": _invert_file}
    parser = _Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("command", choices=run)
    parser.add_argument("file", nargs="?", help="text, or X.conllu: a treebank")
    parser.add_argument("-o", "--out", help="(FILE.COMMAND; of generate, a folder: language)")
    parser.add_argument("--transform", default="transliterate+invert", metavar="+".join(TRANSFORMS))
    parser.add_argument("--order", metavar="TREEBANK", help="of the language that syntax imitates")
    parser.add_argument("--sentences", type=int, default=1000, help="how many to generate")
    parser.add_argument("--seed", type=int, default=0, help="of generate and of permute")
    try:
        args = parser.parse_intermixed_args(arguments)
        generating = args.command == "generate"
        args.out = args.out or ("language" if generating else f"{args.file}.{args.command}")
        if args.sentences < 1 or not (generating or args.file):
            raise InputError("give a file to transform or invert, or at least one --sentences")
        for path, parts in run[args.command](args).items():
            _write(path, parts)
    except InputError as error:
        print(f"synth_lang.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
