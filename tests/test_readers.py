"""synth_lang.py: the readers, on files of all kinds that people have.

The rows of the first four tests were made after public reports and published files; each is here
with what is right for it.
"""
# ruff: noqa: RUF001, SIM905  (marks of all scripts; a sentence is easier to read in one string)

import json
import re
import tracemalloc
from pathlib import Path

import conllu
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

import synth_lang as sl
from synth_lang import InputError, Sentence

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
READERS = {
    "text": sl.read_text,
    "conllu": sl.read_conllu,
    "bio": sl.read_bio,
    "inferences": sl.read_inferences,
}


def needs(path):
    return pytest.mark.skipif(not path.exists(), reason=f"{path.name} is not on this machine")


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    path = tmp_path_factory.mktemp("readers") / "file"

    def write(content):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refused(reader, path):
    """The reader's one line: the file, perhaps a line, what is wrong, the mend."""
    with pytest.raises(InputError) as error:
        list(READERS[reader](path))
    message = str(error.value)
    assert message.startswith(f"{path}:") and "; " in message and "\n" not in message
    return message.removeprefix(str(path))


# ----------------------------------------------------------------------------- entities (NER)


@pytest.mark.parametrize(
    ("text", "words", "tags"),
    [
        # An index column is a matter of the file, not of a row.
        ("Team\tO\tO\nVersion\tB-PRO\tO\n3\tI-PRO\tO\n\n1\tO\tO\nof\tO\tO\n3\tO\tO\n",
         "Team Version 3 1 of 3", "O B-PRO I-PRO O O O"),
        ("1 Ana NNP I-NP B-PER\n2 in IN I-PP O\n3 Oslo NNP I-NP B-LOC\n\n1 Ben NNP I-NP B-PER\n",
         "Ana in Oslo Ben", "B-PER O B-LOC B-PER"),
        ("# text = O O\n1\t#1\tB-PER\t-\tx\n2\tfan\tI-PER\t-\t-\n\n# id\n1\tGo\tO\t-\t-\n",
         "#1 fan Go", "B-PER I-PER O"),
        # The word "#", and comments that look like nothing in particular.
        ("Song O\n# O\n7 O\n\n# O\nOslo B-LOC\n", "Song # 7 # Oslo", "O O O O B-LOC"),
        ("#\tO\nOslo\tB-LOC\n", "# Oslo", "O B-LOC"),
        ("x NN B-NP O\n# NN = O\ny NN B-NP O\n", "x # y", "O O O"),
        ("# newdoc id =set.xx.1\n# sent_id = a\n1\tAna\tB-PER\t-\t-\n2\tsings\tO\t-\t-\n",
         "Ana sings", "B-PER O"),
        ("# checked by two annotators in May\n1\tAna\tB-PER\t-\t-\n", "Ana", "B-PER"),
        ("# plan O\nAna B-PER\n", "Ana", "B-PER"),
        ("# a O b c\n1\tGo\tO\t-\t-\n", "Go", "O"),
        ("# id 12-ab\tdomain=en\nana _ _ B-PER\nsings _ _ O\n", "ana sings", "B-PER O"),
        # The tag `-` is O.
        ("1\tEU-debate\t-\tB-DRV\t-\n2\tin\tO\tO\t-\n3\tOslo\tB-LOC\tB-LOC\t-\n",
         "EU-debate in Oslo", "O O B-LOC"),
        ("Ana - B-PER\nin - -\n", "Ana in", "B-PER O"),
        # A byte order mark, separators at the end, line ends.
        ("\ufeffAna B-PER\nsings O\n", "Ana sings", "B-PER O"),
        ("\ufeff# sent_id = a\n1\tAna\tB-PER\t-\t-\n2\tsings\tO\t-\t-\n", "Ana sings", "B-PER O"),
        ("\ufeff-DOCSTART- -X- -X- O\n\nAna NNP B-NP B-PER\n", "Ana", "B-PER"),
        ("Ana B-PER \nsings O\t\n", "Ana sings", "B-PER O"),
        ("Ana\tB-PER\t\nsings\tO\t\n", "Ana sings", "B-PER O"),
        ("Ana B-PER\r\nsings O\r\n\r\nBen B-PER\r\nsleeps O", "Ana sings Ben sleeps",
         "B-PER O B-PER O"),
        # As they are: IOB1, documents, columns, nested tags, hyphens in types, prefixes.
        ("Ana I-PER\nLopez I-PER\nBen B-PER\nin O\nOslo I-LOC\nOrg I-ORG\n",
         "Ana Lopez Ben in Oslo Org", "B-PER I-PER B-PER O B-LOC B-ORG"),
        ("-DOCSTART- O\n\nAna B-PER\n\n-DOCSTART-\tO\n\nBen B-PER\n-DOCSTART- -X- O\nCleo B-PER\n",
         "Ana Ben Cleo", "B-PER B-PER B-PER"),
        ("Ana NNP B-NP B-PER\nsings VBZ B-VP O\n", "Ana sings", "B-PER O"),
        ("Oslo B-ORG|B-LOC\nBank I-ORG|O\n", "Oslo Bank", "B-ORG|B-LOC B-ORG|O"),
        ("Oslo B-ORG-PART\nBank I-ORG-PART\n", "Oslo Bank", "B-ORG-PART I-ORG-PART"),
        ("en:Ana\tB-PER\nen:sings\tO\n", "en:Ana en:sings", "B-PER O"),
    ],
)  # fmt: skip
def test_entities_that_are_read(write, text, words, tags):
    sentences = list(sl.read_bio(write(text)))
    assert [word for s in sentences for word in s.words] == words.split()
    assert [tag for s in sentences for tag in s.entities] == tags.split()


@pytest.mark.parametrize("word", ["250\xa0000", "\xa0", " ", "\u200b", "\ufe0f", "\x96", "\xad"])
def test_only_tabs_and_spaces_split_columns(write, word):
    (sentence,) = sl.read_bio(write(f"a\tO\n{word}\tB-LOC\n"))
    assert (sentence.words, sentence.entities) == (["a", word], ["O", "B-LOC"])
    if word != " ":
        (sentence,) = sl.read_bio(write(f"a O\n{word} B-LOC\n"))
        assert (sentence.words, sentence.entities) == (["a", word], ["O", "B-LOC"])


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("Ana S-PER\nLopez O\n", 1, "'Ana\\tS-PER'; give a word and O, B-X or I-X, for"),
        ("Ana O\nNew B-LOC\nYork E-LOC\n", 3, "the schemes IOBES and BILOU"),
        ("Ana U-PER\n", 1, "the schemes IOBES and BILOU"),
        ("New B-LOC\nYork L-LOC\n", 2, "the schemes IOBES and BILOU"),
        ("Ana B\nLopez I\n", 1, "tags without a type are not read"),
        ("1\tAna\tB-PER\tO\n2\t\tO\tO\n", 2, "give a word and O, B-X or I-X"),
        ("Ana B-PER\n  O\n", 2, "give a word"),
        ("1\tGo\tO\n2\thome\n", 2, "give a word"),
        ("Go O\nhome PER\n", 2, "PER'; give"),
        (b"Go O\nb\xff O\n", 2, "not UTF-8"),
    ],
)
def test_entities_that_are_refused(write, text, line, message):
    found = refused("bio", write(text))
    assert found.startswith(f":{line}: ") and message in found


# -------------------------------------------------------------------------------------- CoNLL-U

BIRDS = (
    "# sent_id = s1\n# text = Birds sing .\n1\tBirds\t_\tNOUN\t_\t_\t2\tnsubj\t_\t_\n"
    "2\tsing\t_\tVERB\t_\t_\t0\troot\t_\t_\n3\t.\t_\tPUNCT\t_\t_\t2\tpunct\t_\t_\n\n"
)
BIRD = Sentence(["Birds", "sing", "."], ["NOUN", "VERB", "PUNCT"], [2, 0, 2],
                ["nsubj", "root", "punct"])  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        BIRDS,
        "\ufeff" + BIRDS,
        BIRDS.replace("\n", "\r\n"),
        BIRDS.rstrip("\n"),
        "\n\n" + BIRDS[:-1] + "  \n \t\n",
        "# newdoc id = d1\n\n" + BIRDS + "# newdoc id = d2\n\n# the end\n",
        BIRDS.replace("\n2\t", "\n# a note in the middle\n2\t")[:-1] + "# a note at the end\n",
        BIRDS.replace("1\tB", "0.1\tE\tE\tVERB\t_\t_\t_\t_\t0:root\t_\n1\tB"),
        BIRDS[:-1] + "3.1\tsoon\t_\tADV\t_\t_\t_\t_\t0.1:advmod\t_\n",
        BIRDS.replace("2\ts", "2-3\tsing.\t_\t_\t_\t_\t_\t_\t_\t_\n2\ts"),
    ],
)
def test_treebanks_that_are_read(write, text):
    path = write(text)
    assert list(sl.read_conllu(path)) == [BIRD]
    assert sl.looks_like_conllu(path)


def test_forms_may_be_anything(write):
    forms = ["\ufeffx", "Ha Noi", "10\xa0000", "\u3000", "café", "👩\u200d👧", "\u2028", "a\x85b",
             "x\x0by\x0c\x1c", "#", "#tag", "1", ""]  # fmt: skip
    rows = [f"{n}\t{form}\t_\tX\t_\t_\t{n - 1}\tdep\t_\t_\n" for n, form in enumerate(forms, 1)]
    (sentence,) = sl.read_conllu(write("".join(rows)))
    assert sentence.words == forms


def test_what_a_treebank_lacks_is_none(write):
    tagged = BIRDS.replace("\t2\tnsubj", "\t_\t_").replace("\t2\tpunct", "\t_\t_")
    (sentence,) = sl.read_conllu(write(tagged.replace("\t0\troot", "\t_\t_")))
    assert sentence == Sentence(BIRD.words, BIRD.upos)
    untagged = BIRDS.replace("NOUN", "_").replace("VERB", "_").replace("PUNCT", "_")
    (sentence,) = sl.read_conllu(write(untagged))
    assert sentence == Sentence(BIRD.words, None, BIRD.heads, BIRD.deprels)


def test_entities_in_misc(write):
    text = BIRDS.replace("nsubj\t_\t_", "nsubj\t_\tGloss=x|Entity=B-PER|y")
    (sentence,) = sl.read_conllu(write(text))
    assert sentence.entities == ["B-PER", "O", "O"]
    (sentence,) = sl.read_conllu(write(BIRDS.replace("nsubj\t_\t_", "nsubj\t_\tEntity=(e1-person")))
    assert sentence.entities is None


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (BIRDS.replace("\t", "  "), 3, "1 columns"),
        (BIRDS.replace("\tsing", "\t\n\tsing"), 4, "2 columns"),
        (BIRDS.replace("\t_\n", "\t_\tO\n"), 3, "11 columns"),
        (BIRDS[:-1] + BIRDS, 8, "word '1'; number words 1, 2, 3, with a blank line at the end"),
        (BIRDS.replace("\n", "\r"), 1, "columns"),
        (BIRDS.replace("\t2\tnsubj", "\t0\tnsubj"), 1, "no tree"),
        (BIRDS.replace("\t0\troot", "\t3\troot"), 1, "no tree"),
        (BIRDS.replace("\t2\tnsubj", "\t1\tnsubj"), 1, "no tree"),
        (BIRDS.replace("\t2\tnsubj", "\t4\tnsubj"), 1, "no tree; let heads be numbers"),
        (BIRDS.replace("\t2\tnsubj", "\t_\tnsubj"), 1, "no tree"),
        (BIRDS.replace("\t2\tnsubj", "\t-1\tnsubj"), 1, "no tree"),
        (BIRDS.replace("Birds\t", "_\t").replace("sing\t", "_\t").replace("\t.\t", "\t_\t"), 1,
         "the text has been taken out; get it from its publisher"),
        (BIRDS.encode() + b"# b\xffd\n", 7, "not UTF-8"),
    ],
)  # fmt: skip
def test_treebanks_that_are_refused(write, text, line, message):
    path = write(text)
    found = refused("conllu", path)
    assert found.startswith(f":{line}: ") and message in found
    if "UTF-8" not in message and "text" not in message:
        assert sl.looks_like_conllu(path)  # so that no such file is taken for plain text


@pytest.mark.parametrize(
    "text", ["", "# Title\n\nA text.\n", "1 of 3 is out.\n", "1\tO\tO\nof\tO\tO\n", "12\n"]
)
def test_what_is_no_treebank(write, text):
    assert not sl.looks_like_conllu(write(text))


# ------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("मैं घर जाता हूँ। दूसरा वाक्य।\n", ["मैं घर जाता हूँ ।", "दूसरा वाक्य ।"]),
        ("நான் வீட்டுக்கு போகிறேன்.\n", ["நான் வீட்டுக்கு போகிறேன் ."]),
        ("می\u200cروم. ภาษาไทย ดี\n", ["می\u200cروم .", "ภาษาไทย ดี"]),
        ("湖很深。安娜去游泳！\n好，吧？\n", ["湖 很 深 。", "安 娜 去 游 泳 ！", "好 ， 吧 ？"]),
        ("a▁b ▁ c. ▅ d ▁▁.", ["a ▁ b ▁ c .", "▅ d ▁ ▁ ."]),
        ("a\0b c\x01d \x7f.\n\x1b[0m e.\n", ["a \0 b c \x01 d \x7f .", "\x1b [ 0m e ."]),
        ("😀 😂 ❤️\n😀👩\u200d👧\n", ["😀 😂 ❤️", "😀 👩\u200d👧"]),
        ("The lake.\n  Anna swam. And\n  left.\n", ["The lake .", "Anna swam .", "And", "left ."]),
        ("The lake. Anna\r\nswam.\r\n", ["The lake .", "Anna", "swam ."]),
        ("The lake. Anna swam.\rBen slept.\r", ["The lake .", "Anna swam .", "Ben slept ."]),
        ("E\xa0f.\u3000G h.\x0bI\x0cj.", ["E f .", "G h .", "I j ."]),
        ("⠎⠑ a ⠮⠑\n⠨⠿.\n", ["⠎⠑ a ⠮⠑", "⠨⠿ ."]),
        ("\ufeffA. \ufeffB.", ["A .", "\ufeff B ."]),
        ('Mr. Lee\'s 3.5 dogs, well-fed, ran! "Really?" she said. So... Yes\n\nno mark\n',
         ["Mr. Lee's 3.5 dogs , well-fed , ran !", '" Really ? " she said .', "So ...", "Yes",
          "no mark"]),
        ("\u201cGo.\u201d He won\u2019t co-operate -- at 10:30 (1,000.50).",
         ["“ Go . ”", "He won’t co-operate -- at 10 : 30 ( 1,000.50 ) ."]),
    ],
)  # fmt: skip
def test_texts_that_are_read(write, text, sentences):
    assert [" ".join(s.words) for s in sl.read_text(write(text))] == sentences


@pytest.mark.parametrize(
    ("text", "line"),
    [("Le café.".encode("utf-16"), 1), ("Le café.\n".encode("latin-1"), 1),
     (b"Fine line.\n" * 5000 + b"caf\xe9", 5001), ("Le caf\u00e9".encode()[:-1], 1)],
)  # fmt: skip
def test_texts_that_are_refused(write, text, line):
    assert refused("text", write(text)).startswith(f":{line}: bytes that are not UTF-8; convert")


def test_a_long_text_costs_no_memory_and_a_long_line_loses_nothing(write):
    path = write("One line. And more of it.\n" * 20_000 + "\n \n")
    tracemalloc.start()
    assert sum(1 for _ in sl.read_text(path)) == 40_000
    assert tracemalloc.get_traced_memory()[1] < 150_000 < path.stat().st_size
    tracemalloc.stop()
    path = write("Die größte Zahl — 十二。 " * 100_000)
    sentences = list(sl.read_text(path))
    assert len(sentences) == 100_000
    assert {tuple(s.words) for s in sentences} == {tuple("Die größte Zahl — 十 二 。".split())}


@settings(max_examples=200)
@given(st.text(st.sampled_from('aB. !?"\n\t\r\u2028\u3000)。é'), max_size=40))
def test_no_character_is_lost(write, text):
    words = [word for s in sl.split_text(sl.read_lines(write(text))) for word in s.words]
    assert "".join(words) == "".join(text.split())


# ------------------------------------------------------------------------------------- inference

NAMES = ("premise", "hypothesis", "label")
OTHER_NAMES = ("sentence1", "sentence2", "gold_label")
CAT, DOG = "A cat.", "A dog."


def table(*rows, names=OTHER_NAMES):
    return "".join("\t".join(row) + "\n" for row in (names, *rows))


def objects(*rows, names=OTHER_NAMES):
    return [dict(zip(names, row, strict=True)) for row in rows]


NEUTRAL = objects((CAT, DOG, "neutral"))
ONE_BAD = [(CAT, DOG, "neutral"), (CAT, DOG, "-"), (CAT, DOG, "neutral")]


@pytest.mark.parametrize(
    "text",
    [
        table((CAT, DOG, "neutral")),
        table((CAT, DOG, "Neutral"), names=("sentence1", "sentence2", "label")),
        table((CAT, DOG, "1"), names=NAMES),
        table((CAT, DOG, "NEUTRAL"), names=("premise", "hypo", "label")),
        table((CAT, DOG, "neutral", "-", "x"), names=(*OTHER_NAMES, "label", "genre")),
        table((CAT, DOG, "neutral")).replace("\n", "\r\n"),
        "\ufeff\n" + table((CAT, DOG, "neutral"), (CAT, DOG, "-"), (CAT, DOG, "")),
        table(("en", CAT, DOG, "neutral"), ("ar", "x", "y", "neutral"),
              names=("language", *OTHER_NAMES)),
        json.dumps(NEUTRAL[0]) + "\n\n" + json.dumps({**NEUTRAL[0], "gold_label": "-"}),
        json.dumps(NEUTRAL),
        json.dumps(NEUTRAL, indent=1),
        "[" + json.dumps(NEUTRAL[0]) + "\n," + json.dumps({**NEUTRAL[0], "gold_label": "-"}) + "]",
        json.dumps(NEUTRAL[0], indent=2),
        "  " + json.dumps(NEUTRAL[0]) + "\n",
        json.dumps(objects((CAT, DOG, 1), (CAT, DOG, -1), names=NAMES)),
        "\n".join(json.dumps({**NEUTRAL[0], "language": language}) for language in ("en", "de")),
    ],
)  # fmt: skip
def test_pairs_that_are_read(write, text):
    (pair,) = sl.read_inferences(write(text))
    assert pair == sl.Inference(Sentence(["A", "cat", "."]), Sentence(["A", "dog", "."]), "neutral")


def test_labels_quotes_separators_and_languages(write):
    rows = [(CAT, DOG, str(number)) for number in range(3)]
    assert [pair.label for pair in sl.read_inferences(write(table(*rows)))] == list(sl.INFERENCES)
    (pair,) = sl.read_inferences(write(table(('"He left, she', 'He agreed""', "contradictory"))))
    assert pair.label == "contradiction"
    assert (pair.premise.words[0], pair.hypothesis.words[-2:]) == ('"', ['"', '"'])
    text = json.dumps(objects(("A\u2028cat.\x85", "A 😀 dog.", "neutral"))[0])
    for escaped in (text, json.dumps(json.loads(text), ensure_ascii=False)):
        (pair,) = sl.read_inferences(write(escaped))
        assert (pair.premise.words, pair.hypothesis.words[1]) == (["A", "cat", "."], "😀")
    row = ("de", "Eine Katze.", "Ein Hund.", "neutral")
    german = write(table(row, names=("language", *OTHER_NAMES)))
    (pair,) = sl.read_inferences(german, language="de")
    assert pair.premise.words == ["Eine", "Katze", "."]
    assert "pair in language 'en'; choose one of ['de']" in refused("inferences", german)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (table(*ONE_BAD).replace("-", "perhaps"), 3, "label 'perhaps'; give entailment, neutral"),
        (table(*ONE_BAD).replace("\t-", "\tx\tneutral"), 3, "4 columns, unlike the header"),
        (table(ONE_BAD[0], (CAT, "", "neutral")), 3, "a sentence without words"),
        (table(ONE_BAD[0], (" ", CAT, "neutral")), 3, "a sentence without words"),
        (table(ONE_BAD[0], names=("a", "b", "c")), 2, "give columns premise, hypothesis and label"),
        (json.dumps(NEUTRAL[0]) + "\n{", 2, "no JSON"),
        (json.dumps(NEUTRAL * 2, indent=0).replace('"A cat."', "null", 1), " item 1", "no text"),
        ("[\n7]", " item 1", "give columns"),
        ("[" * 99_999, "", "no JSON"),
        ("[\n7,\n}]", "", "no JSON, Expecting value: line 3"),
        ('{"x": ' + "[" * 99_999, "", "no JSON"),
        ('{"x": ' + "1" * 5000 + "}", 1, "no JSON"),
        ('{"sentence1": "A \\ud83d", "sentence2": "x", "label": 0}', 1, "no text"),
        (table(ONE_BAD[0]).encode() + b"\xff", 3, "UTF-8"),
    ],
)
def test_pairs_that_are_refused(write, text, line, message):
    found = refused("inferences", write(text))
    assert found.startswith(f":{line}: " if line else ": ") and message in found


# ------------------------------------------------------------------------------------ all readers


@pytest.mark.parametrize("reader", READERS)
def test_missing_and_empty_files(write, reader, tmp_path):
    empty = ["", "\n \n", "\ufeff"]
    if reader in ("conllu", "bio"):
        empty.append("# comment\n\n# another\n")
    for text in empty:
        assert "empty" in refused(reader, write(text))
    assert "No such file" in refused(reader, tmp_path / "none")
    assert "directory" in refused(reader, tmp_path)


GOOD = {
    "text": "One. Two.\n",
    "conllu": BIRDS,
    "bio": "1\tAna\tB-PER\n2\tsings\tO\n\n1\tBen\tI-PER\n",
    "inferences": json.dumps(NEUTRAL),
}


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=150)
@given(data=st.data())
def test_damaged_files_raise_nothing_but_an_input_error(write, reader, data):
    content = bytearray(GOOD[reader].encode() * data.draw(st.integers(1, 2)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        piece = data.draw(st.binary(max_size=3) | st.sampled_from([b"\t", b"\n", b"#", b"_"]))
        content[at : at + data.draw(st.integers(0, 3))] = piece
    path = write(bytes(content))
    try:
        for item in READERS[reader](path):
            sentences = [item.premise, item.hypothesis] if reader == "inferences" else [item]
            for sentence in sentences:
                assert sentence.words
                names = ["invert", "permute"] + ["syntax"] * bool(sentence.upos and sentence.heads)
                derived, steps = sl.transform(sentence, names)
                assert sl.restore(derived, steps) == sentence
    except InputError:
        refused(reader, path)


# -------------------------------------------------------------------------------------- real data

TREEBANKS = [f"en_ewt-ud-{part}" for part in ("train", "dev", "test")]
TREEBANKS += ["fr_gsd-ud-dev", "fr_gsd-ud-test"]


@needs(DATA / "ud")
@pytest.mark.parametrize("name", TREEBANKS)
def test_treebanks_as_the_conllu_library_reads_them(name, tmp_path):
    path = DATA / "ud" / f"{name}.conllu"
    assert sl.looks_like_conllu(path)
    ours = list(sl.read_conllu(path))
    library = conllu.parse_incr(path.open(encoding="utf-8"))
    for sentence, tokens in zip(ours, library, strict=True):
        words = [token for token in tokens if isinstance(token["id"], int)]
        assert sentence.words == [token["form"] for token in words]
        assert sentence.upos == [token["upos"] for token in words]
        assert sentence.heads == [token["head"] for token in words]
        assert sentence.deprels == [token["deprel"] for token in words]
    for index, sentence in enumerate(ours[::10]):
        derived, steps = sl.transform(sentence, ["syntax+permute+invert"], index=index)
        assert sl.restore(derived, steps) == sentence
    if name.endswith("test"):
        out, back = str(tmp_path / "out"), tmp_path / "back"
        options = ["--transform", "transliterate+syntax", "-o", out]
        sl.main(["transform", str(path), *options])
        sl.main(["restore", out, "-o", str(back)])
        # All is back but multi-word tokens, "3-4", and empty nodes, "3.1".
        assert back.read_text() == re.sub(r"(?m)^\d+[-.]\d+\t.*\n", "", path.read_text())


@needs(DATA / "ner")
@pytest.mark.parametrize("part", ["dev", "test"])
def test_entities_as_pandas_and_seqeval_read_them(part):
    path = DATA / "ner" / f"en_ewt-ud-{part}.iob2"
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    rows = [line.split("\t")[:3] for line in lines]
    table = pandas.DataFrame(rows, columns=["id", "word", "tag"])
    ours = list(sl.read_bio(path))
    assert [word for s in ours for word in s.words] == table["word"].tolist()
    sentences = table.groupby((table["id"] == "1").cumsum())["tag"].apply(list)
    for sentence, tags in zip(ours, sentences, strict=True):
        assert sentence.entities == tags == sl.move_entities(tags, range(len(tags)))
        derived, _ = sl.transform(sentence, ["invert"])
        size = len(tags)
        mirrored = sorted((kind, size - 1 - end, size - 1 - start) for kind, start, end in
                          get_entities(tags))  # fmt: skip
        if sentence.words[-1].strip(".!?…"):
            assert sorted(get_entities(derived.entities)) == mirrored


@needs(DATA / "nli")
@pytest.mark.parametrize("part", ["train", "test"])
def test_pairs_as_pandas_reads_them(part):
    path = DATA / "nli" / f"sick-{part}.tsv"
    table = pandas.read_csv(path, sep="\t", quoting=3, dtype=str)
    ours = list(sl.read_inferences(path))
    assert [pair.label for pair in ours] == table["gold_label"].tolist()
    for pair, premise, hypothesis in zip(ours, table["sentence1"], table["sentence2"], strict=True):
        assert "".join(pair.premise.words) == "".join(premise.split())
        assert "".join(pair.hypothesis.words) == "".join(hypothesis.split())


@needs(DATA / "text")
@pytest.mark.parametrize("part", ["valid", "test"])
def test_no_character_of_a_real_text_is_lost(part):
    path = DATA / "text" / f"wikitext2-{part}.txt"
    assert not sl.looks_like_conllu(path)
    ours = "".join("".join(sentence.words) for sentence in sl.read_text(path))
    assert ours == "".join(path.read_text(encoding="utf-8").split())


@needs(DATA / "ud")
def test_french_puts_adjectives_after_nouns_and_english_before():
    english = list(sl.read_conllu(DATA / "ud" / "en_ewt-ud-test.conllu"))
    french = list(sl.read_conllu(DATA / "ud" / "fr_gsd-ud-test.conllu"))

    def adjectives_after_nouns(sentences):
        places = []
        for s in sentences:
            for word, (head, deprel) in enumerate(zip(s.heads, s.deprels, strict=True), start=1):
                if deprel == "amod" and s.upos[word - 1] == "ADJ" and s.upos[head - 1] == "NOUN":
                    places.append(word > head)
        return sum(places) / len(places)

    def like(order):
        return [sl.transform(sentence, ["syntax"], order=order)[0] for sentence in english]

    as_english, as_french = like(sl.learn_order(english)), like(sl.learn_order(french))
    assert adjectives_after_nouns(english) < 0.1 and adjectives_after_nouns(french) > 0.6
    assert adjectives_after_nouns(as_english) < 0.1 and adjectives_after_nouns(as_french) > 0.9
    kept = [a.words == b.words for a, b in zip(as_english, english, strict=True)]
    assert sum(kept) > 0.4 * len(kept)  # English in English order mostly stays as it is
