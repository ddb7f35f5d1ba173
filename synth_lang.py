"""A synthetic language, and the transformations that derive a second language from any first one.

ALIGN-MLM (Tang et al. 2022, arXiv 2211.08547) asks what makes a model multilingual with pairs of
languages whose every difference is known: the second is *derived* from the first.

    transliterate   another script: a bijection of the words
    invert          the words in reverse; a mark that ends the sentence stays last
    permute         the words of each sentence in a random order, seeded
    syntax          the dependents of nouns and verbs in another language's order

They compose (`transliterate+invert`), labels travel with their words, and `restore` is the exact
way back. This file goes from the sentence to the built-in language, to pairs for inference made
of it, to the transformations, to the readers of other people's files, to the command line.
"""

import argparse
import codecs
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations, groupby, islice, permutations, product
from pathlib import Path

import numpy as np
import regex


class InputError(ValueError):
    """The user's input is at fault. The message is one line that names the place and the mend."""


@dataclass
class Sentence:
    """Words and their labels. A list of labels has one entry a word, and is None where absent."""

    words: list[str]
    upos: list[str] | None = None  # part-of-speech tags of Universal Dependencies
    heads: list[int] | None = None  # the 1-based position of each word's head, 0 for the root
    deprels: list[str] | None = None  # relations of Universal Dependencies
    entities: list[str] | None = None  # BIO tags: `B-PER`, `I-PER`, `O`


INFERENCES = ("entailment", "neutral", "contradiction")


@dataclass
class Inference:
    """Two sentences, and the one of INFERENCES that holds between them."""

    premise: Sentence
    hypothesis: Sentence
    label: str


# ---------------------------------------------------------------------------------- the language
# A phrase is drawn from options, such as "person noun*2 | he", where the first is drawn twice as
# often. The first name of an option says what the top word of the phrase is, and every name brings
# the dependents that DEPENDENTS has for it. Where the first name is one of PHRASES, an option of
# that is drawn in its turn.
#
# A word's tag must need the word, as in natural text, where the tags of both neighbours tell half
# of the tags and the word itself tells nine in ten. So words have several tags, and much may be
# left out or stand elsewhere. Still order tells: reversed, the sentences look like no other.
PHRASES = {
    "sentence": "finite aside end*9 | thing noun aside end",
    "finite": "verb subject tense adverbials*6 | adjective subject being adverbials",
    "relative": "verb tense adverbials as-subject*3 | act subject tense adverbials as-object*2",
    "verb": "affect*5 | act*4 | give*4 | say*2",
    "agent": "person noun*4 | thing noun*2 | he*4 | PER | institution",
    "object": "thing noun*3 | idea noun*2 | person noun*2 | place noun | him*3 | PER | ORG"
    " | amount",
    "known": "person definite*2 | thing definite*2 | place definite",
    "setting": "place noun*3 | thing noun*2 | idea noun | LOC*3 | him*2",
}

# What a name brings, a line a dependent, in the order in which they are drawn: the chance of it,
# where it may stand, its relation (with a star if there may be several) and its options. Its place
# is drawn from `[` first of the phrase so far, `<` just before the top word, `>` just after it, `]`
# last.
DEPENDENTS = {
    "affect": "1 ]]]]][ obj object",
    "give": """
        0.3  >      iobj          person noun*2 | him
        1    ]]]]][ obj           object""",
    "say": """
        0.7  ]]]]][ ccomp         finite | finite mark
        0.3  ]      xcomp         give to adverbials | act to adverbials""",
    "subject": "0.88 [[[[>] nsubj agent",
    "tense": "0.4 [<<<<< aux modal*4 | have*3 | be*3 | do*3",
    "being": "0.85 [<<<<< cop be",
    "adverbials": """
        0.08 <<>    advmod        not/PART
        0.1  >]     compound:prt  particle
        0.24 [<>]   advmod*       free*4 | manner degree*4 | fast
        0.3  [<>]   obl*          setting case
        0.07 []     advcl         finite mark
        0.12 ]      conj          finite joined""",
    "to": "1 < mark to/PART",
    "mark": "1 [ mark subordinator",
    "as-subject": "1 [ nsubj who",
    "as-object": "0.6 [ obj who",
    "noun": """
        0.06 <      compound      thing
        0.3  [[]    amod*         adjective degree*5 | participle
        0.06 [[]    nummod        number
        0.44 [      det           determiner
        0.07 [      nmod:poss     his*2 | PER genitive
        0.16 ]      nmod          setting case
        0.07 ]      conj          object joined
        0.1  ]      acl:relcl     relative""",
    "degree": "0.15 [ advmod degree-word",
    "adjective": "0.08 ] conj adjective joined",
    "case": "0.9 [ case adposition",
    "genitive": "1 ] case 's/PART",
    "amount": "1 [] nummod number",
    "joined": """
        1    [      cc            conjunction
        0.2  [      punct         ,/PUNCT""",
    "PER": "0.4 ] flat surname",
    "LOC": "0.3 [ compound North/PROPN | Lake/PROPN | New/PROPN",
    "ORG": "0.6 ] flat Company/PROPN | Club/PROPN | Press/PROPN",
    "institution": "1 ] nmod LOC of",
    "of": "1 [ case of/ADP",
    "aside": """
        0.07 []     discourse     interjection
        0.04 ]      vocative      PER""",
    # For pairs of inference, where "no dog barks" or "it may bark" would make labels doubtful:
    "claim": """
        1    [      nsubj         known
        0.4  <      aux           have | be | do
        1    ]      obj           known
        1    ]      punct         ./PUNCT""",
    "definite": "0.5 [ det the/DET",
    "end": "1 ] punct ./PUNCT*6 | !/PUNCT | ?/PUNCT",
}

# Closed classes: the tag and the words, frequent ones first; after the stroke those for a plural.
CLOSED_CLASSES = {
    "determiner": "DET: the a this that every some no another each any / the all some these no"
    " those",
    "he": "PRON: it he she this that someone one / they we you these all some many those",
    "him": "PRON: it him her that this one nothing / them us you all these some those",
    "his": "PRON: its his her one's / their our your",
    "who": "PRON: that who which",
    "be": "AUX: is was / are were",
    "have": "AUX: has had / have had",
    "do": "AUX: does did / do did",
    "modal": "AUX: will can would must may could should might",
    "adposition": "ADP: of in to with on for at from by about like over under after near before"
    " since",
    "particle": "ADP: up out off down over in on around by past",
    "subordinator": "SCONJ: if because when after while since before as until like though so",
    "conjunction": "CCONJ: and or but yet nor so",
    "free": "ADV: then now when so there still how never just once too before well soon around",
    "degree-word": "ADV: very so too quite more almost rather just even",
    "interjection": "INTJ: oh well no yes so please look right",
    "number": "NUM: two 3 ten four 12 seven 5 one 40 six 1984 nine 100",
    "amount": "SYM: % $ £",
    "institution": "PROPN: University Bank Museum",
}

# Open classes: the tag, how many words a topic has, and the endings of a word's forms, where `-` is
# none: the two numbers of nouns; -s, base, -ed and -ing of verbs. A sentence mostly keeps to the
# words of one topic, and each head to its favourites in it: words are known by their company too.
OPEN_CLASSES = {
    "person": "NOUN 8 - s",
    "thing": "NOUN 10 - s",
    "place": "NOUN 6 - s",
    "idea": "NOUN 8 - s",
    "act": "VERB 7 s - ed ing",
    "affect": "VERB 5 s - ed ing",
    "give": "VERB 6 s - ed ing",
    "say": "VERB 4 s - ed ing",
    "adjective": "ADJ 12 -",
    "participle": "ADJ 5 ed",
    "manner": "ADV 12 ly",
    "fast": "ADV 5 -",
    "PER": "PROPN 10 -",
    "LOC": "PROPN 8 -",
    "ORG": "PROPN 6 -",
    "surname": "PROPN 8 -",
}
TOPICS = 24
# Stems are made from a name, most often the class's own. Classes whose stems have the same name
# share them: what one does with a hammer is to hammer, an adverb of manner is an adjective and -ly.
STEMS = {
    "affect": "thing",
    "participle": "affect",
    "manner": "adjective",
    "fast": "adjective",
    "surname": "LOC",
}
SYLLABLES = [
    "b bl br c ch cl cr d dr f fl fr g gr h j l m n p pl pr qu r s sh sl sp st t tr v w",
    "a e i o u a e i o u ai ea ee oo ou",
    "b ct d ft ld lk ll lm lp lt m mp n nd ng rb rd rk rl rm rn rp sk sp st",
    "ant el en er et il in om or ow",
]

# Which of its four forms a verb has beside these words: will look, is looking.
VERB_FORMS = {"modal": 1, "do": 1, "to/PART": 1, "have": 2, "be": 3}
PAST = 2
BY_NUMBER = -1  # she looks, they look; a look, two looks
ENTITY_TYPES = {"PER": "PER", "LOC": "LOC", "ORG": "ORG", "institution": "ORG"}
# Phrases within phrases: the deeper, the rarer, so that sentences end.
RECURSIVE = {"conj", "ccomp", "xcomp", "advcl", "acl:relcl", "nmod"}


@dataclass(eq=False)
class Node:
    """A word of a sentence in the making."""

    name: str  # of its class; or the word itself and its tag, "of/ADP"
    deprel: str
    head: "Node"
    topic: int
    plural: bool = False
    depth: int = 0  # of recursive phrases
    upos: str = ""
    rank: int = 0  # in its class and topic; 0 is the most frequent
    company: int = 0  # what its dependents' ranks begin with, so that it has favourites
    forms: tuple = ()
    form: int = 0
    entity: str = "O"


# Returns the options of a text, each as often as its weight says and split in its names.
@cache
def parse_options(text):
    options = []
    for option in text.split(" | "):
        names, _, weight = option.partition("*")
        options += [names.split()] * int(weight or 1)
    return options


# Returns the forms of a word of an open class, and its company. They depend on nothing else.
@cache
def open_word(name, topic, rank):
    tag, _, *endings = OPEN_CLASSES[name].split()
    rng = random.Random(f"{STEMS.get(name, name)} {topic} {rank}")
    # The most frequent word of a topic has one syllable, and the others have two.
    parts = SYLLABLES[:3] if rank == 0 else SYLLABLES
    stem = "".join(rng.choice(part.split()) for part in parts)
    if tag == "PROPN":
        stem = stem.capitalize()
    return [stem + ending.strip("-") for ending in endings], rng.randrange(1000)


def zipf(rng, size):
    return int((size + 1) ** rng.random()) - 1


# Gives a node another word of its open class.
def rename(node, rank, topic):
    node.rank, node.topic = rank, topic
    node.forms, node.company = open_word(node.name, topic, rank)
    return node


# Returns a word for the top of a phrase. Ranks follow Zipf's law.
def make_word(rng, topic, name, deprel, head):
    word, _, upos = name.partition("/")
    node = Node(name, deprel, head, topic, upos=upos, forms=[word])
    node.depth = head.depth + (deprel in RECURSIVE)
    node.plural = rng.random() < 0.35 and deprel != "compound"
    # These agree with their heads: they were, these dogs, dogs that were.
    if name == "who" or deprel in ("det", "aux", "cop", "acl:relcl"):
        node.plural = head.plural
    # Of a closed class the frequent words come first; an open one has a topic's words by rank.
    if name in CLOSED_CLASSES:
        node.upos, _, words = CLOSED_CLASSES[name].partition(": ")
        words = words.split(" / ")[-1 if node.plural else 0].split()
        node.forms = [words[zipf(rng, len(words))]]
    if name in OPEN_CLASSES:
        node.upos, size, *_ = OPEN_CLASSES[name].split()
        rank = zipf(rng, int(size))
        # Most often the head's favourites are the frequent ones, and the topic stays.
        if rng.random() < 0.6:
            rank += head.company
        if rng.random() >= 0.85:
            node.topic = int(rng.random() * TOPICS)
        rename(node, rank % int(size), node.topic)
    if node.upos == "PROPN":
        node.plural = False
    # An auxiliary decides the form of its verb; without one it is present or past.
    if name in VERB_FORMS and head.upos == "VERB":
        head.form = VERB_FORMS[name]
    past = rng.random() >= 0.55
    if node.upos in ("NOUN", "VERB"):
        node.form = PAST if past and node.upos == "VERB" else BY_NUMBER
    return node


# Returns the words of a random phrase. Phrases stand side by side, so the trees are projective.
def make_phrase(rng, topic, options, deprel, head):
    # Options lead to options until the first name is a class or a word. The rules of an inner
    # option come before those of the outer one.
    name, rules = "", []
    while not name or name in PHRASES:
        names = rng.choices(parse_options(PHRASES.get(name, options)))[0]
        new = [rule for part in names for rule in DEPENDENTS.get(part, "").splitlines()]
        rules = new + rules
        name = names[0]
    top = make_word(rng, topic, name, deprel, head)
    # Each dependent is a phrase of its own, put on one of the two sides of the top word.
    before, after = [], []
    for rule in filter(None, rules):
        chance, places, relation, dependent = rule.split(maxsplit=3)
        chance, starless = float(chance), relation.strip("*")
        if starless in RECURSIVE:
            chance *= 0.6**top.depth
        while rng.random() < chance:
            phrase = make_phrase(rng, topic, dependent, starless, top)
            place = rng.choices(places)[0]
            side = before if place in "[<" else after
            at = 0 if place in "[>" else len(side)
            side[at:at] = phrase
            if relation == starless:
                break
    # Only now is it known whether a subject is plural and which form the top has.
    if deprel in ("nsubj", "nummod"):
        head.plural = top.plural or deprel == "nummod"
    if top.form == BY_NUMBER:
        top.form = int(top.plural)
    # A name is one entity, with all that belongs to it.
    nodes = [*before, top, *after]
    if name in ENTITY_TYPES:
        mark_entity(nodes, top)
    return nodes


# Marks the phrase of a name as one entity. An outer name overrules those inside it.
def mark_entity(nodes, top):
    prefix = "B-"
    for node in nodes:
        # What joins the name to the rest of the sentence is no part of it: "near Paris".
        if node.head is not top or node.deprel not in ("case", "cc", "punct"):
            node.entity = prefix + ENTITY_TYPES[top.name]
            prefix = "I-"


# Returns the words of a random sentence. Some topics are more frequent than others.
def make_clause(rng, options):
    topic = int(TOPICS * rng.random() ** 2)
    return make_phrase(rng, topic, options, "root", Node("", "", None, topic))


def make_sentence(nodes):
    place = {node: number for number, node in enumerate(nodes, start=1)}
    rows = [(n.forms[n.form], n.upos, place.get(n.head, 0), n.deprel, n.entity) for n in nodes]
    return Sentence(*np.array(rows, object).T.tolist())


def generate(n, seed=0):
    """`n` random sentences of the built-in language: words, tags, trees, entities.

    The same (n, seed) gives the same in any process; another seed, others of the same language.
    """
    rng = random.Random(seed)
    for _ in range(n):
        yield make_sentence(make_clause(rng, PHRASES["sentence"]))


# ----------------------------------------------------------------------- pairs for inference (NLI)
# An edit makes a hypothesis of a premise, in place, and returns the word that must stay as it is.


def choose(rng, nodes, upos, kept=None):
    return rng.choice([node for node in nodes if node.upos == upos and node is not kept])


def omit(rng, nodes, kept=None):
    """Entailment: "the red dog" becomes "the dog"."""
    nodes.remove(choose(rng, nodes, "ADJ", kept))


def generalize(rng, nodes):
    """Entailment: "the dog" becomes "the animal", the most frequent noun of class and topic."""
    noun = choose(rng, nodes, "NOUN")
    return rename(noun, 0, noun.topic)


def exchange(rng, nodes):
    """Neutral: "the dog" becomes "the vehicle", as frequent a noun of another topic."""
    noun = choose(rng, nodes, "NOUN")
    return rename(noun, 0, (noun.topic + rng.randrange(1, TOPICS)) % TOPICS)


def describe(rng, nodes):
    """Neutral: "the dog" becomes "the red dog", with an adjective that tells something new."""
    noun = choose(rng, nodes, "NOUN")
    adjective = make_word(rng, noun.topic, "adjective", "amod", noun)
    told = [(node.upos, node.topic, node.rank // 2) for node in nodes]
    if ("ADJ", adjective.topic, adjective.rank // 2) in told:
        return describe(rng, nodes)
    nodes.insert(nodes.index(noun), adjective)
    return adjective


def oppose(rng, nodes):
    """Contradiction: "the red dog" becomes "the pale dog". Ranks 2k and 2k + 1 are opposites."""
    adjective = choose(rng, nodes, "ADJ")
    return rename(adjective, adjective.rank ^ 1, adjective.topic)


def negate(rng, nodes):
    """Contradiction: "she looks" becomes "she not looks", or the other way round."""
    verb = choose(rng, nodes, "VERB")
    others = [node for node in nodes if node.upos != "PART"]
    if len(others) == len(nodes):
        others.insert(nodes.index(verb), make_word(rng, 0, "not/PART", "advmod", verb))
    nodes[:] = others


EDITS = {
    "entailment": [generalize, generalize, omit],
    "neutral": [exchange, describe],
    "contradiction": [negate, negate, oppose],
}


def generate_inferences(n, seed=0):
    """`n` random pairs of short sentences of the built-in language, labels in equal shares.

    As in natural corpora, words carry much of the evidence: a "not" in the hypothesis speaks for
    contradiction, a general noun for entailment or neutral, an adjective that the premise lacks
    for neutral or contradiction. The rest is comparison: is the general noun of a topic of the
    premise, is an adjective the opposite of one there, has a "not" gone? Every hypothesis leaves
    some adjectives out, so that its length tells nothing. The nouns are definite: what is said of
    them holds with a "not" beside the verb and without.
    """
    rng = random.Random(f"inference {seed}")
    labels = []
    for _ in range(n):
        nodes = make_clause(rng, "act claim")
        # Three adjectives, so that there is one to oppose and there are two to omit.
        for _ in range(3):
            describe(rng, nodes)
        if rng.random() < 0.2:
            negate(rng, nodes)
        premise = make_sentence(nodes)
        # The length is drawn before the label, and so cannot tell it.
        size = len(nodes) - rng.choice([1, 2])
        labels = labels or rng.sample(INFERENCES, 3)
        label = labels.pop()
        changed = rng.choice(EDITS[label])(rng, nodes)
        while len(nodes) > size:
            omit(rng, nodes, changed)
        yield Inference(premise, make_sentence(nodes), label)


# --------------------------------------------------------------------------- the transformations
@dataclass
class Context:
    """What a transformation may depend on beside the sentence."""

    seed: int
    index: int  # the sentence's number in its text
    order: dict[str, int]  # an order model of learn_order


@dataclass
class Respelling:
    """Changes each word by itself; `restore` is the inverse of `spell`."""

    spell: Callable
    restore: Callable

    def apply(self, sentence, context):
        return replace(sentence, words=[self.spell(word) for word in sentence.words]), ()

    def undo(self, sentence, step):
        return replace(sentence, words=[self.restore(word) for word in sentence.words])


@dataclass
class Reordering:
    """Changes the order; `order_of` lists the old places of the words, 0-based, in the new order.
    The way back needs these and, as an entity may come apart, the entity tags of before."""

    order_of: Callable

    def apply(self, sentence, context):
        places = self.order_of(sentence, context)
        return reorder(sentence, places), (places, sentence.entities)

    def undo(self, sentence, step):
        places, entities = step
        return replace(reorder(sentence, np.argsort(places).tolist()), entities=entities)


# Returns the words that stood at `places`, with all their labels.
def reorder(sentence, places):
    # All lists are moved alike. Then heads are renumbered and BIO prefixes put right.
    moved = replace(sentence)
    for name, column in vars(sentence).items():
        if column is not None:
            setattr(moved, name, [column[old] for old in places])
    if sentence.heads is not None:
        position = {old + 1: new for new, old in enumerate(places, start=1)}
        moved.heads = [position.get(head, 0) for head in moved.heads]
    if sentence.entities is not None:
        moved.entities = move_entities(sentence.entities, places)
    return moved


# Returns BIO tags in a new order. An entity that comes apart becomes several, and each begins with
# B-. The authors' code differs: after an inversion it leaves an I- before its B-.
def move_entities(tags, places):
    numbers, entity, previous = [], 0, "O"
    for tag in tags:
        # An I- tag that continues nothing of its type begins an entity, as in CoNLL-2003.
        entity += tag.startswith("B-") or tag[1:] != previous[1:]
        numbers.append(entity)
        previous = tag
    # Neighbours that were of one entity are so still.
    moved, last = [], 0
    for old in places:
        prefix = "I" if numbers[old] == last else "B"
        moved.append("O" if tags[old] == "O" else prefix + tags[old][1:])
        last = numbers[old]
    return moved


def transliterate_word(word):
    """The word in Braille, a pattern U+2800 to U+28FF for each byte of its UTF-8: a bijection."""
    return "".join([chr(0x2800 + byte) for byte in word.encode("utf-8", "surrogatepass")])


def restore_word(word):
    """The word whose transliteration this is. Raises InputError if there is none."""
    try:
        return bytes([ord(char) - 0x2800 for char in word]).decode("utf-8", "surrogatepass")
    except ValueError:
        raise InputError(f"{word!r} is no transliterated word; give a derived text") from None


MARK = r"[\p{Sentence_Terminal}…]"  # in any script


# An order is a list of the places where the words stood before.


def inverted_order(sentence, context):
    """The words in reverse, but for the mark that ends the sentence, in either script. The authors
    keep '.', '!' and '?' last; here it is the marks of all scripts, and '...' and '?!' too."""
    places = list(range(len(sentence.words)))
    last = "".join(sentence.words[-1:])
    with suppress(InputError):
        last = restore_word(last)
    moving = len(places) - bool(regex.fullmatch(MARK + "+", last))
    return places[:moving][::-1] + places[moving:]


def permuted_order(sentence, context):
    """The words in an order that depends on the seed and the sentence's number alone."""
    places = list(range(len(sentence.words)))
    # A string as the seed gives the same order in any process.
    random.Random(f"{context.seed}/{context.index}").shuffle(places)
    return places


# `syntax` has the aim of Galactic Dependencies (Wang and Eisner, TACL 2016): the dependents of
# nouns and verbs in the order of another language. Its model is simpler, as it only counts pairs:
# how often under a noun an adjective that is an `amod` came before the noun itself ("NOUN amod/ADJ
# head/NOUN"), and the same without tags ("NOUN amod head"), to fall back on.
SOV_ROWS = {
    "VERB": "discourse vocative advcl nsubj obl iobj obj ccomp xcomp advmod head aux mark conj cc",
    "NOUN": "cc acl det nmod compound head flat amod nummod case cop aux mark conj",
}
# A language to imitate without a treebank: verbs last, adjectives after nouns, postpositions.
SOV = {
    f"{kind} {first} {second}": 1
    for kind, row in SOV_ROWS.items()
    for first, second in combinations(row.split(), 2)
}


# Returns a row for each word, the places of it and of its dependents from left to right. The last
# row is the root's.
def rows_of(heads):
    rows = [[] for _ in range(len(heads) + 1)]
    for word, head in enumerate(heads):
        rows[word].append(word)
        rows[head - 1].append(word)
    return rows


# Returns all words that hang from the root, in the order of the rows. A phrase is in one piece.
def read_off(rows):
    order, opened, stack = [], set(), rows[-1][::-1]
    while stack:
        word = stack.pop()
        # A word stands in its head's row for its whole phrase, and in its own row for itself.
        if word in opened:
            order.append(word)
        else:
            opened.add(word)
            stack += reversed(rows[word])
    return order


# Yields the rows of nouns and verbs: the head, its kind, and what each word of the row is to it, as
# in {3: "amod/ADJ"}. Punctuation is left out, as it does not move, and so are the subtypes of
# relations, as treebanks differ in them.
def moving_rows(sentence):
    if None in (sentence.upos, sentence.heads):
        raise InputError("syntax needs tags and trees; give CoNLL-U that has UPOS and HEAD")
    for head, row in enumerate(rows_of(sentence.heads)[:-1]):
        kind = {"NOUN": "NOUN", "PROPN": "NOUN", "VERB": "VERB"}.get(sentence.upos[head])
        items = {}
        for word in row if kind else []:
            relation = sentence.deprels[word].partition(":")[0] if word != head else "head"
            if relation != "punct":
                items[word] = f"{relation}/{sentence.upos[word]}"
        yield head, kind, items


# Returns the two keys that an order model has for a pair of items, without tags and with them.
def keys_of(kind, first, second):
    relations = [item.partition("/")[0] for item in (first, second)]
    return " ".join([kind, *relations]), f"{kind} {first} {second}"


def learn_order(sentences):
    """Learns the order model of a treebank's language. JSON can keep it."""
    model = Counter()
    for sentence in sentences:
        for _, kind, items in moving_rows(sentence):
            for pair in combinations(items.values(), 2):
                model.update(keys_of(kind, *pair))
    return model


# Returns the log-odds of the first item before the second. What is known without tags counts as
# one observation with them.
def log_odds(model, kind, first, second):
    p = 0.5
    keys, reverse_keys = keys_of(kind, first, second), keys_of(kind, second, first)
    for key, reverse in zip(keys, reverse_keys, strict=True):
        before, after = model.get(key, 0), model.get(reverse, 0)
        p = (before + p) / (before + after + 1)
    return math.log(p / (1 - p))


# Returns the places of a row's items in the order of the model's language. That is the best of all
# orders for up to 7 items. More are sorted by how much each wants to be before all the others.
def arrange(model, kind, items):
    # A head may have hundreds of dependents, but these are of few kinds.
    odds = {pair: log_odds(model, kind, *pair) for pair in product(set(items), repeat=2)}
    if len(items) <= 7:
        return best_order(tuple(odds[pair] for pair in product(items, repeat=2)), len(items))
    wish = Counter()
    for (item, other), value in odds.items():
        wish[item] += value * items.count(other)
    return sorted(range(len(items)), key=lambda place: -round(wish[items[place]], 9))


# Returns the order in which the log-odds add up to the most; of equals, the given one.
@cache
def best_order(odds, size):
    def score(order):
        return round(sum(odds[a * size + b] for a, b in combinations(order, 2)), 9)

    return max(permutations(range(size)), key=score)


def syntax_order(sentence, context):
    """The dependents of nouns and verbs in the order of the model's language. Subtrees move as
    wholes, and one with gaps is drawn together. Punctuation keeps its place in its row, so that a
    final '.' stays final."""
    rows = rows_of(sentence.heads or [])
    for head, kind, items in moving_rows(sentence):
        # The places of the row that are not punctuation's take the items in their best order.
        moving = list(items)
        best = iter(arrange(context.order, kind, list(items.values())))
        rows[head] = [moving[next(best)] if word in items else word for word in rows[head]]
    return read_off(rows)


TRANSFORMS = {
    "transliterate": Respelling(transliterate_word, restore_word),
    "invert": Reordering(inverted_order),
    "permute": Reordering(permuted_order),
    "syntax": Reordering(syntax_order),
}


def parse_transform(text):
    """The names in `transliterate+invert`, in their order. Raises InputError for an unknown one."""
    for name in text.split("+"):
        if name not in TRANSFORMS:
            raise InputError(f"no transformation {name!r}; there are {', '.join(TRANSFORMS)}")
    return tuple(text.split("+"))


def transform(sentence, names, seed=0, index=0, order=SOV):
    """The sentence after the named transformations, one by one, and the steps for `restore`.

    `permute` depends on seed and index, the sentence's number; `syntax` on the order model.
    """
    # A name may itself be a composition, "transliterate+invert".
    context, steps = Context(seed, index, order), []
    for text in names:
        for name in parse_transform(text):
            sentence, step = TRANSFORMS[name].apply(sentence, context)
            steps.append((name, step))
    return sentence, steps


def restore(sentence, steps):
    """The sentence that `transform` was given, labels and all."""
    for name, step in reversed(steps):
        sentence = TRANSFORMS[name].undo(sentence, step)
    return sentence


# ----------------------------------------------------------------------------------- the readers
# Words are those of Unicode's word boundaries, `(?w)\b`, which keep vowel signs and joiners with
# their letters and split Han one by one. Beyond them titles keep their dot, hyphens join, dots and
# dashes stand in rows, and Braille and scripts without boundaries, such as Thai, run to a space.
WORD = regex.compile(
    r"(?w)(?:Mr|Mrs|Ms|Dr|St)\.|\.{2,}|-{2,}|[\u2800-\u28ff]+|\p{Line_Break=Complex_Context}+"
    r"|\w.*?\b(?:[-'\u2019]\w.*?\b)*|\S.*?\b"
)
# A sentence ends with marks of which one is full-width, as these take no space after them; or with
# marks and white space, if no lower case comes next; or with its line. Quotes may close after them.
CLOSING = r"[\"'»)\u201d\u2019\u300d\u300f\uff09]*+"
SENTENCE = regex.compile(
    rf"(?s).+?(?<!\b(?:Mr|Mrs|Ms|Dr|St))(?:{MARK}*?[\u3002\uff01\uff1f\uff61]{MARK}*+{CLOSING}\s*+"
    rf"|{MARK}++{CLOSING}\s++(?!\p{{Ll}}))|.+"
)
# The numbers of multi-word tokens, "3-4", and of empty nodes, "3.1".
MULTIWORD = regex.compile(r"\d+[-.]\d+")
# A row of CoNLL-U by its number and its many columns. Rows that are damaged, split by spaces or
# ended as on old Macs count too, so that they are refused and not taken for plain text.
CONLLU_ROW = regex.compile(r"(?:^|\r)\d+(?:[-.]\d+)?(?:(?:\t[^\t]*){7}| .* _ )")
# An item of MISC. Treebanks with other annotation under this name have other values.
ENTITY = regex.compile(r"(?<![^|])Entity=(O|[BI]-[^|]+)")
# Universal NER has `-` where it should be O.
BIO_TAG = regex.compile(r"[O-]|[BI]-\S+")
# By the first letter of a tag that cannot be read.
SCHEMES = {"S": "IOBES", "E": "IOBES", "U": "BILOU", "L": "BILOU", "B": "B and I without types"}
GAP = regex.compile(r"[\s,\[\]]*")
# Annotators did not agree on a pair with `-`, and exports write -1 or nothing in its place.
UNLABELLED = ("-", "-1", "")
# What else the labels are called.
LABELS = {**dict(zip("012", INFERENCES, strict=True)), "contradictory": "contradiction"}


# Yields pairs of "file:line" and that line of a UTF-8 file, or for `-` of standard input. A line of
# more than `limit` bytes comes in pieces. A byte order mark at the beginning is dropped.
def read_lines(path, limit=-1):
    # Bytes are split at "\n" and nowhere else: text may hold other characters that end lines. The
    # decoder keeps a character whose bytes lie in two pieces.
    number = 1
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            while data := file.readline(limit):
                yield f"{path}:{number}", decoder.decode(data)
                number += data.endswith(b"\n")
        decoder.decode(b"", final=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file that can be read") from None
    except UnicodeDecodeError:
        message = f"{path}:{number}: bytes that are not UTF-8; convert the file to UTF-8"
        raise InputError(message) from None


# Yields the sentences that have words, and raises an InputError if none has.
def nonempty(path, sentences):
    empty = True
    for sentence in sentences:
        if sentence.words:
            yield sentence
            empty = False
    if empty:
        raise InputError(f"{path}: empty; give a file with at least one sentence")


def read_text(path):
    """The sentences of a plain text: words only. The text and its lines may have any length."""
    return nonempty(path, split_text(read_lines(path, limit=2**20)))


def split_text(lines):
    rest = ""
    for _, piece in chain(lines, [("", "\n")]):
        *texts, rest = SENTENCE.findall(rest + piece) or [""]
        # The last one may go on in the next piece of its line.
        if piece.endswith("\n"):
            texts.append(rest)
            rest = ""
        for text in texts:
            yield Sentence(WORD.findall(text))


# Yields what stands between blank lines, as lists of (place, line).
def blocks_of(lines):
    for filled, block in groupby(lines, key=lambda pair: bool(pair[1].strip())):
        if filled:
            yield [(place, line.rstrip("\r\n")) for place, line in block]


@dataclass
class Tree(Sentence):
    """A sentence of CoNLL-U; its rows, ten columns a word, travel with the words."""

    rows: list[list[str]] | None = None


# Returns the Tree of a block of CoNLL-U, and those lines of it that are no words: comments,
# multi-word tokens and empty nodes.
def parse_block(block):
    rows, others = [], []
    for place, line in block:
        columns = line.split("\t")
        if line.startswith("#") and "\r" not in line:
            others.append(line)
        elif len(columns) != 10:
            raise InputError(f"{place}: {len(columns)} columns; give lines of 10, split by tabs")
        elif columns[0] == str(len(rows) + 1):
            rows.append(columns)
        elif MULTIWORD.fullmatch(columns[0]):
            others.append(line)
        else:
            raise InputError(
                f"{place}: word {columns[0]!r}; number words 1, 2, 3, with a blank line at the end"
            )
    tree = Tree([], rows=rows)
    if rows:
        fill_tree(tree, block[0][0])
    return tree, others


# Checks the rows of a Tree and takes its words and labels from them.
def fill_tree(tree, place):
    columns = np.array(tree.rows, object).T.tolist()
    tree.words, upos, heads, misc = columns[1], columns[3], columns[6], columns[9]
    # Some treebanks come without the text that others own. A word may be `_`, but not all of them.
    if len(upos) > 1 and set(tree.words) == {"_"}:
        raise InputError(f"{place}: the text has been taken out; get it from its publisher")
    # A column that is all `_` is absent.
    if set(upos) != {"_"}:
        tree.upos = upos
    if set(heads) != {"_"}:
        wrong = set(heads) - {str(number) for number in range(len(heads) + 1)}
        if wrong:
            raise InputError(f"{place}: head {min(wrong)!r}; give 0 or the number of a word")
        tree.heads, tree.deprels = [int(head) for head in heads], columns[7]
        # All words of a tree are reached from its root. Others are in a cycle.
        if heads.count("0") != 1 or len(read_off(rows_of(tree.heads))) < len(heads):
            raise InputError(f"{place}: no tree; let all heads lead to one word, whose head is 0")
    tags = [ENTITY.search(cell) for cell in misc]
    if any(tags):
        tree.entities = [tag[1] if tag else "O" for tag in tags]


def read_conllu(path):
    """The sentences of a file in CoNLL-U (https://universaldependencies.org/format.html): words and
    what there is of UPOS, trees, and entities (MISC with `Entity=B-PER`). Multi-word tokens and
    empty nodes are no words."""
    blocks = blocks_of(read_lines(path))
    for tree in nonempty(path, (parse_block(block)[0] for block in blocks)):
        yield Sentence(tree.words, tree.upos, tree.heads, tree.deprels, tree.entities)


# Returns whether the lines are CoNLL-U, which the first one that is no comment tells, and an
# iterator over all of them, so that a pipe can be told too.
def peek(lines):
    # What is looked at is kept, and comes again.
    seen = []
    for place, line in lines:
        seen.append((place, line))
        if not regex.match(r"#|\s*$", line):
            break
    return any(CONLLU_ROW.search(line) for _, line in seen), chain(seen, lines)


def looks_like_conllu(path):
    """Whether a file is CoNLL-U, by its content. What this reads of a pipe is gone afterwards."""
    return peek(read_lines(path))[0]


# Splits columns at tabs, or at spaces where there are none. Other white space belongs to the words.
def split_row(line):
    line = line.rstrip(" \t")
    return line.split("\t") if "\t" in line else regex.split(" +", line.lstrip(" "))


def read_bio(path):
    """The sentences of a file with a word and its entity tag a line, as in CoNLL-2003 (`word ...
    tag`), Universal NER (`index word tag ...`) and others: the tag is in the column after the word
    if that holds tags, else in the last one. `-` is O. An I- that continues nothing becomes B-."""
    return nonempty(path, bio_sentences(read_lines(path)))


def bio_sentences(lines):
    # A new document ends the sentence as a blank line does.
    ended = ((place, "" if line.startswith("-DOCSTART-") else line) for place, line in lines)
    blocks = blocks_of(ended)
    # What a column holds is a matter of the file and not of a row: a hundred sentences tell.
    first = list(islice(blocks, 100))
    rows = [split_row(line) for _, line in chain(*first) if not line.startswith("#")]
    widths = {len(row) for row in rows}
    # The first column is an index if it is a number in all rows, and the word is in the next one.
    word = int(all(row[0].isdecimal() and len(row) > 2 for row in rows))
    # The tag stands right after the word if nothing but tags does, and else at the end.
    after = {row[word + 1] for row in rows if len(row) > word + 1} - {"-"}
    tag = word + 1 if after and all(map(BIO_TAG.fullmatch, after)) else -1
    for block in chain(first, blocks):
        sentence = Sentence([], entities=[])
        for place, line in block:
            row = split_row(line)
            cell = row[tag] if len(row) > word + 1 else ""
            readable = BIO_TAG.fullmatch(cell) and row[word]
            # "# O" is a word where other rows have two columns too. Else a `#` begins a comment.
            if line.startswith("#") and not (readable and word == 0 and len(row) in widths):
                continue
            if not readable:
                scheme = SCHEMES.get(cell[:1], "unknown")
                found = f"word {''.join(row[word : word + 1])!r}, tag {cell!r} (scheme: {scheme})"
                message = f"{place}: {found}; give a word and O, B-X or I-X"
                raise InputError(message)
            sentence.words.append(row[word])
            sentence.entities.append("O" if cell == "-" else cell)
        yield reorder(sentence, range(len(sentence.words)))


# The names of the columns in MNLI, XNLI and their exports.
COLUMNS = [("premise", "sentence1"), ("hypothesis", "hypo", "sentence2"), ("gold_label", "label")]


# Yields (place, row) of a tab-separated table with a header. Quotes are text.
def table_rows(path, text):
    header = []
    for number, line in enumerate(text.split("\n"), start=1):
        cells = line.rstrip("\r").split("\t")
        if line.strip() and not header:
            header = cells
        elif len(cells) == len(header):
            yield f"{path}:{number}", dict(zip(header, cells, strict=True))
        elif line.strip():
            raise InputError(f"{path}:{number}: {len(cells)} columns; the header has {len(header)}")


# Yields (place, row) of JSON, be it an array of objects, an object a line, or one object.
def json_rows(path, text):
    text = text.rstrip("] \t\r\n")
    decoder, at, number = json.JSONDecoder(), 0, 1
    while at < len(text):
        # Between the objects of an array stand brackets and commas, which tell nothing.
        start = GAP.match(text, at).end()
        number += text.count("\n", at, start)
        try:
            row, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            raise InputError(f"{path}:{number}: no JSON; mend the line") from None
        yield f"{path}:{number}", row if isinstance(row, dict) else {}
        number += text.count("\n", start, at)


def read_inferences(path, language="en"):
    """The pairs in one language of a file of MNLI, XNLI or an export of them: a tab-separated table
    with a header, or JSON. Pairs without a gold label are left out."""
    text = "".join(line for _, line in read_lines(path))
    rows = json_rows if regex.match(r"\s*[\[{]", text) else table_rows
    others, empty = set(), True
    for place, row in rows(path, text):
        # Of the gold label and others the gold label comes first.
        cells = []
        for names in COLUMNS:
            cells += [row[name] for name in names if name in row][:1]
        try:
            premise, hypothesis, label = cells
            (premise + "" + hypothesis).encode()  # which half of a surrogate pair has not
        except (TypeError, ValueError):
            message = f"{place}: no text; give columns premise, hypothesis and label"
            raise InputError(message) from None
        if row.get("language", language) != language:
            others.add(str(row["language"]))
            continue
        label = LABELS.get(str(label).lower(), str(label).lower())
        if label in UNLABELLED:
            continue
        if label not in INFERENCES:
            raise InputError(f"{place}: label {label!r}; give {', '.join(INFERENCES)} or -")
        premise, hypothesis = Sentence(WORD.findall(premise)), Sentence(WORD.findall(hypothesis))
        if not (premise.words and hypothesis.words):
            raise InputError(f"{place}: a sentence without words; mend or remove the line")
        yield Inference(premise, hypothesis, label)
        empty = False
    if empty:
        choice = f"choose one of {', '.join(sorted(others))}" if others else "give another file"
        raise InputError(f"{path}: empty, no labelled pair in language {language!r}; {choice}")


# ------------------------------------------------------------------------------ the command line
# A transformed block of CoNLL-U says in `# transform = ...` how it was made, and in MISC what place
# each word had, so `restore` needs nothing beside the file. All columns travel with their words,
# DEPS with its old numbers. Comments stay as they are, but `# text` is kept as `#old# text`, and so
# are multi-word tokens and empty nodes, which would be wrong in the new order. All of it comes
# back, to the byte, but for three things: comments between words come back before them, a second
# blank line in a row does not, and lines end as on Unix.

# What `transform_block` puts before MISC.
NOTE = regex.compile(r"^(?:Entity=[^|]+\|)?Old=(\d+)\|?")


# Returns the lines of a Tree, with its present words and heads, and the blank line after it.
def format_conllu(tree, comments, misc):
    lines = []
    for number, columns in enumerate(tree.rows):
        head = columns[6] if tree.heads is None else tree.heads[number]
        place = f"{number + 1}\t{tree.words[number]}"
        lines.append("\t".join([place, *columns[2:6], str(head), *columns[7:9], misc[number]]))
    # Comments come first, a multi-word token "3-4" before word 3, and an empty node "3.1" after it.
    number = regex.compile(r"\d+(?:\.\d+)?|")
    return [*sorted(comments + lines, key=lambda line: float(number.match(line)[0] or 0)), ""]


# Returns the lines of a block of CoNLL-U after the named transformations.
def transform_block(block, names, **context):
    tree, others = parse_block(block)
    try:
        tree, _ = transform(tree, names if tree.words else [], **context)
    except InputError as error:
        raise InputError(f"{block[0][0]}: {error}") from None
    comments = [f"# transform = {'+'.join(names)}", f"# text = {' '.join(tree.words)}"]
    # What would be taken for the new sentence's own is marked as old.
    for line in others:
        comments.append(line if regex.match("#(?! text| transform|old)", line) else f"#old{line}")
    # MISC begins with what is new. `read_conllu` takes the first of two entity tags.
    misc = [f"Old={row[0]}|{row[9]}".removesuffix("|_") for row in tree.rows]
    if tree.entities is not None:
        misc = [f"Entity={tag}|{cell}" for tag, cell in zip(tree.entities, misc, strict=True)]
    return format_conllu(tree, comments, misc)


# Returns the lines of the block that `transform_block` was given.
def restore_block(block):
    tree, others = parse_block(block)
    try:
        # Of the comments the first two are those that `transform_block` added.
        names = parse_transform(others[0].removeprefix("# transform = "))
        old = [int(NOTE.match(row[9])[1]) for row in tree.rows]
        # By the old places the order comes back at once, with heads and rows.
        tree = reorder(tree, np.argsort(old).tolist())
        if sorted(old) != list(range(1, len(old) + 1)):
            raise ValueError
        misc = [NOTE.sub("", row[9]) or "_" for row in tree.rows]
        # What is left of the steps is the spelling, so these ones reorder nothing.
        nowhere = range(len(old)), None
        tree.words = restore(Sentence(tree.words), [(name, nowhere) for name in names]).words
    except (ValueError, IndexError, TypeError):
        raise InputError(f"{block[0][0]}: not as transform wrote it; run transform again") from None
    return format_conllu(tree, [line.removeprefix("#old") for line in others[2:]], misc)


# Yields the lines of the derived file: CoNLL-U of CoNLL-U, and of plain text a sentence a line.
def transform_file(args):
    names, context = parse_transform(args.transform), {"seed": args.seed}
    if args.order:
        context["order"] = learn_order(read_conllu(args.order))
    is_conllu, lines = peek(read_lines(args.file, limit=2**24))
    if not is_conllu:
        if "syntax" in names:
            raise InputError(f"{args.file}: plain text has no trees for syntax; give CoNLL-U")
        for index, sentence in enumerate(nonempty(args.file, split_text(lines))):
            yield " ".join(transform(sentence, names, index=index, **context)[0].words)
    for index, block in enumerate(blocks_of(lines)):
        yield from transform_block(block, names, index=index, **context)


# Yields the lines of the treebank that `transform` was given. Plain text keeps no old places.
def restore_file(args):
    is_conllu, lines = peek(read_lines(args.file))
    if not is_conllu:
        raise InputError(f"{args.file}: no CoNLL-U; plain text cannot be restored")
    for block in blocks_of(lines):
        yield from restore_block(block)


# Writes the built-in language and its derivative, as CoNLL-U and as text, and their dictionary.
def generate_files(args):
    parse_transform(args.transform)  # An unknown name is told before anything is written.
    args.file = f"{args.out}/original.conllu"
    sentences = generate(args.sentences, args.seed)
    write(args.file, chain.from_iterable(map(format_sentence, sentences)))
    write(f"{args.out}/derived.conllu", transform_file(args))
    for side in ("derived", "original"):
        texts = [" ".join(sentence.words) for sentence in read_conllu(f"{args.out}/{side}.conllu")]
        write(f"{args.out}/{side}.txt", texts)
    words = sorted(set(" ".join(texts).split()))
    dictionary = [f"{word}\t{transliterate_word(word)}" for word in words]
    write(f"{args.out}/dictionary.tsv", dictionary)


# Yields the lines of a sentence of the built-in language in CoNLL-U.
def format_sentence(sentence):
    yield f"# text = {' '.join(sentence.words)}"
    for number, word in enumerate(sentence.words):
        upos, head = sentence.upos[number], sentence.heads[number]
        labels = f"{upos}\t_\t_\t{head}\t{sentence.deprels[number]}\t_"
        yield f"{number + 1}\t{word}\t_\t{labels}\tEntity={sentence.entities[number]}"
    yield ""


# Writes lines to a file that takes its name when it is complete.
def write(path, lines):
    path = Path(path).resolve()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # Nothing takes the place of a pipe or a device: /dev/stdout stays what it is.
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: no regular file; give another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8", newline="") as file:
            file.writelines(f"{line}\n" for line in lines)
        # Until now a reader of the path has seen what was there before.
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a place that can be written") from None
    finally:
        with suppress(OSError):
            part.unlink()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def main(arguments=None):
    """The command line. Returns the exit status."""
    parser = Parser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    commands = "restore is the way back for CoNLL-U that transform wrote; plain text has none"
    parser.add_argument("command", choices=["generate", "transform", "restore"], help=commands)
    parser.add_argument("file", nargs="?", default="-", help="text or CoNLL-U; - is standard input")
    parser.add_argument("-o", "--out", required=True, help="a file; of generate, a folder")
    parser.add_argument("--transform", default="transliterate+invert", help="+".join(TRANSFORMS))
    parser.add_argument("--order", metavar="TREEBANK", help="whose order syntax imitates")
    parser.add_argument("--sentences", type=int, default=1000, help="how many to generate")
    parser.add_argument("--seed", type=int, default=0, help="of generate and permute")
    try:
        args = parser.parse_intermixed_args(arguments)
        if args.sentences < 1:
            raise InputError("--sentences below 1; give how many to generate")
        if args.command == "generate":
            generate_files(args)
        else:
            run = transform_file if args.command == "transform" else restore_file
            write(args.out, run(args))
    except InputError as error:
        print(f"synth_lang.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("synth_lang.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
