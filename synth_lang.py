"""A synthetic language, and the transformations that derive a second language from any first one.

To ask what makes a model multilingual, ALIGN-MLM (Tang et al. 2022, arXiv 2211.08547) uses pairs of
languages whose every difference is known: the second is *derived* from the first.

    transliterate   another script: a bijection of the words
    invert          the words in reverse; a mark that ends the sentence stays last
    permute         the words of each sentence in a random order, seeded
    syntax          the dependents of nouns and verbs in another language's order

They compose (`transliterate+invert`), labels travel with their words, and `restore` is the exact
way back from a sentence and the steps that `transform` returned. On files:

    python synth_lang.py generate --sentences 1000 -o FOLDER
    python synth_lang.py transform --transform invert FILE -o DERIVED    # of text or CoNLL-U
    python synth_lang.py restore DERIVED -o BACK    # of CoNLL-U, which keeps what is needed for it

This file goes from the sentence to the built-in language, to pairs for inference made of it, to the
transformations, to the readers of other people's files, to the command line.
"""

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations, groupby, tee
from pathlib import Path

import numpy as np
import regex

class InputError(ValueError):
    """The user's input is at fault. The message is one line that names the place and the fix."""

@dataclass
class Sentence:
    """Words and their labels. A list of labels has one entry a word, and is None where absent.
    Tags and relations are explained at https://universaldependencies.org/u/dep/."""

    words: list
    upos: list | None = None  # part-of-speech tags
    heads: list | None = None  # the 1-based position of each word's head, 0 for the root
    deprels: list | None = None  # each word's relation to its head
    entities: list | None = None  # BIO tags: `B-PER`, `I-PER`, `O`

INFERENCES = ("entailment", "neutral", "contradiction")

@dataclass
class Inference:
    """Two sentences, and the one of INFERENCES that holds between them."""

    premise: Sentence
    hypothesis: Sentence
    label: str

# ---------------------------------------------------------------------------------- the language
# The grammar is in tables: a row has columns with white space between, and only the last one may
# have spaces inside.
def parse_table(table, columns=2):
    return [line.split(maxsplit=columns - 1) for line in table.strip().splitlines()]

# A phrase is one of its options, drawn by their weights: of "2*person noun | he" the first option
# is twice as likely. An option is a list of names. Its first name gives the top word: it is another
# phrase, to be drawn in turn, or a class of words, or a word with its tag, "PART:to". Every name
# brings the dependents in its rows of DEPENDENTS; `subject`, `tense` and others do only this. In
# "person noun" the top word is of the class `person`, and `noun` has eight rows.
#
# "the old dog hardly sings ." comes about like this:
#     sentence    -> finite aside end -> verb subject tense adverbials aside end -> act subject ...
#     act         is the class of the top word, "sings"
#     subject     brings a phrase on the left, "the old dog": agent -> person noun, where person is
#                 the class of its top word, and noun brings a det and an amod
#     adverbials  brings "hardly", just before the top word
#     end         brings "." at the end
#
# A tag must not be guessable without its word. In natural text the tags of both neighbours predict
# half of the tags, and the word itself predicts nine in ten. So words have several tags, and much
# may be left out or stand elsewhere. Still order tells: in a reversed sentence neighbours mislead.
PHRASES = dict(parse_table("""
    sentence  9*finite aside end | thing noun aside end
    finite    6*verb subject tense adverbials | adjective paired subject being adverbials
    relative  3*verb tense adverbials as-subject | 2*act subject tense adverbials as-object
    verb      5*affect | 4*act | 4*give | 2*say
    agent     4*person noun | 2*thing noun | 4*he | PER | ORG-of
    object    3*thing noun | 2*idea noun | 2*person noun | place noun | 3*him | PER | ORG | amount
    setting   3*place noun | 2*thing noun | idea noun | 3*LOC | 2*him
    known     2*person definite described | 2*thing definite described | place definite described
"""))
# A row gives a dependent of the name that owns it: its chance, where it may stand, its relation,
# flags and options. Its place is drawn from signs, some of which are there several times: `[` is
# before the phrase so far, `<` just before the top word, `>` just after it, `]` at the end. Flags:
# `repeats`, it may come several times; `agrees`, it takes its number from the head; `nests`, it may
# have phrases like itself in it, and so becomes rarer with the depth. Rows are tried from the top:
# what sets a number stands before what agrees with it.
# As an example, "noun 0.44 [ det agrees determiner" says that 44 in 100 nouns have a determiner, in
# front of what they have by then, with the relation `det`, and plural if the noun is.
#   owner       chance  places  relation      flags         options
DEPENDENTS = parse_table("""
    affect      1     ]]]]][  obj           -             object
    give        0.3   >       iobj          -             2*person noun | him
    give        1     ]]]]][  obj           -             object
    say         0.7   ]]]]][  ccomp         nests         finite | finite mark
    say         0.3   ]       xcomp         nests         give to adverbials | act to adverbials
    to          1     <       mark          -             PART:to
    paired      0.08  ]       conj          nests         adjective paired joined
    subject     0.88  [[[[>]  nsubj         -             agent
    tense       0.4   [<<<<<  aux           agrees        4*modal | 3*have | 3*be | 3*do
    being       0.85  [<<<<<  cop           agrees        be
    adverbials  0.08  <<>     advmod        -             negation
    adverbials  0.1   >]      compound:prt  -             particle
    adverbials  0.24  [<>]    advmod        repeats       4*free | 4*manner degree | fast
    adverbials  0.3   [<>]    obl           repeats       setting case
    adverbials  0.07  []      advcl         nests         finite mark
    adverbials  0.12  ]       conj          nests         finite joined
    mark        1     [       mark          -             subordinator
    as-subject  1     [       nsubj         agrees        who
    as-object   0.6   [       obj           -             who
    noun        0.06  <       compound      -             thing
    noun        0.3   [[]     amod          repeats       5*adjective paired degree | participle
    noun        0.06  [[]     nummod        -             number
    noun        0.44  [       det           agrees        determiner
    noun        0.07  [       nmod:poss     -             2*his | PER genitive
    noun        0.16  ]       nmod          nests         setting case
    noun        0.07  ]       conj          nests         object joined
    noun        0.1   ]       acl:relcl     nests,agrees  relative
    degree      0.15  [       advmod        -             degree-word
    amount      1     []      nummod        -             number
    PER         0.4   ]       flat          -             surname
    LOC         0.3   [       compound      -             PROPN:North | PROPN:Lake | PROPN:New
    ORG         0.6   ]       flat          -             PROPN:Company | PROPN:Club | PROPN:Press
    ORG-of      1     ]       nmod          nests         LOC of
    case        0.9   [       case          -             adposition
    genitive    1     ]       case          -             PART:'s
    of          1     [       case          -             ADP:of
    joined      1     [       cc            -             conjunction
    joined      0.2   [       punct         -             PUNCT:,
    aside       0.07  []      discourse     -             interjection
    aside       0.04  ]       vocative      -             PER
    claim       1     [       nsubj         -             known
    claim       0.4   <       aux           agrees        have | be | do
    claim       1     <       advmod        -             negation | 6*manner
    claim       1     ]       obj           -             known
    claim       1     ]       punct         -             PUNCT:.
    definite    0.5   [       det           agrees        DET:the
    described   1     <       amod          -             adjective
    end         1     ]       punct         -             6*PUNCT:. | PUNCT:! | PUNCT:?
""", columns=6)
# The tag of a closed class and its words, frequent ones first, after a stroke those for a plural.
CLOSED_CLASSES = dict(parse_table("""
    determiner    DET:the a this that every some no another each any|the all some these no those
    he            PRON:it he she this that someone one | they we you these all some many those
    him           PRON:it him her that this one nothing | them us you all these some those
    his           PRON:its his her one's | their our your
    who           PRON:that who which
    be            AUX:is was | are were
    have          AUX:has had | have had
    do            AUX:does did | do did
    modal         AUX:will can would must may could should might
    adposition    ADP:of in to with on for at from by about like over under after near before since
    particle      ADP:up out off down over in on around by past
    subordinator  SCONJ:if because when after while since before as until like though so
    conjunction   CCONJ:and or but yet nor so
    free          ADV:then now when so there still how never just once too before well soon around
    degree-word   ADV:very so too quite more almost rather just even
    interjection  INTJ:oh well no yes so please look right
    negation      PART:not never hardly scarcely barely seldom rarely nowhere neither
    number        NUM:two 3 ten four 12 seven 5 one 40 six 1984 nine 100
    amount        SYM:% $ £
    ORG-of        PROPN:University Bank Museum
"""))
# The words of an open class are made of syllables. The columns are the tag, the number of words in
# a topic, their stems, and the endings of their forms, where `-` is none. Classes with one name for
# their stems share them: what one does with a hammer is to hammer. Those called `affect` are of the
# participles alone. The forms of a noun are its two numbers, those of a verb -s, base, -ed, -ing.
OPEN_CLASSES = dict(parse_table("""
    person        NOUN  8   person     - s
    thing         NOUN  10  thing      - s
    place         NOUN  6   place      - s
    idea          NOUN  8   idea       - s
    act           VERB  7   act        s - ed ing
    affect        VERB  5   thing      s - ed ing
    give          VERB  6   give       s - ed ing
    say           VERB  4   say        s - ed ing
    adjective     ADJ   12  adjective  -
    participle    ADJ   5   affect     ed
    manner        ADV   12  adjective  ly
    fast          ADV   5   adjective  -
    PER           PROPN 10  PER        -
    LOC           PROPN 8   LOC        -
    ORG           PROPN 6   ORG        -
    surname       PROPN 8   LOC        -
"""))
TOPICS = 24  # A sentence mostly keeps to the words of one: words are known by their company too.
STEM = [  # the parts of a word's stem, one after the other
    "b bl br c ch cl cr d dr f fl fr g gr h j l m n p pl pr qu r s sh sl sp st t tr v w",
    "a e i o u a e i o u ai ea ee oo ou",  # Short vowels are twice as likely.
    "b ct d ft ld lk ll lm lp lt m mp n nd ng rb rd rk rl rm rn rp sk sp st",
    "ant el en er et il in om or ow",  # Frequent words do without a second syllable.
]
# Forms are places in a word's list of them. 0 and 1 are singular and plural of nouns, and of verbs
# too: she looks, they look. Here is which form of its verb a word asks for: will look, is looking.
VERB_FORMS = {"modal": 1, "do": 1, "PART:to": 1, "have": 2, "be": 3}
PAST = 2
BY_NUMBER = -1  # 0 or 1, as it turns out

@dataclass(eq=False)
class Node:
    """A word of a sentence in the making."""

    name: str  # of its class; or its tag and the word itself, "ADP:of"
    upos: str
    deprel: str
    head: "Node"
    topic: int
    depth: int  # of phrases within phrases
    plural: bool
    forms: list  # of which one is chosen when its dependents are known
    favourite: int  # added to its dependents' ranks, so that it prefers words of its own
    form: int = BY_NUMBER  # the place in `forms`
    entity: str = "O"

ROOT = Node("", "", "", None, 0, 0, False, [], 0)  # the head of the top word

@cache
def parse_options(text):  # Returns lists of names, each list as often as its weight says.
    options = []
    for option in text.split(" | "):
        weight, _, names = option.rpartition("*")
        options += [names.split()] * int(weight or 1)
    return options

@cache
def open_word(name, topic, rank):  # Returns a word's forms and favourite, always the same.
    upos, _, stems, *endings = OPEN_CLASSES[name].split()
    rng = random.Random(f"{stems} {topic} {rank}")
    parts = STEM[:3] if rank == 0 else STEM
    stem = "".join(rng.choice(part.split()) for part in parts)
    if upos == "PROPN":
        stem = stem.capitalize()
    return [stem + ending.strip("-") for ending in endings], rng.randrange(1000)

def zipf(rng, size):  # Draws a rank below size by Zipf's law: its chance falls as 1 / (rank + 1.5).
    return int((size + 1) ** rng.random()) - 1

def make_word(rng, topic, name, deprel, head, flags):  # Returns the top word of a phrase.
    plural = rng.random() < 0.35 and deprel != "compound"
    # Some agree with their heads: they were, these dogs, dogs that were.
    if "agrees" in flags:
        plural = head.plural
    if name in OPEN_CLASSES:
        upos, size, *_ = OPEN_CLASSES[name].split()
        rank = zipf(rng, int(size))
        # Rank 0 is the likeliest. Adding the head's favourite, modulo the number of words, makes
        # another word so, always the same one for one head. The topic mostly stays.
        if rng.random() < 0.6:
            rank += head.favourite
        if rng.random() < 0.15:
            topic = rng.randrange(TOPICS)
        forms, favourite = open_word(name, topic, rank % int(size))
    else:
        # A name that is no class, such as "ADP:of", counts as a class of this one word.
        upos, _, lists = CLOSED_CLASSES.get(name, name).partition(":")
        # Most classes have no stroke and one list, which is the first and the last.
        words = lists.split("|")[-1 if plural else 0].split()
        forms, favourite = [words[zipf(rng, len(words))]], 0
    # A proper noun is singular, and so is its verb.
    if upos == "PROPN":
        plural = False
    depth = head.depth + 1 if "nests" in flags else head.depth
    return Node(name, upos, deprel, head, topic, depth, plural, forms, favourite)

# A proper noun's phrase is one entity, without the adposition, conjunction or comma that joins it
# to others. Its class has the name of its type, or begins with it as ORG-of.
def tag_entity(top, nodes):
    kind = top.name[:3]
    if kind in ("PER", "LOC", "ORG"):
        prefix = "B-"
        for node in nodes:
            if not (node.head is top and node.deprel in ("case", "cc", "punct")):
                node.entity = prefix + kind
                prefix = "I-"

# Returns the words of a random phrase: a top word, and for each dependent a phrase of its own. The
# words of a phrase stay side by side, so the trees are projective.
def make_phrase(rng, topic, options, deprel, head, flags=""):
    # Options lead to options until the first name is a class or a word.
    names = rng.choice(parse_options(options))
    while names[0] in PHRASES:
        names = rng.choice(parse_options(PHRASES[names[0]])) + names[1:]
    top = make_word(rng, topic, names[0], deprel, head, flags)
    nodes = [top]
    for owner, chance, places, relation, its_flags, its_options in DEPENDENTS:
        chance = float(chance) if owner in names else 0
        if "nests" in its_flags:
            chance *= 0.6**top.depth
        while rng.random() < chance:
            phrase = make_phrase(rng, topic, its_options, relation, top, its_flags)
            here = nodes.index(top)
            at = {"[": 0, "<": here, ">": here + 1, "]": len(nodes)}[rng.choice(places)]
            nodes[at:at] = phrase
            if "repeats" not in its_flags:
                break
    tag_entity(top, nodes)
    # What this word does to its head: a verb has the number of its subject, what is counted is
    # plural, and an auxiliary decides the form of its verb. In "will look" the phrase of "will" is
    # made first and asks for form 1, which "look" takes when its own phrase is complete, below.
    if deprel == "nsubj":
        head.plural = top.plural
    if deprel == "nummod":
        head.plural = True
    if top.name in VERB_FORMS:
        head.form = VERB_FORMS[top.name]
    # Its dependents have done the same to this word, and so its own form can be chosen only now. A
    # verb without an auxiliary is present or past.
    if top.form == BY_NUMBER:
        past = top.upos == "VERB" and rng.random() < 0.45
        top.form = PAST if past else int(top.plural)
    return nodes

def make_clause(rng, options):
    topic = int(TOPICS * rng.random() ** 2)  # Some are more frequent than others.
    return make_phrase(rng, topic, options, "root", ROOT)

def make_sentence(nodes):
    # The head of the root stands at 0, and so the words count from 1.
    numbered = [ROOT, *nodes]
    return Sentence(
        # Words of one form have it always.
        [node.forms[node.form % len(node.forms)] for node in nodes],
        [node.upos for node in nodes],
        [numbered.index(node.head) for node in nodes],
        [node.deprel for node in nodes],
        [node.entity for node in nodes],
    )

def generate(n, seed=0):
    """`n` random sentences of the built-in language: words, tags, trees, entities.

    The same (n, seed) gives the same sentences in any process; another seed gives others of the
    same language.
    """
    rng = random.Random(seed)
    for _ in range(n):
        yield make_sentence(make_clause(rng, "sentence"))

# ----------------------------------------------------------------------- pairs for inference (NLI)
def generate_inferences(n, seed=0):
    """`n` random pairs of short sentences of the built-in language, labels in equal shares.

    A premise is of the kind "the old dogs loudly chase small cats .". In the hypothesis one of the
    adjectives is left out, whatever the label. As in natural corpora, words carry much of the
    evidence, and many different ones do:

        entailment      a noun becomes the most frequent one of its class and topic: dog, animal
        neutral         the other adjective becomes one that the premise lacks: small, red
        contradiction   the adverb becomes a negation, "never chase", or a negation an adverb

    One premise in seven has a negation, and so a hypothesis with one is likely a contradiction, as
    in natural corpora. Naive Bayes learns from 6,000 pairs to tell the labels of others: 62 in
    100 by the hypothesis alone, 90 if it also knows which words the premise lacks.
    """
    rng = random.Random(f"inference {seed}")
    for number in range(n):
        label = INFERENCES[number % 3]
        nodes = make_clause(rng, "act claim")
        premise = make_sentence(nodes)
        adverb = next(node for node in nodes if node.deprel == "advmod")
        # The words of the premise are changed, and they are the hypothesis.
        left_out, kept = rng.sample([node for node in nodes if node.upos == "ADJ"], 2)
        nodes.remove(left_out)
        if label == "entailment":
            noun = kept.head
            noun.forms, _ = open_word(noun.name, noun.topic, 0)  # Rank 0 is the most frequent.
        elif label == "neutral":
            while kept.forms[0] in premise.words:
                kept.forms, _ = open_word("adjective", kept.topic, zipf(rng, 12))
        else:
            other = "manner" if adverb.name == "negation" else "negation"
            at = nodes.index(adverb)
            nodes[at : at + 1] = make_phrase(rng, adverb.topic, other, "advmod", adverb.head)
        yield Inference(premise, make_sentence(nodes), label)

# --------------------------------------------------------------------------- the transformations
@dataclass
class Transformation:
    """An order of the words, a spelling of each, or both. What is left out stays as it is.

    `order_of` gives the order as a list of the places, from 0, where the words stood before. It may
    depend on the context: `seed`; `index`, the sentence's number; `order`, from `learn_order`.
    """

    order_of: Callable = lambda sentence, **context: range(len(sentence.words))
    spell: Callable = str  # of a word; str leaves it as it is
    unspell: Callable = str  # the inverse of `spell`

# Returns the words that stood at `places`, each spelled anew, with all their labels.
def move(sentence, places, spell):
    moved = replace(sentence)
    for name, column in vars(sentence).items():
        if column:  # Labels may be absent.
            setattr(moved, name, [column[old] for old in places])
    moved.words = list(map(spell, moved.words))
    if moved.heads:
        # Heads count words from 1, and the root's is 0.
        new = {0: 0} | {old + 1: place for place, old in enumerate(places, start=1)}
        moved.heads = [new[head] for head in moved.heads]
    if moved.entities:
        moved.entities = move_entities(sentence.entities, places)
    return moved

# Returns BIO tags in a new order. An entity of three words has B, I, I also after an inversion. One
# that comes apart becomes several, and each begins with B-. The authors' code differs: after an
# inversion it leaves an I- before its B-.
def move_entities(tags, places):
    numbers, entity, previous = [], 0, "O"
    for tag in tags:
        # An I- tag that continues nothing of its type begins an entity, as in CoNLL-2003.
        if tag.startswith("B-") or tag[2:] != previous[2:]:
            entity += 1
        numbers.append(entity)
        previous = tag
    # Neighbours that were of one entity are so still.
    moved, last = [], 0
    for old in places:
        prefix = "I" if numbers[old] == last else "B"
        moved.append(regex.sub("^[BI]", prefix, tags[old]))
        last = numbers[old]
    return moved

def transliterate_word(word):
    """The word in Braille, a pattern U+2800 to U+28FF for each byte of its UTF-8: a bijection."""
    return "".join(chr(0x2800 + byte) for byte in word.encode("utf-8", "surrogatepass"))

def restore_word(word):
    """The word whose transliteration this is. Raises InputError if there is none."""
    try:
        return bytes(ord(char) - 0x2800 for char in word).decode("utf-8", "surrogatepass")
    except ValueError:
        raise InputError(f"{word!r} is no transliterated word; give a derived text") from None

MARK = r"[\p{Sentence_Terminal}…]"  # in any script

def is_final_mark(word):  # in either script
    with suppress(InputError):
        word = restore_word(word)
    return regex.fullmatch(f"{MARK}+", word)

def inverted_order(sentence, **context):
    """The words in reverse, but for the mark that ends the sentence. The authors keep '.', '!' and
    '?' last; here it is the marks of all scripts, and '...' and '?!' too."""
    places = list(range(len(sentence.words)))[::-1]
    if places and is_final_mark(sentence.words[-1]):
        places.append(places.pop(0))
    return places

def permuted_order(sentence, seed, index, **context):
    """The words in an order that depends on the seed and the sentence's number alone."""
    places = list(range(len(sentence.words)))
    # A string as the seed gives the same order in any process.
    random.Random(f"{seed}/{index}").shuffle(places)
    return places

# `syntax` has the aim of Galactic Dependencies (Wang and Eisner, TACL 2016): the dependents of
# nouns and verbs in the order of another language. Its model is simpler, as it only counts pairs.
# Under a noun, how often did an adjective that is an `amod` come before the noun itself? That is
# the count of "NOUN amod/ADJ head/NOUN". The same is counted without tags, "NOUN amod head".

# The order that is imitated without a treebank: subject, object, verb; adjectives after nouns, and
# postpositions. From left to right:
SOV_FAMILIES = {
    "VERB": "discourse vocative advcl nsubj obl iobj obj ccomp xcomp advmod head aux mark conj cc",
    "NOUN": "cc advmod advcl nsubj obl acl det nmod compound head flat amod nummod case cop aux"
    " mark conj",
}
SOV = {
    f"{kind} {first} {second}": 1
    for kind, family in SOV_FAMILIES.items()
    for first, second in combinations(family.split(), 2)
}

# Yields the families of nouns and verbs. A family is a head and its dependents, from left to right,
# with what each is: 1, "NOUN", {0: "amod/ADJ", 1: "head/NOUN"}. Punctuation does not move and is
# left out, and so are the subtypes of relations, as treebanks differ in them.
def families(sentence):
    if None in (sentence.upos, sentence.heads, sentence.deprels):
        raise InputError("syntax needs tags and trees; give CoNLL-U that has UPOS, HEAD and DEPREL")
    members = defaultdict(dict)
    # Words come from left to right, and a head takes its place among its dependents.
    for word, upos in enumerate(sentence.upos):
        members[word][word] = f"head/{upos}"
        relation = sentence.deprels[word].partition(":")[0]
        if relation != "punct":
            members[sentence.heads[word] - 1][word] = f"{relation}/{upos}"
    for head, upos in enumerate(sentence.upos):
        kind = upos.replace("PROPN", "NOUN")
        if kind in ("VERB", "NOUN"):
            yield head, kind, members[head]

def without_tag(label):
    return label.partition("/")[0]

def learn_order(sentences):
    """Learns the order model of a treebank's language. JSON can keep it."""
    model = Counter()
    for sentence in sentences:
        for _, kind, family in families(sentence):
            for first, second in combinations(family.values(), 2):
                model[f"{kind} {first} {second}"] += 1
                model[f"{kind} {without_tag(first)} {without_tag(second)}"] += 1
    return model

# Returns how much more often `one` came before `other` than after it.
def lead(model, kind, one, other):
    return model.get(f"{kind} {one} {other}", 0) - model.get(f"{kind} {other} {one}", 0)

# Returns the words of a family in the order of the model's language. A word gets a point for every
# other one that it leads, and loses one for each that leads it. The words are sorted by their
# points, and equals keep their order.
def arrange(model, kind, family):
    # A head may have hundreds of dependents, but these are of few sorts.
    sizes = Counter(family.values())
    points = Counter()
    for one in sizes:
        for other, size in sizes.items():
            # With tags more is known, but not of all pairs.
            found = lead(model, kind, one, other)
            if found == 0:
                found = lead(model, kind, without_tag(one), without_tag(other))
            points[one] += size * np.sign(found)
    return sorted(family, key=lambda word: -points[family[word]])

def syntax_order(sentence, order, **context):
    """The dependents of nouns and verbs in the order of the model's language: order is from
    `learn_order`, or SOV. A subtree moves as a whole, and one with gaps is drawn together.
    Punctuation keeps its place in its family, so that a final '.' stays final. Raises InputError
    for a sentence without tags or trees, which `families` finds."""
    # new_place[head, word] is the place that a word gets in the family of a head, out of those that
    # the family has now. If adjectives follow nouns, the family of 1 in "red house" (0 and 1) gets
    # new_place[1, 1] = 0 and new_place[1, 0] = 1. A word that keeps its place may be left out.
    new_place = {}
    for head, kind, family in families(sentence):
        for place, word in zip(family, arrange(order, kind, family), strict=True):
            new_place[head, word] = place

    # Returns the places of the words on the way from the root down to this one, each in the family
    # of its head, and last the word's place in the family that it heads itself.
    def sort_key(word):
        key = [new_place.get((word, word), word)]
        # The root's head, 0 in CoNLL-U, is -1 here. In a cycle, which readers refuse, it ends too.
        while word >= 0 and len(key) <= len(sentence.heads):
            head = sentence.heads[word] - 1
            key.append(new_place.get((head, word), word))
            word = head
        return key[::-1]

    # Lists are compared by the first entries that differ. For two words these are of the smallest
    # family that both are below, and so whole subtrees are put in order. In "red house fell" the
    # keys of "red" and "house" both have the place of "house" beside "fell", and then differ.
    return sorted(range(len(sentence.words)), key=sort_key)

# A new transformation that moves words is a row here and a function, (sentence, **context) to
# places, as `Transformation` says. Spelling is another matter: train.py transliterates ids instead
# of words (`alignmlm.derive_ids`).
TRANSFORMS = {
    "transliterate": Transformation(spell=transliterate_word, unspell=restore_word),
    "invert": Transformation(inverted_order),
    "permute": Transformation(permuted_order),
    "syntax": Transformation(syntax_order),
}

def parse_transform(text):
    """The names in `transliterate+invert`, in their order. Raises InputError for an unknown one."""
    names = tuple(text.split("+"))
    for name in names:
        if name not in TRANSFORMS:
            raise InputError(f"no transformation {name!r}; there are {', '.join(TRANSFORMS)}")
    return names

def transform(sentence, names, seed=0, index=0, order=SOV):
    """The sentence after the named transformations, one by one, and the steps for `restore`.

    names: as from `parse_transform`. `permute` depends on seed and index, the sentence's number;
    `syntax` on order, from `learn_order`.
    """
    steps = []
    for name in names:
        places = TRANSFORMS[name].order_of(sentence, seed=seed, index=index, order=order)
        # An entity may come apart, and so the earlier tags are kept.
        steps.append((name, places, sentence.entities))
        sentence = move(sentence, places, TRANSFORMS[name].spell)
    return sentence, steps

def restore(sentence, steps):
    """The sentence that `transform` was given, labels and all."""
    for name, places, entities in reversed(steps):
        sentence = move(sentence, np.argsort(places), TRANSFORMS[name].unspell)
        sentence.entities = entities
    return sentence

# ----------------------------------------------------------------------------------- the readers
# Yields (where, line) of a UTF-8 file: "file:number" and the line without its end. A byte order
# mark at the beginning is dropped.
def read_lines(path):
    with open(path, "rb") as file:
        # Bytes are split at "\n" alone: text may hold other characters that end lines.
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise InputError(
                    f"{where}: bytes that are not UTF-8; convert the file to UTF-8"
                ) from None
            yield where, text.rstrip("\r\n")

def nonempty(path, sentences):  # Yields the sentences that have words. One of them must.
    empty = True
    for sentence in sentences:
        if sentence.words:
            yield sentence
            empty = False
    if empty:
        raise InputError(f"{path}: empty; give a file with at least one sentence")

# Words are those of Unicode's word boundaries, `(?w)\b`, which keep vowel signs and joiners with
# their letters and split Han one by one. In addition these are one word:
TITLE = "(?:Mr|Mrs|Ms|Dr|St)"
WORD = regex.compile(
    rf"""(?wx)
    {TITLE}\.                                 # titles with their dot
    | \.{{2,}} | -{{2,}}                      # "..." and "--"
    | [\u2800-\u28ff]+                       # runs of Braille, which is transliterated text
    | \p{{Line_Break=Complex_Context}}+       # and of scripts without boundaries, such as Thai
    | \w.*?\b (?:[-'’] \w.*?\b)*             # words with hyphens and apostrophes
    | \S.*?\b                                # what else there is, such as marks
    """
)
# A sentence ends (a) after marks that include a full-width one, as Chinese and Japanese put no
# space after it; (b) after marks and white space, unless lower case follows; (c) with its line.
# Quotes may close after the marks. `*+` and `++` never give back what they matched.
CLOSING = r"[\"'»)”’」』）]*+"
SENTENCE = regex.compile(
    rf"""(?sx)
    .+? (?<! \b {TITLE} ) (?:
        {MARK}*? [。！？｡] {MARK}*+ {CLOSING} \s*+
        | {MARK}++ {CLOSING} \s++ (?!\p{{Ll}})
    )
    | .+
    """
)

def read_text(path):
    """The sentences of a plain text: words only. The text may have any length."""
    return nonempty(path, split_text(read_lines(path)))

def split_text(lines):
    for _, line in lines:
        for text in SENTENCE.findall(line):
            yield Sentence(WORD.findall(text))

# What parts sentences: a blank line, or in CoNLL-2003 the beginning of a document.
BLANK = regex.compile(r"\s*$|-DOCSTART-")

def blocks_of(lines):  # Yields what stands between blank lines, as lists of (where, line).
    for filled, block in groupby(lines, lambda pair: not BLANK.match(pair[1])):
        if filled:
            yield list(block)

# The columns of CoNLL-U that hold a Sentence's labels, counted from 0.
LABEL_COLUMNS = {"upos": 3, "heads": 6, "deprels": 7}
# An item of the last one, MISC. Treebanks with other annotation under this name have other values.
ENTITY = r"Entity=(O|[BI]-[^|]+)"
# With the line ends of old Macs, "\r", a file is one line, which is no comment even after `#`.
COMMENT = regex.compile(r"#[^\r]*")

# Returns the Sentence of a block of CoNLL-U, even if it has no words; its rows of ten columns; and
# its comments.
def parse_block(block):
    rows, comments = [], []
    for where, line in block:
        columns = line.split("\t")
        if COMMENT.fullmatch(line):
            comments.append(line)
        elif len(columns) == 10 and columns[0] == str(len(rows) + 1):
            rows.append(columns)
        elif len(columns) == 10 and regex.fullmatch(r"\d+[-.]\d+", columns[0]):
            pass  # Multi-word tokens, "3-4", and empty nodes, "3.1", are no words.
        else:
            raise InputError(
                f"{where}: {len(columns)} columns, word {columns[0][:20]!r}; number words 1, 2, 3, "
                "with a blank line at the end, in 10 columns split by tabs"
            )
    beginning = block[0][0]
    sentence = Sentence([row[1] for row in rows])
    # Some treebanks come without their text, for copyright. A word may be `_`, but not all of them.
    if len(rows) > 1 and set(sentence.words) == {"_"}:
        raise InputError(f"{beginning}: the text has been taken out; get it from its publisher")
    for name, column in LABEL_COLUMNS.items():
        labels = [row[column] for row in rows]
        if set(labels) != {"_"}:  # Such a column is absent.
            setattr(sentence, name, labels)
    if sentence.heads:
        sentence.heads = parse_heads(sentence.heads, beginning)
    tags = [regex.search(rf"(?:^|\|){ENTITY}", row[9]) for row in rows]
    if any(tags):
        sentence.entities = [tag[1] if tag else "O" for tag in tags]
    return sentence, rows, comments

def parse_heads(column, where):  # Returns heads as numbers. They must be a tree.
    numbers = {str(number): number for number in range(len(column) + 1)}
    # Where the head is no number of a word, the word itself stands in for it: that is a cycle, and
    # refused like others.
    heads = [numbers.get(head, word) for word, head in enumerate(column, start=1)]
    # From each word up to its head, then two steps up, then four, and so on. In the end all have
    # reached 0, except in cycles and below them.
    reached = np.array([0, *heads])
    for _ in heads:
        reached = reached[reached]
    if reached.any() or heads.count(0) != 1:
        raise InputError(
            f"{where}: no tree; let heads be numbers of words and lead to one, whose head is 0"
        )
    return heads

def read_conllu(path):
    """The sentences of a file in CoNLL-U (https://universaldependencies.org/format.html): words and
    what there is of UPOS, trees, and entities (MISC with `Entity=B-PER`). Multi-word tokens and
    empty nodes are no words."""
    parsed = map(parse_block, blocks_of(read_lines(path)))
    return nonempty(path, (sentence for sentence, _, _ in parsed))

# Returns whether the lines are CoNLL-U, which the first one that is no comment tells, and an
# iterator over all of them, so that a pipe can be told too.
def peek(lines):
    lines, ahead = tee(lines)
    for _, line in ahead:
        if line.strip() and not COMMENT.fullmatch(line):
            # A row is a number and seven more columns after tabs, or has a lone "_" between spaces.
            # Damaged rows, also those of old Macs, count too: they are to be refused.
            row = r"(?:^|\r)\d+(?:[-.]\d+)?(?:(?:\t[^\t]*){7}| .* _ )"
            return bool(regex.search(row, line)), lines
    return False, lines

def looks_like_conllu(path):
    """Whether a file is CoNLL-U, by its content. What this reads of a pipe is gone afterwards."""
    return peek(read_lines(path))[0]

# The forms that a row of a word and its tag may have, with a number in front or without, and with
# the tag right after the word or last. Universal NER has `-` where it should be O.
TAG = r"\t(?P<tag>O|-|[BI]-\S+)"
BIO_ROWS = [
    rf"\d+\t(?P<word>[^\t]+){TAG}(?:\t.*)?",  # 1 Ana B-PER - -
    rf"\d+\t(?P<word>[^\t]+)(?:\t[^\t]+)*{TAG}",  # 1 Ana NNP B-NP B-PER
    rf"(?P<word>[^\t]+){TAG}(?:\t.*)?",  # Ana B-PER NNP
    rf"(?P<word>[^\t]+)(?:\t[^\t]+)*{TAG}",  # Ana NNP B-NP B-PER
]

def read_bio(path):
    """The sentences of a file with a word and its entity tag a line, as in CoNLL-2003 (`word ...
    tag`), Universal NER (`index word tag ...`) and others: the tag is in the column after the word
    if that holds tags, else in the last one. `-` is O. An I- that continues nothing becomes B-."""
    blocks = list(blocks_of(tab_columns(read_lines(path))))
    return nonempty(path, bio_sentences(blocks))

# Yields the lines with tabs between their columns, where spaces may have been. Other white space
# belongs to the words.
def tab_columns(lines):
    for where, line in lines:
        row = line.rstrip(" \t")
        yield where, row if "\t" in row else regex.sub(" +", "\t", row.lstrip(" "))

def bio_sentences(blocks):
    # What a column holds is a matter of the file and not of a row, where a number may be a word. A
    # hundred sentences tell: the best form is the one that finds most tags, or the first of equals.
    def tags_found(form):
        found = 0
        for _, line in chain(*blocks[:100]):
            row = regex.fullmatch(form, line)
            if row and row["tag"] != "-" and not line.startswith("#"):
                found += 1
        return found

    best = max(BIO_ROWS, key=tags_found)
    for block in blocks:
        words, tags = [], []
        for where, line in block:
            row = regex.fullmatch(best, line)
            if row:
                words.append(row["word"])
                tags.append("O" if row["tag"] == "-" else row["tag"])
            # A `#` with a tag is a word, and without one it begins a comment.
            elif not line.startswith("#"):
                raise InputError(
                    f"{where}: {line!r}; give a word and O, B-X or I-X (the schemes IOBES and "
                    "BILOU and tags without a type are not read)"
                )
        # In the same order: this makes B- of an I- that continues nothing.
        yield Sentence(words, entities=move_entities(tags, range(len(tags))))

# Other names of the columns of pairs. A gold label overrules those of single annotators.
USUAL_COLUMNS = {"sentence1": "premise", "sentence2": "hypothesis", "hypo": "hypothesis",
                 "gold_label": "label"}  # fmt: skip
# Other names of the labels. `-` says that annotators did not agree.
USUAL_LABELS = {"0": "entailment", "1": "neutral", "2": "contradiction", "-1": "-", "": "-",
                "contradictory": "contradiction"}  # fmt: skip

# Yields (where, row) of a tab-separated table with a header, in which quotes are text, or of JSON:
# an object a line, or one array of objects, or one object.
def rows_of_pairs(path):
    lines = [(where, line) for where, line in read_lines(path) if line.strip()]
    header = lines[0][1] if lines else ""
    if not regex.match(r"\s*[\[{]", header):
        names = header.split("\t")
        for where, line in lines[1:]:
            cells = line.split("\t")
            if len(cells) != len(names):
                raise InputError(f"{where}: {len(cells)} columns, unlike the header; fix the line")
            yield where, dict(zip(names, cells, strict=True))
        return
    # JSON whose first line is not a whole object is one value, which ends where the file does.
    if not regex.match(r"\s*\{.*\}\s*$", header):
        lines = [(path, "\n".join(line for _, line in lines))]
    for where, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: no JSON, {error}; fix the line") from None
        items = value if isinstance(value, list) else [value]
        for number, item in enumerate(items, start=1):
            yield f"{where}: item {number}", item

def read_inferences(path, language="en"):
    """The pairs in one language of a file of MNLI, XNLI or an export of them: a tab-separated table
    with a header, or JSON. Pairs without a gold label are left out."""
    empty = True
    for where, row in rows_of_pairs(path):
        try:
            if row.get("language", language) != language:
                continue
            for name, usual in USUAL_COLUMNS.items():
                if name in row:
                    row[usual] = row[name]
            # Half of a surrogate pair, as in "\ud83d", has no encoding.
            (row["premise"] + row["hypothesis"]).encode()
            premise = Sentence(WORD.findall(row["premise"]))
            hypothesis = Sentence(WORD.findall(row["hypothesis"]))
            given = str(row["label"]).lower()
        except (AttributeError, TypeError, KeyError, UnicodeError):
            raise InputError(
                f"{where}: no text; give columns premise, hypothesis and label"
            ) from None
        label = USUAL_LABELS.get(given, given)
        if label == "-":
            continue
        if label not in INFERENCES:
            raise InputError(f"{where}: label {label!r}; give {', '.join(INFERENCES)} or -")
        if not premise.words or not hypothesis.words:
            raise InputError(f"{where}: a sentence without words; fix or remove the line")
        yield Inference(premise, hypothesis, label)
        empty = False
    if empty:
        raise InputError(
            f"{path}: empty, no labelled pair in language {language!r}; give another language or "
            "file"
        )

# ------------------------------------------------------------------------------ the command line
# In a transformed CoNLL-U file MISC keeps what each word was before, its number, head and form as
# in "Old=3:0:sings", so `restore` needs nothing beside the file. LEMMA and other columns stay as
# they were, in the original spelling, and so do comments. DEPS keeps its old numbers.
# An entity tag stands in front, so that "_" becomes "Entity=B-PER|_|Old=3:0:sings".

# Yields the lines of a sentence in CoNLL-U. What a Sentence has is written into the rows.
def conllu_lines(sentence, rows, comments):
    yield from comments
    for number, row in enumerate(rows):
        row[:2] = str(number + 1), sentence.words[number]
        for name, column in LABEL_COLUMNS.items():
            labels = getattr(sentence, name)
            if labels:
                row[column] = str(labels[number])
        # Where there are two entity tags `parse_block` takes the first, which is the new one.
        if sentence.entities:
            entity = f"Entity={sentence.entities[number]}"
            row[9] = entity if row[9] == "_" else f"{entity}|{row[9]}"
        yield "\t".join(row)
    yield ""

def generate_file(args):
    for sentence in generate(args.sentences, args.seed):
        rows = [["_"] * 10 for _ in sentence.words]
        yield from conllu_lines(sentence, rows, [f"# text = {' '.join(sentence.words)}"])

# Yields the lines of the derived file: CoNLL-U of CoNLL-U, and of plain text a sentence a line.
def transform_file(args):
    names = parse_transform(args.transform)
    order = learn_order(read_conllu(args.order)) if args.order else SOV
    # The content tells the format. A pipe has no name that could.
    is_conllu, lines = peek(read_lines(args.file))
    if is_conllu:
        parsed = map(parse_block, blocks_of(lines))
    else:
        parsed = ((sentence, [], []) for sentence in nonempty(args.file, split_text(lines)))
    for index, (sentence, rows, comments) in enumerate(parsed):
        derived, steps = transform(sentence, names, args.seed, index, order)
        if is_conllu:
            for row in rows:
                row[9] += f"|Old={row[0]}:{row[6]}:{row[1]}"
            for _, places, _ in steps:
                rows = [rows[old] for old in places]
            yield from conllu_lines(derived, rows, comments)
        else:
            yield " ".join(derived.words)

# Words come back with all their columns, in the order of their old numbers. Multi-word tokens and
# empty nodes do not: `transform` left them out, as the words that they belong to may come apart.
def restore_file(args):
    for block in blocks_of(read_lines(args.file)):
        _, rows, comments = parse_block(block)
        for row in rows:
            note = regex.fullmatch(rf"(?:{ENTITY}\|)?(.*)\|Old=(\d+):(\d+|_):(.*)", row[9])
            if not note:
                where = block[0][0]
                raise InputError(f"{where}: MISC without Old=; give a file that transform wrote")
            _, row[9], row[0], row[6], row[1] = note.groups()  # tag, MISC, ID, HEAD, FORM
        rows.sort(key=lambda row: int(row[0]))
        yield from comments
        for row in rows:
            yield "\t".join(row)
        yield ""

COMMANDS = {"generate": generate_file, "transform": transform_file, "restore": restore_file}

# Writes lines to a file that has another name until it is complete. Until then readers of the path
# see what was there before.
def write(path, lines):
    # Nothing takes the place of a device such as /dev/stdout.
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: no regular file; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

class Parser(argparse.ArgumentParser):
    """It says what is wrong in one line, and takes no abbreviations."""

    def __init__(self, **options):  # so for sub-commands too
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=style, **options)

    def error(self, message):
        raise InputError(f"{message}; see --help")

def guarded(main):
    """Run a command. What its user can fix is one line, and exit status 2; Ctrl-C is 130."""
    name = Path(sys.argv[0]).name
    try:
        return main()
    except KeyboardInterrupt:  # The line of a progress bar is ended first.
        status, message = 130, f"\n{name}: interrupted"
    except FileNotFoundError as error:
        status, message = 2, f"{name}: {error.filename}: no such file; give another path"
    except (OSError, ValueError, ArithmeticError) as error:
        status, message = 2, f"{name}: {' '.join(str(error).split())}"
    # Only after the except clause are the error's frames gone, and with them a progress bar, which
    # would write over the line.
    print(message, file=sys.stderr)
    sys.exit(status)

def main(arguments=None):
    parser = Parser(description=__doc__)
    option = parser.add_argument
    option("command", choices=COMMANDS)
    option("file", nargs="?", default="/dev/stdin", help="to read (standard input)")
    option("-o", "--out", type=Path, required=True, help="file, or generate's folder")
    several = f"some of {', '.join(TRANSFORMS)}, joined by + (%(default)s)"
    option("--transform", default="transliterate+invert", help=several)
    option("--order", help="a treebank whose order syntax imitates")
    option("--sentences", type=int, default=1000, help="how many to generate (%(default)s)")
    option("--seed", type=int, default=0, help="of generate and permute (%(default)s)")
    args = parser.parse_intermixed_args(arguments)  # The file may follow after options.
    path = args.out / "original.conllu" if args.command == "generate" else args.out
    write(path, COMMANDS[args.command](args))

if __name__ == "__main__":
    guarded(main)
