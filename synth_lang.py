"""A synthetic language, and the controlled transformations that derive a second one from any.

The question of ALIGN-MLM (Tang et al. 2022, arXiv 2211.08547) needs two languages whose every
difference is known. So the second one is *derived* from the first:

    transliterate   another script           | a bijection of words
    invert          the words in reverse     | a final '.', '!' or '?' stays last
    permute         the words at random      | seeded, sentence by sentence
    syntax          another language's order | of the dependents of nouns and verbs, learned

Transformations compose (`transliterate+invert`), labels travel with their words, and each returns
what its exact inverse needs. In the order of this file: sentences; the built-in language, a
probabilistic grammar that needs no data; readers of text, CoNLL-U and BIO files; the
transformations; the command line. Only numpy and the standard library are used.
"""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from math import log
from pathlib import Path
from typing import NamedTuple

import numpy as np

FINAL = (".", "!", "?")


class InputError(ValueError):
    """The user's input is at fault: one line that names the place and the mend."""


@dataclass(slots=True)
class Sentence:
    """Words and their labels; a list that is not None has one entry a word.

    upos, deprels: Universal Dependencies tags and relations. heads: the 1-based position of each
    word's head, 0 for the root. entities: BIO tags (`B-PER`, `I-PER`, `O`). spans: answer spans,
    half-open ranges of word positions.
    """

    words: list[str]
    upos: list[str] | None = None
    heads: list[int] | None = None
    deprels: list[str] | None = None
    entities: list[str] | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)


# ---------------------------------------------------------------------------------- the lexicon
# Content words are made of syllables and belong to a topic. A sentence keeps to one topic, and a
# head has favourites among the dependents of its topic, so that a word is known by its company:
# that, beyond its part of speech, is what a masked language model can learn about it.

TOPICS = 24
SIZES = {  # words a topic has of each class
    "person": 8, "thing": 10, "place": 6, "idea": 8,  # kinds of noun
    "act": 7, "affect": 8, "give": 2, "say": 3,  # frames of verb: what complements it takes
    "adjective": 12, "name": 12,
}  # fmt: skip
KINDS = ("person", "thing", "place", "idea")
FRAMES = ("act", "affect", "give", "say")

PRONOUNS = (  # subject, object, possessive, agreement: 0 third person singular, 1 other, 2 "I"
    ("it", "it", "its", 0), ("I", "me", "my", 2), ("he", "him", "his", 0), ("you", "you", "your", 1),
    ("they", "them", "their", 1), ("she", "her", "her", 0), ("we", "us", "our", 1),
    ("this", "this", "its", 0), ("that", "that", "its", 0), ("someone", "someone", "their", 0),
    ("all", "all", "their", 1), ("one", "one", "one", 0), ("some", "some", "their", 1),
    ("nothing", "nothing", "its", 0), ("these", "these", "their", 1),
)  # fmt: skip
DETERMINERS = (  # by agreement
    "the a this that every some another each no any".split(),
    "the some these all no those both any such".split(),
)
NUMBERS = "two 3 ten four 12 seven 5 one hundred 40 six 1984 nine 100 eleven".split()
PREPOSITIONS = (
    "of in to with on for at from by about like over under after near before since "
    "between around through without past against across behind until despite"
).split()
PARTICLES = "up out off down over in on around by past".split()
SUBORDINATORS = "if because when after while since before as until like though once so".split()
CONJUNCTIONS = "and or but nor yet so".split()
FREE_ADVERBS = (
    "then now here so there still again up never just once too before well soon out around often "
    "since away over perhaps maybe down yet ago"
).split()
DEGREES = "very so too quite more almost rather just even".split()
INTERJECTIONS = "oh well no yes hey so please look right ah".split()
QUESTIONS = "when why how where".split()
MODALS = "will can would must may could should might".split()
BE = (("is", "was"), ("are", "were"), ("am", "was"))  # by agreement: present, past
HAVE = (("has", "had"), ("have", "had"), ("have", "had"))
DO = (("does", "did"), ("do", "did"), ("do", "did"))


class Lexeme(NamedTuple):
    """A content word. number: its place in its topic, which decides the company that it keeps."""

    forms: tuple[str, ...]
    number: int


def _stems(count: int) -> list[str]:
    """Distinct pronounceable stems, the shortest first, as frequent words are the short ones."""
    onsets = "b bl br c ch cl cr d dr f fl fr g gr h j l m n p pl pr qu r s sh sl sp st t tr v w"
    codas = "b ck ct d ft g ld lk ll lt m mp n nd ng nt p pt rd rk rl rm rn rt sk sp st t th x"
    onsets, codas = onsets.split(), codas.split()
    vowels = "a e i o u a e i o u ai ea ee oo ou".split()
    ends = ["", "", "", *"er el et in ock ard il ant om ish".split()]
    rng = random.Random(2022)  # of its own: the language is the same whatever the text's seed
    function_words = {
        word for group in (*DETERMINERS, PREPOSITIONS, FREE_ADVERBS, DEGREES, INTERJECTIONS)
        for word in group
    }  # fmt: skip
    stems: dict[str, None] = {}
    while len(stems) < count:
        stem = "".join(map(rng.choice, (onsets, vowels, codas, ends)))
        if stem not in function_words:
            stems[stem] = None
    return sorted(stems, key=len)


def _inflect(category: str, stem: str, rank: int) -> tuple[str, ...]:
    """Nouns: singular, plural. Verbs: base, -s, -ed, -ing. Adjectives: base and its adverb."""
    s = stem + ("es" if stem[-1] in "sxh" else "s")
    if category in KINDS:
        return stem, s
    if category in FRAMES:
        return stem, s, stem + "ed", stem + "ing"
    if category == "adjective":  # some adverbs look like their adjective, as "fast" does
        return stem, stem if rank % 4 == 1 else stem + "ly"
    return (stem.capitalize(),)


@cache
def lexicon() -> dict[tuple[str, int], list[Lexeme]]:
    """The content words of each (class, topic), most frequent first. It depends on no seed."""
    slots = sorted(
        ((rank + 1) * (topic + 1), category != "thing", category, topic, rank)
        for category, size in SIZES.items() for topic in range(TOPICS) for rank in range(size)
    )  # fmt: skip
    words: dict[tuple[str, int], list[Lexeme]] = {}
    numbers = Counter()
    for stem, (_, _, category, topic, rank) in zip(_stems(len(slots)), slots, strict=True):
        if category == "affect" and rank % 3 == 0:  # a verb that is a noun too, as "love" is
            stem = words["thing", topic][rank].forms[0]
        forms = _inflect(category, stem, rank)
        words.setdefault((category, topic), []).append(Lexeme(forms, numbers[topic]))
        numbers[topic] += 1
    return words


@cache
def _zipf(size: int) -> list[float]:
    """Cumulative distribution of Zipf's law: the word of rank r has a weight of 1 / r."""
    cumulative = list(accumulate(1 / rank for rank in range(1, size + 1)))
    return [value / cumulative[-1] for value in cumulative]


# ---------------------------------------------------------------------------------- the grammar


class Node:
    """A word of a sentence in the making. Its head is a Node: positions come when all is said."""

    __slots__ = ("deprel", "entity", "head", "position", "upos", "word")

    def __init__(self, word: str, upos: str, deprel: str, head: Node | None, entity: str = "O"):
        self.word, self.upos, self.deprel = word, upos, deprel
        self.head, self.entity, self.position = head, entity, 0


class Speaker:
    """Says random sentences of the built-in language.

    Each method returns a phrase: the Nodes of one subtree in their order. Phrases are only ever
    put side by side under a common head, so that every tree is projective.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed).random
        self.topic = 0

    def pick(self, options, shift: int = 0):
        """One of the options by Zipf's law; `shift` makes another of them the first."""
        size = len(options)
        return options[(bisect(_zipf(size), self.random()) + shift) % size]

    def lexeme(self, category: str, company: int = 0) -> Lexeme:
        """A content word, mostly of the sentence's topic and of those that `company` favours."""
        random = self.random
        topic = self.topic if random() < 0.85 else int(random() * TOPICS)
        return self.pick(lexicon()[category, topic], company if random() < 0.6 else 0)

    def sentence(self) -> Sentence:
        random = self.random
        self.topic = self.pick(range(TOPICS))
        mood = self.pick((".", ".", ".", "?", "!", ".")) if random() < 0.5 else "."
        if random() < 0.06:  # no verb at all: "what a day!"
            nodes = self.nominal("root", None, "thing", int(random() < 0.4), 2)
        else:
            nodes = self.clause("root", None, 2, question=mood == "?")
        root = next(node for node in nodes if node.head is None)
        if random() < 0.15:
            nodes += self.conjunct(root, self.clause("conj", root, 1), comma=random() < 0.5)
        if random() < 0.1:
            opening = Node(self.pick(INTERJECTIONS), "INTJ", "discourse", root)
            nodes = self.aside([opening], nodes, root)
        elif random() < 0.05:
            nodes = self.aside(self.name("vocative", root, "PER"), nodes, root)
        nodes.append(Node(mood, "PUNCT", "punct", root))
        for position, node in enumerate(nodes, start=1):
            node.position = position
        return Sentence(
            [node.word for node in nodes],
            [node.upos for node in nodes],
            [node.head.position if node.head else 0 for node in nodes],
            [node.deprel for node in nodes],
            [node.entity for node in nodes],
        )

    def aside(self, phrase: list[Node], nodes: list[Node], root: Node) -> list[Node]:
        """The phrase before or after the rest, with a comma between."""
        comma = [Node(",", "PUNCT", "punct", root)] if self.random() < 0.6 else []
        return phrase + comma + nodes if self.random() < 0.6 else nodes + comma + phrase

    def conjunct(self, first: Node, phrase: list[Node], comma: bool = False) -> list[Node]:
        """A conjunction and the phrase, whose top hangs from `first` already."""
        top = next(node for node in phrase if node.head is first)
        joint = [Node(self.pick(CONJUNCTIONS), "CCONJ", "cc", top)]
        return [Node(",", "PUNCT", "punct", top), *joint, *phrase] if comma else joint + phrase

    def clause(self, deprel, head, depth, question=False, gap=None, infinitive=False):
        """A verb or a copula with its predicate, its arguments and free adverbials.

        gap: the argument that a relative clause leaves out. infinitive: no subject, no tense.
        """
        random = self.random
        agreement = int(random() < 0.35)
        copular = random() < 0.15 and gap != "obj"
        verb = self.lexeme(self.pick(("affect", "act", "say", "give")))
        frame = FRAMES[0]
        if copular:
            verb = self.lexeme("adjective")
            predicate = Node(verb.forms[0], "ADJ", deprel, head)
        else:
            frame = "affect" if gap == "obj" else self.pick(("affect", "act", "say", "give"))
            verb = self.lexeme(frame)
            predicate = Node(verb.forms[0], "VERB", deprel, head)
        number = verb.number
        row: list[list[Node]] = []
        # The subject, often left out, and the verb that agrees with it.
        omitted = infinitive or gap == "nsubj" or random() < 0.12
        if not omitted:
            if random() < 0.35:
                pronoun = self.pick(PRONOUNS)
                agreement = pronoun[3]
                row.append([Node(pronoun[0], "PRON", "nsubj", predicate)])
            else:
                kind = "person" if number % 3 else "thing"
                row.append(self.nominal("nsubj", predicate, kind, agreement, depth - 1, number))
        if infinitive:
            row.append([Node("to", "PART", "mark", predicate)])
            if copular:
                row.append([Node("be", "AUX", "cop", predicate)])
        else:
            auxiliaries = self.auxiliaries(predicate, verb, agreement, copular)
            if question and auxiliaries and random() < 0.7:
                row.insert(0, auxiliaries.pop(0))
            row += auxiliaries
        row.append([predicate])
        verb_at = len(row)
        # Complements.
        if frame == "affect" and gap != "obj" or frame == "give":
            if frame == "give":
                row.append(self.argument("iobj", predicate, "person", depth - 1, number))
            row.append(self.argument("obj", predicate, KINDS[number % 4], depth - 1, number))
        elif frame == "say" and depth > 0:
            if random() < 0.5:
                row.append(self.clause("xcomp", predicate, depth - 1, infinitive=True))
            else:
                content = self.clause("ccomp", predicate, depth - 1)
                if random() < 0.5:
                    top = next(node for node in content if node.head is predicate)
                    content.insert(0, Node("that", "SCONJ", "mark", top))
                row.append(content)
        if not copular and random() < 0.12:
            row.append([Node(self.pick(PARTICLES), "ADP", "compound:prt", predicate)])
        if random() < 0.06 and depth > 0 and not copular:
            other = self.lexeme(frame)
            form = next(i for i, w in enumerate(verb.forms) if w == predicate.word)
            row.insert(verb_at, self.conjunct(
                predicate, [Node(other.forms[form], "VERB", "conj", predicate)]))
        # Freedom of order: the subject after the verb, the last complement before all.
        if not omitted and not question and random() < 0.2:
            row.insert(verb_at - 1 + int(random() * 2), row.pop(0))
        if len(row) > verb_at and random() < 0.2:
            row.insert(0, row.pop())
        # Adverbials go anywhere.
        while random() < 0.45:
            row.insert(int(random() * (len(row) + 1)), self.adverbial(predicate, depth - 1, number))
        if question and random() < 0.4:
            row.insert(0, [Node(self.pick(QUESTIONS), "ADV", "advmod", predicate)])
        return [node for phrase in row for node in phrase]

    def auxiliaries(self, predicate: Node, verb: Lexeme, agreement: int, copular: bool):
        """Tense and negation; sets the predicate's form."""
        random = self.random
        past = int(random() < 0.45)
        negated = random() < 0.1
        row = []
        r = random()
        if copular:
            if r < 0.2:
                row = [[Node(self.pick(MODALS), "AUX", "aux", predicate)],
                       [Node("be", "AUX", "cop", predicate)]]
            elif r < 0.9:  # else left out: "fine by me"
                row = [[Node(BE[agreement][past], "AUX", "cop", predicate)]]
        elif r < 0.14:
            row = [[Node(self.pick(MODALS), "AUX", "aux", predicate)]]
        elif r < 0.24:
            row = [[Node(HAVE[agreement][past], "AUX", "aux", predicate)]]
            predicate.word = verb.forms[2]
        elif r < 0.34:
            row = [[Node(BE[agreement][past], "AUX", "aux", predicate)]]
            predicate.word = verb.forms[3]
        elif negated or r < 0.4:
            row = [[Node(DO[agreement][past], "AUX", "aux", predicate)]]
        elif past:
            predicate.word = verb.forms[2]
        elif agreement == 0:
            predicate.word = verb.forms[1]
        if negated:
            row.insert(1, [Node("not", "PART", "advmod", predicate)])
        return row

    def argument(self, deprel, head, kind, depth, company=0):
        """A pronoun or a nominal of either number, in object position."""
        if self.random() < 0.25:
            return [Node(self.pick(PRONOUNS)[1], "PRON", deprel, head)]
        return self.nominal(deprel, head, kind, int(self.random() < 0.4), depth, company)

    def adverbial(self, head, depth, company=0):
        random = self.random
        r = random()
        if r < 0.25:
            return [Node(self.pick(FREE_ADVERBS), "ADV", "advmod", head)]
        if r < 0.5:
            adverb = Node(self.lexeme("adjective", company).forms[1], "ADV", "advmod", head)
            return self.graded(adverb)
        if r < 0.9 or depth < 0:
            return self.prepositional("obl", head, depth, company)
        clause = self.clause("advcl", head, depth - 1)
        top = next(node for node in clause if node.head is head)
        return [Node(self.pick(SUBORDINATORS), "SCONJ", "mark", top), *clause]

    def graded(self, node):
        """An adjective or adverb, perhaps with a degree or a coordinate."""
        phrase = [node]
        if self.random() < 0.15:
            phrase.insert(0, Node(self.pick(DEGREES), "ADV", "advmod", node))
        if self.random() < 0.08:
            form = self.lexeme("adjective").forms[node.upos == "ADV"]
            phrase += self.conjunct(node, [Node(form, node.upos, "conj", node)])
        return phrase

    def prepositional(self, deprel, head, depth, company=0):
        phrase = self.argument(deprel, head, self.pick(("place", "thing", "idea")), depth, company)
        top = next(node for node in phrase if node.head is head)
        if top.entity.endswith("LOC") or self.random() < 0.9:
            phrase.insert(0, Node(self.pick(PREPOSITIONS), "ADP", "case", top))
        return phrase

    def nominal(self, deprel, head, kind, agreement, depth, company=0):
        """A noun phrase headed by a noun or a name. agreement: 0 singular, 1 plural."""
        random = self.random
        r = random()
        if not agreement and r < 0.16:
            entity = "LOC" if kind == "place" else "PER" if kind == "person" else "ORG"
            return self.name(deprel, head, entity if random() < 0.8 else "PER")
        if r > 0.98:
            unit = Node(self.pick("%$"), "SYM", deprel, head)
            amount = Node(str(int(100 * random() ** 2) + 2), "NUM", "nummod", unit)
            return [amount, unit] if unit.word == "%" else [unit, amount]
        lexeme = self.lexeme(kind, company)
        noun = Node(lexeme.forms[agreement], "NOUN", deprel, head)
        before, after = [], []
        r = random()
        if r < 0.45:
            before.append(Node(self.pick(DETERMINERS[agreement]), "DET", "det", noun))
        elif r < 0.53:
            before.append(Node(self.pick(PRONOUNS)[2], "PRON", "nmod:poss", noun))
        elif r < 0.57:
            owner = self.name("nmod:poss", noun, "PER")
            before += [*owner, Node("'s", "PART", "case", owner[0])]
        if agreement and random() < 0.15:
            side = before if random() < 0.8 else after
            side.append(Node(self.pick(NUMBERS), "NUM", "nummod", noun))
        while random() < 0.28:
            company = lexeme.number
            if random() < 0.1:
                word = self.lexeme("affect", company).forms[2 + int(random() < 0.4)]
            else:
                word = self.lexeme("adjective", company).forms[0]
            side = before if random() < 0.7 else after
            side += self.graded(Node(word, "ADJ", "amod", noun))
        if random() < 0.07:
            before.append(Node(self.lexeme("thing", lexeme.number).forms[0], "NOUN", "compound", noun))
        if depth > 0 and random() < 0.12:
            after += self.prepositional("nmod", noun, depth - 1, lexeme.number)
        if random() < 0.07:
            r = random()
            other = self.nominal("conj", noun, kind, int(random() < 0.4), 0, company)
            after += self.conjunct(noun, other, comma=r < 0.15)
        if depth > 0 and random() < 0.1:
            after += self.relative(noun, depth - 1)
        return [*before, noun, *after]

    def relative(self, noun, depth):
        gap = "nsubj" if self.random() < 0.6 else "obj"
        clause = self.clause("acl:relcl", noun, depth, gap=gap)
        if gap == "nsubj" or self.random() < 0.5:
            top = next(node for node in clause if node.head is noun)
            clause.insert(0, Node(self.pick(("that", "who", "which")), "PRON", gap, top))
        return clause

    def name(self, deprel, head, entity):
        """A proper name of a person (PER), a place (LOC) or an organisation (ORG)."""
        random = self.random
        first = Node(self.lexeme("name").forms[0], "PROPN", deprel, head, "B-" + entity)
        nodes = [first]
        r = random()
        if entity == "PER":
            if r < 0.4:
                nodes.append(Node(self.lexeme("name").forms[0], "PROPN", "flat", first, "I-PER"))
        elif entity == "LOC":
            if r < 0.3:
                before = Node(self.pick(("North", "Lake", "Mount", "New")), "PROPN", "compound", first, "B-LOC")
                first.entity = "I-LOC"
                nodes.insert(0, before)
        elif r < 0.4:
            nodes.append(Node(self.pick(("Company", "Bank", "Club")), "PROPN", "flat", first, "I-ORG"))
        elif r < 0.7:
            place = Node(first.word, "PROPN", "nmod", first, "I-ORG")
            first.word = self.pick(("University", "Bank", "Friends"))
            nodes += [Node("of", "ADP", "case", place, "I-ORG"), place]
        return nodes


def generate(n: int, seed: int = 0) -> Iterator[Sentence]:
    """`n` sentences of the built-in language; the same (n, seed) gives the same ones anywhere."""
    speaker = Speaker(seed)
    return (speaker.sentence() for _ in range(n))


# ---------------------------------------------------------------------------------- the readers

WORD = re.compile(r"((?:Mr|Mrs|Ms|Dr|St|No)\.|\w+(?:['’-]\w+|[.,]\d+)*|\.{2,}|-{2,}|[^\w\s])(\s*)")
BIO_TAG = re.compile(r"O|[BI]-\S+")


def read_lines(path) -> list[str]:
    """The lines of a UTF-8 file, each with its line end. Raises InputError."""
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
    return re.findall(r"[^\n]*\n|[^\n]+", text)  # str.splitlines would split at U+2028 and others


def split_words(line: str) -> Iterator[list[tuple[str, str]]]:
    """The sentences of a line, as (word, the space after it) pairs: joined, they are the line.

    A sentence ends with the line, or at a final '.', '!' or '?' and its closing quotes if space
    and no lower-case letter follow: "word, word." is four words and one sentence.
    """
    pairs: list[tuple[str, str]] = []
    ended = False
    for match in WORD.finditer(line):
        word, space = match.groups()
        pairs.append((word, space))
        ended = word[0] in FINAL or (ended and word in "\"'”’)]»")
        following = line[match.end() : match.end() + 1]
        if ended and space and not following.islower():
            yield pairs
            pairs, ended = [], False
    if pairs:
        yield pairs


def read_text(path) -> Iterator[Sentence]:
    """The sentences of a plain text, words only; no sentence crosses a line."""
    for line in read_lines(path):
        for pairs in split_words(line):
            yield Sentence([word for word, _ in pairs])


def read_blocks(path) -> Iterator[tuple[int, list[str]]]:
    """What blank lines separate: (number of the first line, lines with their ends, blanks too)."""
    start, block = 1, []
    for number, line in enumerate(read_lines(path), start=1):
        block.append(line)
        if not line.strip():
            yield start, block
            start, block = number + 1, []
    if block:
        yield start, block


def read_conllu(path) -> Iterator[Sentence]:
    """The sentences of a CoNLL-U treebank: words, UPOS, heads, relations. Raises InputError.

    Multi-word tokens (`1-2`) and empty nodes (`1.1`) are not words: the tree is over the rest.
    https://universaldependencies.org/format.html
    """
    found = False
    for start, block in read_blocks(path):
        if rows := conllu_rows(path, start, block):
            found = True
            yield rows_sentence(rows)
    if not found:
        raise InputError(f"{path}: no sentence; CoNLL-U has ten columns a word, tabs between them")


def conllu_rows(path, start: int, block: list[str]) -> list[list[str]]:
    """The ten columns of each word of a block, checked: a tree with one root."""
    rows: list[list[str]] = []
    places: list[str] = []
    for number, line in enumerate(block, start=start):
        if not line.strip() or line.startswith("#"):
            continue
        columns = line.rstrip("\r\n").split("\t")
        place = f"{path}:{number}"
        if len(columns) != 10:
            raise InputError(f"{place}: {len(columns)} columns; CoNLL-U has 10, tabs between them")
        if re.fullmatch(r"\d+-\d+|\d+\.\d+", columns[0]):
            continue
        if columns[0] != str(len(rows) + 1):
            raise InputError(f"{place}: word id {columns[0]!r} where {len(rows) + 1} is due")
        rows.append(columns)
        places.append(place)
    for place, columns in zip(places, rows, strict=True):
        head = columns[6]
        if not (head.isdecimal() and head.isascii() and head == str(int(head))):
            raise InputError(f"{place}: head {head!r} is no number; give the head's id, or 0")
        if int(head) > len(rows):
            raise InputError(f"{place}: head {head} of a sentence of {len(rows)} words")
    heads = [int(columns[6]) for columns in rows]
    if rows and heads.count(0) != 1:
        raise InputError(f"{path}:{start}: {heads.count(0)} roots; a tree has exactly one head 0")
    reached = {0}  # the nodes known to hang from the root
    for word in range(1, len(heads) + 1):
        chain = []
        while word not in reached and word not in chain:
            chain.append(word)
            word = heads[word - 1]
        if word in chain:
            raise InputError(f"{places[word - 1]}: the head of word {word} depends on it: a cycle")
        reached.update(chain)
    return rows


def rows_sentence(rows: list[list[str]]) -> Sentence:
    _, words, _, upos, _, _, heads, deprels, _, _ = map(list, zip(*rows, strict=True))
    return Sentence(words, upos, [int(head) for head in heads], deprels)


def read_bio(path) -> Iterator[Sentence]:
    """The sentences of a column file of entities (IOB2, or IOB1 as CoNLL-2003 was published).

    Either `index word tag ...`, as Universal NER has it, or `word ... tag`. An `I-` that continues
    nothing becomes `B-`. Raises InputError.
    """
    found = False
    for start, block in read_blocks(path):
        words, tags = [], []
        for number, line in enumerate(block, start=start):
            columns = line.split("\t") if "\t" in line else line.split()
            columns = [column.strip() for column in columns]
            comment = line.startswith("# ") and (" = " in line or not BIO_TAG.fullmatch(columns[-1]))
            if not line.strip() or comment or columns[0] == "-DOCSTART-":
                continue
            indexed = len(columns) > 2 and columns[0] == str(len(words) + 1)
            if len(columns) < 2:
                raise InputError(f"{path}:{number}: one column; give a word and its tag")
            word, tag = columns[1:3] if indexed else (columns[0], columns[-1])
            if not BIO_TAG.fullmatch(tag):
                raise InputError(f"{path}:{number}: {tag!r} is no tag; give O, B-TYPE or I-TYPE")
            words.append(word)
            tags.append(tag)
        if words:
            found = True
            entity = entity_numbers(tags)
            yield Sentence(words, entities=bio_tags(entity, tags))
    if not found:
        raise InputError(f"{path}: no sentence; give a word and its tag on each line")


# --------------------------------------------------------------------------- the transformations

BRAILLE = [chr(0x2800 + byte) for byte in range(256)]


def transliterate_word(word: str) -> str:
    """The word in Braille patterns: its UTF-8 bytes, each as one of U+2800..U+28FF.

    A bijection of all strings onto those Braille strings that spell UTF-8, so no word is shared.
    """
    return "".join([BRAILLE[byte] for byte in word.encode("utf-8", "surrogatepass")])


def untransliterate_word(word: str) -> str:
    """The word that `transliterate_word` was given. Raises InputError if there is none."""
    try:
        return bytes(ord(char) - 0x2800 for char in word).decode("utf-8", "surrogatepass")
    except ValueError:
        raise InputError(f"{word!r} is no transliterated word; give a derived text") from None


def transliterate_ids(ids, vocab_size: int, specials: int) -> np.ndarray:
    """Token id i becomes i + vocab_size, the first `specials` ids excepted (spec T_trans)."""
    ids = np.asarray(ids)
    return np.where(ids < specials, ids, ids + vocab_size)


def entity_numbers(tags: list[str]) -> list[int]:
    """Which entity each word is part of: 0 for none, else counted from 1."""
    numbers, count, previous = [], 0, "O"
    for tag in tags:
        count += tag != "O" and (tag[0] == "B" or tag[1:] != previous[1:])
        numbers.append(count if tag != "O" else 0)
        previous = tag
    return numbers


def bio_tags(numbers: list[int], tags: list[str]) -> list[str]:
    """Well-formed BIO tags of words whose entities and types are given, in any order."""
    return [
        "O" if not number else ("I" if number == previous else "B") + tag[1:]
        for number, previous, tag in zip(numbers, [0, *numbers], tags, strict=False)
    ]


class OrderModel:
    """How a language orders the head and the dependents of a noun or a verb.

    An item of the row is the head or a dependent, known by its relation and tag. `counts` says how
    often one came before another under a NOUN or VERB head, both for (relation, tag) and for the
    relation alone, on which the smoothing falls back.
    """

    CLASSES = {"NOUN": "NOUN", "PROPN": "NOUN", "VERB": "VERB"}  # noqa: RUF012
    EXACT = 7  # items; the exact search grows with 2 to their number

    def __init__(self):
        self.counts: Counter = Counter()
        self.best: dict = {}

    def log_odds(self, kind: str, a: tuple[str, str], b: tuple[str, str]) -> float:
        """log p(a before b) - log p(b before a), after the treebank; 0 where it says nothing."""
        p = 0.5
        for one, other in ((a[0], b[0]), (a, b)):
            ab, ba = self.counts[kind, one, other], self.counts[kind, other, one]
            p = (ab + p) / (ab + ba + 1)  # what is known so far counts as one observation
        return log(p / (1 - p))

    def order(self, kind: str, items: tuple[tuple[str, str], ...]) -> list[int]:
        """The best order of the items: where the pairs' log-odds add up to the most."""
        if (kind, items) not in self.best:
            odds = [[self.log_odds(kind, a, b) for b in items] for a in items]
            search = _exact_order if len(items) <= self.EXACT else _greedy_order
            self.best[kind, items] = search(odds)
        return self.best[kind, items]


def _exact_order(odds: list[list[float]]) -> list[int]:
    """By dynamic programming over sets: the best order of a set ends with one of its items."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for members in range(1, 1 << len(odds)):
        options = []
        for last in range(len(odds)):
            if members >> last & 1:
                score, order = best[members ^ 1 << last]
                gain = score + sum(odds[item][last] for item in order)
                options.append((round(gain, 9), (*order, last)))  # rounded: ties must be ties
        # Of equals, the one nearest to the order that was.
        best.append(max(options, key=lambda option: (option[0], [-item for item in option[1]])))
    return list(best[-1][1])


def _greedy_order(odds: list[list[float]]) -> list[int]:
    """The item that most wants to be before all the others, and so on."""
    left, order = list(range(len(odds))), []
    while left:
        order.append(max(left, key=lambda item: sum(odds[item][other] for other in left)))
        left.remove(order[-1])
    return order


def _dependents(sentence: Sentence) -> list[list[int]]:
    """Of each position (0-based), the row of it and its dependents; the root's is last."""
    rows = [[] for _ in range(len(sentence.words) + 1)]
    for position, head in enumerate(sentence.heads):
        rows[head - 1].append(position)
    for position in range(len(sentence.words)):
        rows[position] = sorted([*rows[position], position])
    return rows


def _item(sentence: Sentence, head: int, position: int) -> tuple[str, str]:
    """What the order model knows of one in a row; subtypes (`acl:relcl`) differ by language."""
    relation = "head" if position == head else sentence.deprels[position].partition(":")[0]
    return relation, sentence.upos[position]


def learn_order(sentences: Iterable[Sentence]) -> OrderModel:
    """The pairwise precedence of heads and dependents in a treebank; punctuation is left out."""
    model = OrderModel()
    for sentence in sentences:
        rows = _dependents(sentence)
        for head, row in enumerate(rows[:-1]):
            kind = model.CLASSES.get(sentence.upos[head])
            if kind is None or len(row) == 1:
                continue
            items = [_item(sentence, head, position) for position in row]
            items = [item for item in items if item[0] != "punct"]
            for at, first in enumerate(items):
                for second in items[at + 1 :]:
                    model.counts[kind, first, second] += 1
                    model.counts[kind, first[0], second[0]] += 1
    return model


def _profile(**rows: str) -> OrderModel:
    """An order model that always keeps to the given rows of relations."""
    model = OrderModel()
    for kind, row in rows.items():
        relations = row.split()
        for at, first in enumerate(relations):
            for second in relations[at + 1 :]:
                model.counts[kind, first, second] += 100
    return model


# A verb-final language with postpositions and adjectives after the noun, as Basque is.
SOV = _profile(
    VERB="discourse vocative advcl nsubj csubj obl iobj obj ccomp xcomp advmod compound head cop aux "
    "mark conj cc",
    NOUN="cc acl det nmod compound head flat amod nummod case cop aux mark conj",
)


def syntax_order(sentence: Sentence, model: OrderModel) -> list[int]:
    """The sentence with the rows of its nouns and verbs as `model` orders them; subtrees move whole.

    Punctuation keeps its place in its row, so that a final '.' stays final. In a tree that is not
    projective each subtree is first drawn together.
    """
    if sentence.upos is None or sentence.heads is None or sentence.deprels is None:
        raise InputError("syntax needs dependency trees: give a CoNLL-U file")
    rows = _dependents(sentence)
    depth_first = list(rows[-1])
    for head in depth_first:
        depth_first += [position for position in rows[head] if position != head]
    phrases: dict[int, list[int]] = {}
    for head in reversed(depth_first):  # dependents before their heads
        row = rows[head]
        kind = model.CLASSES.get(sentence.upos[head])
        if kind and len(row) > 1:
            moving = [i for i in row if i == head or sentence.deprels[i].partition(":")[0] != "punct"]
            items = tuple(_item(sentence, head, position) for position in moving)
            moved = iter([moving[at] for at in model.order(kind, items)])
            row = [next(moved) if position in moving else position for position in row]
        phrases[head] = [
            word for position in row for word in ([head] if position == head else phrases[position])
        ]
    return phrases[rows[-1][0]]


def invert_order(sentence: Sentence) -> list[int]:
    """The words in reverse; a final '.', '!' or '?' stays last, transliterated or not."""
    size = len(sentence.words)
    kept = size and sentence.words[-1] in (*FINAL, *map(transliterate_word, FINAL))
    return [*range(size - 1 - kept, -1, -1), *range(size - kept, size)]


def permute_order(sentence: Sentence, seed: int, index: int) -> list[int]:
    """The words in an order that depends on (seed, index) alone."""
    order = list(range(len(sentence.words)))
    random.Random(f"{seed}/{index}").shuffle(order)  # a string seeds alike in every process
    return order


@dataclass(slots=True)
class Step:
    """What the inverse of one transformation needs.

    order: where each word came from (None: words did not move). entities, spans: as they were,
    since moving words may cut or join them.
    """

    name: str
    order: list[int] | None = None
    entities: list[str] | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)


def reorder(sentence: Sentence, order: list[int]) -> Sentence:
    """The words as `order` lists them, with their labels; entities and spans may be cut."""
    to = {old: new for new, old in enumerate(order)}
    take = lambda labels: labels and [labels[old] for old in order]  # noqa: E731
    heads, entities, spans = take(sentence.heads), sentence.entities, []
    if heads:
        heads = [to[head - 1] + 1 if head else 0 for head in heads]
    if entities:
        entities = bio_tags(take(entity_numbers(entities)), take(entities))
    for start, end in sentence.spans:
        places = sorted(to[word] for word in range(start, end))
        starts = [place for place in places if place - 1 not in places]
        ends = [place + 1 for place in places if place + 1 not in places]
        spans += zip(starts, ends, strict=True)
    return Sentence(
        take(sentence.words), take(sentence.upos), heads, take(sentence.deprels), entities, spans
    )


TRANSFORMS = ("transliterate", "invert", "permute", "syntax")


def parse_transform(text: str) -> tuple[str, ...]:
    """The names in `transliterate+invert`, in their order. Raises InputError for an unknown one."""
    names = tuple(text.split("+"))
    for name in names:
        if name not in TRANSFORMS:
            raise InputError(f"no transformation {name!r}; there are {', '.join(TRANSFORMS)}")
    return names


def transform(
    sentence: Sentence,
    names: Iterable[str],
    *,
    seed: int = 0,
    index: int = 0,
    order: OrderModel = SOV,
) -> tuple[Sentence, list[Step]]:
    """The sentence in the derived language, and the steps that `invert` undoes.

    names: as `parse_transform` gives them, applied in turn. seed, index: `permute` depends on both;
    index is the sentence's number in its text. order: the language that `syntax` imitates.
    """
    steps = []
    for name in names:
        if name == "transliterate":
            sentence = replace(sentence, words=[transliterate_word(w) for w in sentence.words])
            steps.append(Step(name))
            continue
        if name == "invert":
            places = invert_order(sentence)
        elif name == "permute":
            places = permute_order(sentence, seed, index)
        else:
            places = syntax_order(sentence, order)
        steps.append(Step(name, places, sentence.entities, sentence.spans))
        sentence = reorder(sentence, places)
    return sentence, steps


def invert(sentence: Sentence, steps: list[Step]) -> Sentence:
    """The sentence that `transform` was given, exactly: its steps undone, the last one first."""
    for step in reversed(steps):
        if step.order is None:
            words = [untransliterate_word(word) for word in sentence.words]
            sentence = replace(sentence, words=words)
            continue
        back = sorted(range(len(step.order)), key=step.order.__getitem__)
        sentence = reorder(sentence, back)
        sentence = replace(sentence, entities=step.entities, spans=step.spans)
    return sentence
