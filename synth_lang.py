"""A synthetic language, and the transformations that derive a second language from any first one.

ALIGN-MLM (Tang et al. 2022, arXiv 2211.08547) asks what makes a model multilingual with pairs of
languages whose every difference is known: the second is *derived* from the first.

    transliterate   another script: a bijection of the words
    invert          the words in reverse; a final '.', '!' or '?' stays last
    permute         the words of each sentence at random, seeded
    syntax          the dependents of nouns and verbs in another language's order, learned

They compose (`transliterate+invert`), labels travel with their words, and each returns what its
exact inverse needs. In this order: the built-in language, readers, transformations, command line.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, combinations, count, permutations, product
from math import log
from pathlib import Path
from types import SimpleNamespace as Node

import numpy as np

FINAL = (".", "!", "?")


class InputError(ValueError):
    """The user's input is at fault: one line that names the place and the mend."""


@dataclass(slots=True)
class Sentence:
    """Words and their labels; a list of labels, where there is one, has one entry a word.

    upos, deprels: tags and relations of Universal Dependencies. heads: the 1-based position of each
    word's head, 0 for the root. entities: BIO tags (`B-PER`, `I-PER`, `O`). spans: answer spans,
    half-open ranges of 0-based positions.
    """

    words: list[str]
    upos: list[str] | None = None
    heads: list[int] | None = None
    deprels: list[str] | None = None
    entities: list[str] | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)


# ---------------------------------------------------------------------------------- the language
# `a = b|c*2`: an `a` is one of these, `c` twice as likely. Any other line is a rule: a phrase, the
# chance that it has a dependent (`*`: again and again), the place and relation of that, and what it
# is. Rules apply from top to bottom; `a+x` is an `a` that follows the rules of `x` too. Places: `[`
# first of the row so far, `]` last, `<` just before the top, `>` just after, `~` any; of several,
# one at random. `of/ADP` is that word with its tag.
#
# A word's tag must need the word, as in natural text (where the tags of both neighbours tell half
# of the tags, the word itself nine in ten): so words have several tags, and much may be left out or
# stand elsewhere. Still order tells: reversed, the sentences look like no other.
GRAMMAR = """
sentence    = finite+aside+end*8|verb+subject+inverted+adverbials+asked|thing+noun+aside+end
finite      = verb+subject+tense+adverbials*6|adjective+subject+being+adverbials
relative    = verb+tense+adverbials+as-subject*3|act+subject+tense+adverbials+as-object*2
verb        = affect*5|act*4|give*4|say*2
agent       = person+noun*4|thing+noun*2|he*4|PER|institution
object      = thing+noun*3|idea+noun*2|person+noun*2|place+noun|him*3|PER|ORG|amount
setting     = place+noun*3|thing+noun*2|idea+noun|LOC*3|him*2|institution
affect      1     ]]]]][   obj           object
give        .3    >        iobj          person+noun*2|him
give        1     ]]]]][   obj           object
say         .7    ]]]]][   ccomp         finite|finite+that
say         .3    ]        xcomp         give+to+adverbials|act+to+adverbials
subject     .88   [[[[>]   nsubj         agent
tense       .35   <        aux           modal*4|have*3|be*3|do*2
being       .85   <        cop           be
inverted    .8    [[<      aux           modal*3|have|be|do*4
adverbials  .08   <<>      advmod        not/PART
adverbials  .1    >]       compound:prt  particle
adverbials  .24*  ~        advmod        free*2|manner+degree*2|fast+degree
adverbials  .3*   ~        obl           setting+case
adverbials  .07   []       advcl         finite+when
adverbials  .12   ]        conj          finite+joined
to          1     <        mark          to/PART
when        1     [        mark          subordinator
that        1     [        mark          that/SCONJ
as-subject  1     [        nsubj         who
as-object   .6    [        obj           who
noun        .06   <        compound      thing
noun        .3*   [[]      amod          adjective+degree+more*5|participle
noun        .06   [[]      nummod        number
noun        .44   [        det           determiner
noun        .07   [        nmod:poss     his*2|PER+genitive
noun        .16   ]        nmod          setting+case
noun        .07   ]        conj          object+joined
noun        .1    ]        acl:relcl     relative
degree      .15   [        advmod        degree-word
more        .08   ]        conj          adjective+joined
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
asked       .4    [        advmod        question-word
asked       1     ]        punct         ?/PUNCT
end         1     ]        punct         ./PUNCT*8|!/PUNCT|?/PUNCT
"""

# Closed classes: their tag and words, frequent ones first; after `/` those for the plural.
# Open classes: their tag, how many words a topic has, the endings of their forms (a noun's numbers;
# a verb's base, -s, -ed, -ing), and the class whose stems they share, if any. A sentence mostly
# keeps to the words of one topic, and each head to its favourites in it: so that beyond its tag a
# word is known by its company, which is what there is to learn of it.
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
free          ADV   then now here so there still again never just once too before well soon around
degree-word   ADV   very so too quite more almost rather just even
question-word ADV   when why how where
interjection  INTJ  oh well no yes so please look right
number        NUM   two 3 ten four 12 seven 5 one 40 six 1984 nine 100
amount        SYM   % $ £
institution   PROPN University Bank Museum
person        NOUN  8  -,s
thing         NOUN  10 -,s
place         NOUN  6  -,s
idea          NOUN  8  -,s
act           VERB  7  -,s,ed,ing
affect        VERB  5  -,s,ed,ing thing
give          VERB  6  -,s,ed,ing
say           VERB  4  -,s,ed,ing
adjective     ADJ   12 -
participle    ADJ   5  ed         affect
manner        ADV   12 ly         adjective
fast          ADV   4  -          adjective
PER           PROPN 10 -
LOC           PROPN 8  -
ORG           PROPN 6  -
surname       PROPN 8  -          LOC
"""
TOPICS = 24
ENDING = {"modal": 0, "do": 0, "to/PART": 0, "have": 2, "be": 3}  # that a verb has beside these
ENTITIES = {"PER": "PER", "LOC": "LOC", "ORG": "ORG", "institution": "ORG"}
RECURSIVE = {"conj", "ccomp", "xcomp", "advcl", "acl:relcl", "nmod"}


@cache
def _language() -> tuple[dict, dict, dict]:
    """The phrases that are others; the rules of each phrase; the classes of words."""

    def options(text):  # `a*2|b+x` is [[a], [a], [b, x]]
        weighted = [option.partition("*") for option in text.split("|")]
        return [names.split("+") for names, _, weight in weighted for _ in range(int(weight or 1))]

    phrases, rules, classes = {}, {}, {}
    for name, first, *rest in map(str.split, filter(None, (GRAMMAR + WORDS).splitlines())):
        if first == "=":
            phrases[name] = options(rest[0])
        elif first[0] in ".1":
            rule = (float(first.strip("*")), "*" in first, *rest[:2], options(rest[2]))
            rules.setdefault(name, []).append(rule)
        elif rest[0].isdecimal():
            classes[name] = first, int(rest[0]), rest[1].split(","), (rest[2:] or [name])[0]
        else:
            lists = [words.split() for words in " ".join(rest).split(" / ")]
            classes[name] = first, 0, lists[0], lists[-1]
    return phrases, rules, classes


@cache
def _word(leaf: str, topic: int, rank: int) -> tuple[list[str], int]:
    """The forms of a word of an open class, and a number that decides its company."""
    tag, _, endings, source = _language()[2][leaf]
    rng = random.Random(f"{source} {topic} {rank}")  # nothing else: no text's seed
    parts = (
        "b bl br c ch cl cr d dr f fl fr g gr h j l m n p pl pr qu r s sh sl sp st t tr v w",
        "a e i o u a e i o u ai ea ee oo ou",
        "b ck ct d ft g ld lk ll lt m mp n nd ng nt p pt rd rk rl rm rn rt sk sp st t th",
        "er el et in ock ard il ant om en ow",
    )
    stem = "".join(rng.choice(part.split()) for part in parts[: 3 + (rank > 0)])
    stem = stem.capitalize() if tag == "PROPN" else stem
    return [stem + ending.strip("-") for ending in endings], rng.randrange(1000)


def _zipf(random, size: int) -> int:
    """A rank from 0 on by Zipf's law: the chance of rank r is about proportional to 1 / (r + 1)."""
    return int((size + 1) ** random()) - 1


def _top(random, topic: int, leaf: str, deprel: str, head: Node | None) -> Node:
    """The word at the top of a phrase. Its form is chosen when its dependents are known."""
    plural = random() < 0.35 and deprel != "compound"
    if leaf == "who" or deprel in ("det", "aux", "cop", "acl:relcl"):
        plural = head.plural  # agreement
    word, _, upos = leaf.partition("/")
    forms, number = [word], 0
    if not upos:
        upos, size, *lists = _language()[2][leaf]
        if size:
            topic = topic if random() < 0.85 else int(random() * TOPICS)
            favourite = head.number if head and random() < 0.6 else 0
            forms, number = _word(leaf, topic, (favourite + _zipf(random, size)) % size)
        else:
            forms = [lists[plural][_zipf(random, len(lists[plural]))]]
    if leaf in ENDING and head.upos == "VERB":
        head.form = ENDING[leaf]
    form = 1 + (random() < 0.45) if upos == "VERB" else 0  # present or past
    depth = head.depth + (deprel in RECURSIVE) if head else 0
    return Node(forms=forms, form=form, upos=upos, deprel=deprel, head=head, number=number,
                plural=plural and upos != "PROPN", depth=depth, entity="O")  # fmt: skip


def _phrase(random, topic: int, options: list, deprel="root", head: Node | None = None):
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
            anywhere = int(random() * (len(row) + 1))
            place = places[int(random() * len(places))]
            to = {"[": 0, "<": at, ">": at + 1, "]": len(row), "~": anywhere}[place]
            row.insert(to, words)
            at += to <= at
            if not repeated:
                break
    if deprel in ("nsubj", "nummod"):
        head.plural = top.plural or deprel == "nummod"
    if top.upos == "NOUN":
        top.form = int(top.plural)
    elif top.upos == "VERB" and top.form == 1:
        top.form = int(not top.plural)  # she looks, they look
    nodes = list(chain(*row))
    if leaf in ENTITIES:  # an outer name overrules those inside it
        for node in nodes:
            node.entity = ("B-" if node is nodes[0] else "I-") + ENTITIES[leaf]
    return nodes


def generate(n: int, seed: int = 0) -> Iterator[Sentence]:
    """`n` random sentences of the built-in language: words, tags, trees, entities.

    The same (n, seed) gives the same sentences in any process; another seed, others of the same
    language.
    """
    uniform = random.Random(seed).random
    for _ in range(n):
        nodes = _phrase(uniform, _zipf(uniform, TOPICS), _language()[0]["sentence"])
        position = {id(node): position for position, node in enumerate(nodes, start=1)}
        columns = zip(*(
            (node.forms[node.form], node.upos, position.get(id(node.head), 0), node.deprel, node.entity)
            for node in nodes
        ), strict=True)  # fmt: skip
        yield Sentence(*map(list, columns))


# ----------------------------------------------------------------------------------- the readers
# A file is read in pieces: a sentence, and the text before, between and after what is read of it.

WORD = re.compile(r"((?:Mr|Mrs|Ms|Dr|St)\.|\w+(?:['’-]\w+|[.,]\d+)*|\.{2,}|-{2,}|[^\w\s])")
SENTENCE = re.compile(  # up to a '.', '!' or '?', white space and no lower case; or to a line's end
    r".+?(?<!\bMr|\bMs|\bDr|\bSt)(?<!\bMrs)[.!?]+[\"'”’)»]*\s+(?![a-z\s])|.*\n|.+"
)
BIO_TAG = re.compile(r"O|[BI]-\S+")


def _blocks(path) -> Iterator[list[tuple[str, str]]]:
    """A UTF-8 file in blocks that end with a blank line: (place, line with its end)."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file that can be read") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: bytes that are not UTF-8; convert the file") from None
    if not text.strip():
        raise InputError(f"{path}: empty; give a file with at least one sentence")
    block = []
    for number, line in enumerate(re.findall(r".*\n|.+", text), start=1):  # not at U+2028 and such
        block.append((f"{path}:{number}", line))
        if not line.strip():
            yield block
            block = []
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
    for block in _blocks(path):
        places, cells, rest = [], [], [""]
        for place, line in block:
            columns = line.split("\t")
            is_word = line.strip() and line[0] != "#"
            if is_word and len(columns) != 10:
                raise InputError(f"{place}: {len(columns)} columns; CoNLL-U has 10, split by tabs")
            if not is_word or re.fullmatch(r"\d+[-.]\d+", columns[0]):
                rest[-1] += line  # a comment; or a multi-word token or an empty node: no words
                continue
            number, form, lemma, upos, xpos, feats, head, deprel, deps, misc = columns
            if number != str(len(cells) + 1):
                raise InputError(f"{place}: word {number!r}; number the words 1, 2, 3...")
            places.append(place)
            cells.append((form, upos, head, deprel))
            rest[-1] += f"{number}\t"
            rest += [f"\t{lemma}\t", f"\t{xpos}\t{feats}\t", "\t", f"\t{deps}\t{misc}"]
        words, upos, heads, deprels = map(list, zip(*cells, strict=True)) if cells else [[]] * 4
        numbers = {str(number): number for number in range(len(cells) + 1)}
        for place, head in zip(places, heads, strict=True):
            if head not in numbers:
                raise InputError(f"{place}: head {head!r}; give 0 or a word of the sentence")
        heads = [numbers[head] for head in heads]
        lost = sorted({*range(len(heads))}.difference(_tree(heads)[1]))
        if cells and (heads.count(0) != 1 or lost):
            place = places[lost[0] if lost else 0]
            raise InputError(f"{place}: no tree; let all heads lead to one word, whose head is 0")
        yield rest, Sentence(words, upos, heads, deprels)


def read_conllu(path) -> Iterator[Sentence]:
    """The sentences of a treebank in CoNLL-U: words, UPOS, heads, relations. Raises InputError.

    Multi-word tokens and empty nodes are not words: the tree is over the others
    (https://universaldependencies.org/format.html).
    """
    return (sentence for _, sentence in _conllu_pieces(path) if sentence.words)


def read_bio(path) -> Iterator[Sentence]:
    """The sentences of a file with a word and its entity tag a line. Raises InputError.

    The columns are `index word tag ...`, as Universal NER has them, or `word ... tag`, as
    CoNLL-2003 has. An `I-` that continues nothing (IOB1) becomes `B-`.
    """
    for block in _blocks(path):
        words, tags = [], []
        for place, line in block:
            columns = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
            comment = line.startswith("# ") and (" = " in line or len(columns) < 3)
            if not line.strip() or comment or columns[0] == "-DOCSTART-":
                continue
            indexed = len(columns) > 2 and columns[0] == str(len(words) + 1)
            word, tag = columns[1:3] if indexed else (columns[0], columns[-1])
            if len(columns) < 2 or not BIO_TAG.fullmatch(tag):
                raise InputError(f"{place}: tag {tag!r}; give a word and O, B-TYPE or I-TYPE")
            words.append(word)
            tags.append(tag)
        if words:
            yield Sentence(words, entities=_move_entities(tags, range(len(tags))))


# --------------------------------------------------------------------------- the transformations

TRANSFORMS = ("transliterate", "invert", "permute", "syntax")


def parse_transform(text: str) -> tuple[str, ...]:
    """The names in `transliterate+invert`, in their order. Raises InputError for an unknown one."""
    names = tuple(text.split("+"))
    for name in names:
        if name not in TRANSFORMS:
            raise InputError(f"no transformation {name!r}; there are {', '.join(TRANSFORMS)}")
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


def transliterate_ids(ids, vocab_size: int, specials: int):
    """An array of token ids: i becomes i + vocab_size, the first `specials` ids excepted."""
    return ids + vocab_size * (ids >= specials)


def _tree(heads: list[int]) -> tuple[list[list[int]], list[int]]:
    """Each position with its dependents, in their order; all that hangs from the root, top down."""
    rows: list[list[int]] = [[] for _ in heads]
    for position, head in enumerate(heads):
        rows[position].append(position)
        if head:
            rows[head - 1].append(position)
    reached = [position for position, head in enumerate(heads) if not head]
    for head in reached:
        reached += [position for position in rows[head] if position != head]
    return rows, reached


def _items(sentence: Sentence, head: int, row: list[int]):
    """The kind of head (None: its row has no order), the positions that move and their items.

    Punctuation does not move. Subtypes (`acl:relcl`) are left out: treebanks differ in them.
    """
    kind = {"NOUN": "NOUN", "PROPN": "NOUN", "VERB": "VERB"}.get(sentence.upos[head])
    relations = {i: sentence.deprels[i].partition(":")[0] for i in row} | {head: "head"}
    moving = [i for i in row if relations[i] != "punct"]
    return kind, moving, tuple((relations[i], sentence.upos[i]) for i in moving)


class OrderModel(Counter):
    """In what order a language puts the head and the dependents of a noun or a verb.

    model[kind, a, b] counts how often a came before b under a head of that kind; a and b are items,
    (relation, tag), or relations alone, to fall back on.
    """

    __hash__ = object.__hash__  # for the cache: each model is itself


@cache
def _orders(size: int) -> np.ndarray:
    return np.array(list(permutations(range(size))))


@cache
def _best_order(model: OrderModel, kind: str, items: tuple[tuple[str, str], ...]) -> list[int]:
    """The order of the items in which the log-odds of "a comes before b" add up to the most.

    All orders of up to 7 items are tried; of more items, the one that most wants to be before all
    the others comes first, until 7 are left. Of equals, the order given is the best.
    """
    odds = np.zeros((len(items), len(items)))
    for (i, a), (j, b) in permutations(enumerate(items), 2):
        p = 0.5  # for smoothing: what is known so far counts as one observation more
        for first, second in ((a[0], b[0]), (a, b)):
            before, after = model[kind, first, second], model[kind, second, first]
            p = (before + p) / (before + after + 1)
        odds[i, j] = log(p / (1 - p))
    order, left = [], list(range(len(items)))
    while len(left) > 7:
        order.append(max(left, key=lambda item: odds[item, left].sum()))
        left.remove(order[-1])
    orders = np.array(left)[_orders(len(left))]  # the given one first
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
for _kind, _row in (
    ("VERB", "discourse vocative advcl nsubj obl iobj obj ccomp xcomp advmod head aux mark conj cc"),
    ("NOUN", "cc acl det nmod compound head flat amod nummod case cop aux mark conj"),
):
    SOV.update((_kind, a, b) for a, b in combinations(_row.split(), 2))


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
    return phrases[top_down[0]]


def _move_entities(tags: list[str], order: Iterable[int]) -> list[str]:
    """The BIO tags of words in a new order: neighbours of one entity in one piece, `B-` first."""
    owners: list[int] = []
    for position, tag in enumerate(tags):
        continues = position and tag[0] != "B" and tag[1:] == tags[position - 1][1:]
        owners.append(owners[-1] if continues else position)
    moved, before = [], None
    for old in order:
        prefix = "O" if tags[old] == "O" else "I" if owners[old] == before else "B"
        moved.append(prefix + tags[old][1:])
        before = owners[old]
    return moved


def _reorder(sentence: Sentence, order: list[int]) -> Sentence:
    """The words as `order` lists them, with their labels; a span is stretched over its words."""
    place = {old: new for new, old in enumerate(order)}
    columns = (sentence.words, sentence.upos, sentence.heads, sentence.deprels)
    words, upos, heads, deprels = (column and [column[old] for old in order] for column in columns)
    heads = heads and [head and place[head - 1] + 1 for head in heads]
    entities = sentence.entities and _move_entities(sentence.entities, order)
    spans = []
    for start, end in sentence.spans:
        inside = [place[word] for word in range(start, end)]
        spans.append((min(inside), max(inside) + 1))
    return Sentence(words, upos, heads, deprels, entities, spans)


def transform(sentence: Sentence, names: Iterable[str], seed=0, index=0, order=SOV):
    """The sentence after the named transformations, one by one, and the steps for `invert`.

    seed, index: `permute` depends on them alone; index is the sentence's number in its corpus.
    order: an OrderModel, for `syntax`, which needs trees: raises InputError. A step is where each
    word came from (None: none moved), and the entities and spans before it.
    """
    steps, size = [], len(sentence.words)
    for name in chain(*map(parse_transform, names)):
        places = None
        if name == "invert":
            final = {*FINAL, *map(transliterate_word, FINAL)}
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
    misc = [f"Entity={tag}" for tag in sentence.entities or []] or ["_"] * len(sentence.words)
    rows = zip(count(1), sentence.words, sentence.upos, sentence.heads, sentence.deprels, misc)
    lines = ["\t".join(map(str, (n, w, "_", u, "_", "_", h, d, "_", m))) for n, w, u, h, d, m in rows]
    return "\n".join([f"# text = {text}", *lines, "", ""])


def _generate_files(args) -> dict[str, list[str]]:
    """The built-in language and its derivative, parallel, as text and trees; and the dictionary."""
    names, originals = parse_transform(args.transform), list(generate(args.sentences, args.seed))
    derived = [transform(s, names, seed=args.seed, index=i)[0] for i, s in enumerate(originals)]
    files = {}
    for side, sentences in (("original", originals), ("derived", derived)):
        files[f"{side}.txt"] = [_format(Sentence(sentence.words)) for sentence in sentences]
        files[f"{side}.conllu"] = [_format(sentence) for sentence in sentences]
    words = sorted({word for sentence in originals for word in sentence.words})
    files["dictionary.tsv"] = [f"{word}\t{transliterate_word(word)}\n" for word in words]
    return {f"{args.out}/{name}": parts for name, parts in files.items()}


def _transform_file(args) -> dict[str, list[str]]:
    """The derived text or treebank; beside it, what the way back needs, a line of JSON a piece."""
    order = learn_order(read_conllu(args.order)) if args.order else SOV
    treebank = ".conllu" in Path(args.file).name
    derived, undo = [], [json.dumps(treebank) + "\n"]
    pieces = _conllu_pieces(args.file) if treebank else _text_pieces(args.file)
    for index, (rest, sentence) in enumerate(pieces):
        names = parse_transform(args.transform) if sentence.words else ()
        sentence, steps = transform(sentence, names, seed=args.seed, index=index, order=order)
        undo.append(json.dumps([rest, [places for places, *_ in steps]]) + "\n")
        derived += [_format(sentence)] if sentence.words else []
    return {args.out: derived, f"{args.out}.undo": undo}


def _invert_file(args) -> dict[str, list[str]]:
    """The file that `transform` was given, byte for byte."""
    undo = f"{args.file}.undo"
    try:
        treebank, *pieces = [json.loads(line) for block in _blocks(undo) for _, line in block]
        lines = (line for block in _blocks(args.file) for _, line in block)
        texts = (Sentence(line.rstrip("\n").split(" ")) for line in lines)
        sentences = read_conllu(args.file) if treebank else texts
        original = []
        for rest, steps in pieces:
            sentence = next(sentences) if len(rest) > 1 else Sentence([])
            sentence = invert(sentence, [(places, None, []) for places in steps])
            columns = (sentence.words, sentence.upos, sentence.heads, sentence.deprels)
            cells = chain(*zip(*(map(str, column) for column in columns if column), strict=True))
            original += chain(*zip(rest, [*cells, ""], strict=True))
    except (StopIteration, IndexError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{undo}: does not fit {args.file}; transform again") from error
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


COMMANDS = {"generate": _generate_files, "transform": _transform_file, "invert": _invert_file}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, 2 if the user's input is at fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("file", nargs="?", default="FILE", help="text, or X.conllu: a treebank")
    parser.add_argument("-o", "--out", help="file (a folder for generate); default: FILE.COMMAND")
    parser.add_argument("--transform", default="transliterate+invert", metavar="+".join(TRANSFORMS))
    parser.add_argument("--order", metavar="TREEBANK", help="of the language that syntax imitates")
    parser.add_argument("--sentences", type=int, default=1000, help="how many to generate")
    parser.add_argument("--seed", type=int, default=0, help="of generate and of permute")
    args = parser.parse_intermixed_args(arguments)
    args.out = args.out or f"{args.file}.{args.command}"
    try:
        for path, parts in COMMANDS[args.command](args).items():
            _write(path, parts)
    except InputError as error:
        print(f"synth_lang.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
