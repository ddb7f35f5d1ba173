"""synth_lang.py: the readers, on files of all kinds that people have.

Most inputs were made after public reports and published files; each is here with what is right for
it, and those that cannot be right with the place and the mend that the refusal names.
"""
# ruff: noqa: RUF001  (marks of all scripts)

import json
import tracemalloc
from dataclasses import replace

import conllu
import pandas
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

import synth_lang as sl
from synth_lang import InputError, Sentence

@pytest.fixture(scope="module")
def write(tmp_path_factory):
    path = tmp_path_factory.mktemp("readers") / "file"

    def write(content):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write

# ----------------------------------------------------------------------------- entities (NER)
@pytest.mark.parametrize("text, words, tags", [
    # An index column is a matter of the file, not of a row.
    ("Team\tO\tO\nVersion\tB-PRO\tO\n3\tI-PRO\tO\n\n1\tO\tO\nof\tO\tO\n3\tO\tO\n",
     "Team Version 3 1 of 3", "O B-PRO I-PRO O O O"),
    ("1 Ana NNP I-NP B-PER\n2 in IN I-PP O\n\n1 Ben NNP I-NP B-PER\n", "Ana in Ben",
     "B-PER O B-PER"),
    ("# text = O O\n1\t#1\tB-PER\t-\tx\n2\tfan\tI-PER\t-\t-\n", "#1 fan", "B-PER I-PER"),
    # The word "#", and comments that look like nothing in particular.
    ("Song O\n# O\n7 O\n\n# O\nOslo B-LOC\n", "Song # 7 # Oslo", "O O O O B-LOC"),
    ("#\tO\nOslo\tB-LOC\n", "# Oslo", "O B-LOC"),
    ("x NN B-NP O\n# NN = O\ny NN B-NP O\n", "x # y", "O O O"),
    ("# checked by two annotators in May\n1\tAna\tB-PER\t-\t-\n", "Ana", "B-PER"),
    ("# plan O\nAna B-PER\n", "Ana", "B-PER"),
    ("# id 12-ab\tdomain=en\nana _ _ B-PER\nsings _ _ O\n", "ana sings", "B-PER O"),
    # The tag `-` is O.
    ("1\tEU-law\t-\tB-DRV\t-\n2\tin\tO\tO\t-\n3\tOslo\tB-LOC\t-\t-\n", "EU-law in Oslo",
     "O O B-LOC"),
    # A byte order mark, separators at the end, line ends.
    ("\ufeff# newdoc id =set.xx.1\n# sent_id = a\n1\tAna\tB-PER\t-\t-\n", "Ana", "B-PER"),
    ("\ufeff-DOCSTART- -X- -X- O\n\nAna NNP B-NP B-PER\n", "Ana", "B-PER"),
    ("\ufeffAna B-PER \nsings O\t\n", "Ana sings", "B-PER O"),
    ("Ana\tB-PER\t\nsings\tO\t\n", "Ana sings", "B-PER O"),
    ("Ana B-PER\r\nsings O\r\n\r\nBen B-PER\r\nswam O", "Ana sings Ben swam", "B-PER O " * 2),
    # As they are: IOB1, documents, nested tags, hyphens in types, prefixes.
    ("Ana I-PER\nLopez I-PER\nBen B-PER\nin O\nOslo I-LOC\nOrg I-ORG\n",
     "Ana Lopez Ben in Oslo Org", "B-PER I-PER B-PER O B-LOC B-ORG"),
    ("-DOCSTART- O\n\nAna B-PER\n\n-DOCSTART-\tO\n\nBen B-PER\n-DOCSTART- -X- O\nCleo B-PER\n",
     "Ana Ben Cleo", "B-PER B-PER B-PER"),
    ("Oslo B-ORG|B-LOC\nBank I-ORG|O\n", "Oslo Bank", "B-ORG|B-LOC B-ORG|O"),
    ("Oslo B-ORG-PART\nBank I-ORG-PART\n", "Oslo Bank", "B-ORG-PART I-ORG-PART"),
    ("en:Ana\tB-PER\nen:sings\tO\n", "en:Ana en:sings", "B-PER O"),
])  # fmt: skip
def test_entities_that_are_read(write, text, words, tags):
    sentences = list(sl.read_bio(write(text)))
    assert [word for s in sentences for word in s.words] == words.split()
    assert [tag for s in sentences for tag in s.entities] == tags.split()

@pytest.mark.parametrize("word", ["250\xa0000", "\xa0", " ", "\u200b", "\ufe0f", "\x96", "\xad"])
def test_only_tabs_and_spaces_split_columns(write, word):
    for separator in {"\t", " "} - {word}:
        (sentence,) = sl.read_bio(write(f"a{separator}O\n{word}{separator}B-LOC\n"))
        assert sentence == Sentence(["a", word], entities=["O", "B-LOC"])

# -------------------------------------------------------------------------------------- CoNLL-U
BIRDS = (
    "# sent_id = s1\n# text = Birds sing .\n1\tBirds\t_\tNOUN\t_\t_\t2\tnsubj\t_\t_\n"
    "2\tsing\t_\tVERB\t_\t_\t0\troot\t_\t_\n3\t.\t_\tPUNCT\t_\t_\t2\tpunct\t_\t_\n\n"
)
BIRD = Sentence(["Birds", "sing", "."], ["NOUN", "VERB", "PUNCT"], [2, 0, 2],
                ["nsubj", "root", "punct"])  # fmt: skip

@pytest.mark.parametrize("text", [
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
    BIRDS.replace("nsubj\t_\t_", "nsubj\t_\tEntity=(e1-person"),
])
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

@pytest.mark.parametrize("pattern, blank, labels", [
    (r"\d\t(nsubj|root|punct)", "_\t_", {"heads": None, "deprels": None}),
    ("NOUN|VERB|PUNCT", "_", {"upos": None}),
    (r"nsubj\t_\t_", "nsubj\t_\tGloss=x|Entity=B-PER|y", {"entities": ["B-PER", "O", "O"]}),
])
def test_labels_that_a_treebank_lacks_or_adds(write, pattern, blank, labels):
    (sentence,) = sl.read_conllu(write(regex.sub(pattern, blank, BIRDS)))
    assert sentence == replace(BIRD, **labels)

@pytest.mark.parametrize("text", [
    "", "# Title\n\nA text.\n", "1 of 3 is out.\n", "1\tO\tO\nof\tO\tO\n", "12\n"])
def test_what_is_no_treebank(write, text):
    assert not sl.looks_like_conllu(write(text))

# ------------------------------------------------------------------------------------------ text
@pytest.mark.parametrize("text, sentences", [
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
])  # fmt: skip
def test_texts_that_are_read(write, text, sentences):
    assert [" ".join(s.words) for s in sl.read_text(write(text))] == sentences

def test_a_long_text_costs_no_memory_and_a_long_line_loses_nothing(write):
    path = write("One line. And more of it.\n" * 20_000 + "\n \n")
    tracemalloc.start()
    assert sum(1 for _ in sl.read_text(path)) == 40_000
    assert tracemalloc.get_traced_memory()[1] < 150_000 < path.stat().st_size
    tracemalloc.stop()
    sentences = list(sl.read_text(write("Die größte Zahl — 十二。 " * 20_000)))
    assert [" ".join(s.words) for s in sentences] == ["Die größte Zahl — 十 二 。"] * 20_000

@settings(max_examples=200)
@given(st.text(st.sampled_from('aB. !?"\n\t\r\u2028\u3000)。é'), max_size=40))
def test_no_character_is_lost(write, text):
    words = [word for s in sl.split_text(sl.read_lines(write(text))) for word in s.words]
    assert "".join(words) == "".join(text.split())

# ------------------------------------------------------------------------------------- inference
NAMES = ("sentence1", "sentence2", "gold_label")
CAT, DOG = "A cat.", "A dog."
PAIR = (CAT, DOG, "neutral")
OBJECT = dict(zip(NAMES, PAIR, strict=True))
NO_GOLD = {**OBJECT, "gold_label": "-"}

def table(*rows, names=NAMES):
    return "".join("\t".join(row) + "\n" for row in (names, *rows))

@pytest.mark.parametrize("text", [
    table(PAIR),
    table((CAT, DOG, "Neutral"), names=("sentence1", "sentence2", "label")),
    table((CAT, DOG, "1"), names=("premise", "hypothesis", "label")),
    table((CAT, DOG, "NEUTRAL"), names=("premise", "hypo", "label")),
    table((*PAIR, "-", "x"), names=(*NAMES, "label", "genre")),
    table(PAIR).replace("\n", "\r\n"),
    "\ufeff\n" + table(PAIR, (CAT, DOG, "-"), (CAT, DOG, "")),
    table((*PAIR, "en"), ("x", "y", "neutral", "ar"), names=(*NAMES, "language")),
    json.dumps(OBJECT) + "\n\n" + json.dumps(NO_GOLD),
    "  " + json.dumps(OBJECT) + "\n",
    json.dumps(OBJECT, indent=2),
    json.dumps([OBJECT]),
    json.dumps([OBJECT], indent=1),
    "[" + json.dumps(OBJECT) + "\n," + json.dumps(NO_GOLD) + "]",
    json.dumps([{"premise": CAT, "hypothesis": DOG, "label": label} for label in (1, -1)]),
    "\n".join(json.dumps({**OBJECT, "language": language}) for language in ("en", "de")),
])
def test_pairs_that_are_read(write, text):
    (pair,) = sl.read_inferences(write(text))
    assert pair == sl.Inference(Sentence(["A", "cat", "."]), Sentence(["A", "dog", "."]), "neutral")

def test_labels_quotes_and_separators(write):
    numbers = table(*[(CAT, DOG, str(number)) for number in range(3)])
    assert [pair.label for pair in sl.read_inferences(write(numbers))] == list(sl.INFERENCES)
    (pair,) = sl.read_inferences(write(table(('"He left, she', 'He agreed""', "contradictory"))))
    assert pair.label == "contradiction"
    assert (pair.premise.words[0], pair.hypothesis.words[-2:]) == ('"', ['"', '"'])
    odd = {**OBJECT, "sentence1": "A\u2028cat.\x85", "sentence2": "A 😀"}
    for as_ascii in (True, False):
        (pair,) = sl.read_inferences(write(json.dumps(odd, ensure_ascii=as_ascii)))
        assert (pair.premise.words, pair.hypothesis.words) == (["A", "cat", "."], ["A", "😀"])

def test_the_language_of_pairs_is_chosen(write):
    path = write(table(("Eine Katze", "Ein Hund", "neutral", "de"), names=(*NAMES, "language")))
    (pair,) = sl.read_inferences(path, language="de")
    assert pair.premise.words == ["Eine", "Katze"]
    with pytest.raises(InputError, match="pair in language 'en'; give another language or"):
        list(sl.read_inferences(path))

# -------------------------------------------------------------------------------- what is refused
GOOD = {
    "text": "One. Two.\n",
    "conllu": BIRDS,
    "bio": "1\tAna\tB-PER\n2\tsings\tO\n\n1\tBen\tI-PER\n",
    "inferences": json.dumps([OBJECT]),
}

def read(reader, path):
    return list(getattr(sl, f"read_{reader}")(path))

def refused(reader, path):
    """The reader's one line: the file, perhaps a line, what is wrong, the mend."""
    with pytest.raises(InputError) as error:
        read(reader, path)
    message = str(error.value)
    assert message.startswith(f"{path}:") and "; " in message and "\n" not in message
    return message.removeprefix(str(path))

@pytest.mark.parametrize("reader, text, place, message", [
    ("bio", "Ana S-PER\nLopez O\n", ":1", "'Ana\\tS-PER'; give a word and O, B-X or I-X"),
    ("bio", "Ana O\nNew B-LOC\nYork E-LOC\n", ":3", "the schemes IOBES and BILOU"),
    ("bio", "Ana U-PER\n", ":1", "the schemes IOBES and BILOU"),
    ("bio", "Ana B\nLopez I\n", ":1", "tags without a type are not read"),
    ("bio", "1\tAna\tB-PER\tO\n2\t\tO\tO\n", ":2", "give a word and O, B-X or I-X"),
    ("bio", "1\tGo\tO\n2\thome\n", ":2", "give a word"),
    ("bio", "Go O\nhome PER\n", ":2", "PER'; give"),
    ("conllu", BIRDS.replace("\t", "  "), ":3", "1 columns"),
    ("conllu", BIRDS.replace("\tsing", "\t\n\tsing"), ":4", "2 columns"),
    ("conllu", BIRDS.replace("\t_\n", "\t_\tO\n"), ":3", "11 columns"),
    ("conllu", BIRDS[:-1] + BIRDS, ":8", "'1'; number words 1, 2, 3, with a blank line at the"),
    ("conllu", BIRDS.replace("\n", "\r"), ":1", "columns"),
    ("conllu", BIRDS.replace("\t2\tnsubj", "\t0\tnsubj"), ":1", "no tree"),
    ("conllu", BIRDS.replace("\t0\troot", "\t3\troot"), ":1", "no tree"),
    ("conllu", BIRDS.replace("\t2\tnsubj", "\t1\tnsubj"), ":1", "no tree"),
    ("conllu", BIRDS.replace("\t2\tnsubj", "\t4\tnsubj"), ":1", "no tree; let heads be"),
    ("conllu", BIRDS.replace("\t2\tnsubj", "\t_\tnsubj"), ":1", "no tree"),
    ("conllu", regex.sub(r"(?m)^(\d\t)\S+", r"\1_", BIRDS), ":1",
     "the text has been taken out; get it from its publisher"),
    ("conllu", BIRDS.encode() + b"# b\xffd\n", ":7", "not UTF-8"),
    ("text", "Le café.".encode("utf-16"), ":1", "bytes that are not UTF-8; convert"),
    ("text", b"Fine line.\n" * 5000 + b"caf\xe9", ":5001", "not UTF-8"),
    ("inferences", table(PAIR, (CAT, DOG, "perhaps")), ":3", "'perhaps'; give entailment, neu"),
    ("inferences", table(PAIR, (*PAIR, "x")), ":3", "4 columns, unlike the header"),
    ("inferences", table(PAIR, (CAT, "", "neutral")), ":3", "a sentence without words"),
    ("inferences", table(PAIR, names="abc"), ":2", "give columns premise, hypothesis and"),
    ("inferences", json.dumps(OBJECT) + "\n{", ":2", "no JSON"),
    ("inferences", json.dumps([{**OBJECT, "sentence1": None}]), ": item 1", "no text"),
    ("inferences", "[\n7]", ": item 1", "give columns"),
    ("inferences", "[\n7,\n}]", "", "no JSON, Expecting value: line 3"),
    ("inferences", '{"x": ' + "1" * 5000 + "}", ":1", "no JSON"),
    ("inferences", json.dumps(OBJECT) + "\n7", ":2: item 1", "no text"),
    ("inferences", json.dumps({**OBJECT, "sentence1": "A \ud83d"}), ":1: item 1", "no text"),
])  # fmt: skip
def test_what_is_refused(write, reader, text, place, message):
    path = write(text)
    found = refused(reader, path)
    assert found.startswith(f"{place}: ") and message in found
    # No damaged treebank is taken for plain text.
    assert reader != "conllu" or sl.looks_like_conllu(path)

@pytest.mark.parametrize("reader", GOOD)
def test_missing_and_empty_files(write, reader, tmp_path):
    comments = ["# comment\n\n# another\n"] if reader in ("conllu", "bio") else []
    for text in ["", "\n \n", "\ufeff", *comments]:
        assert "empty" in refused(reader, write(text))
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(OSError, match=r"No such file|Is a directory"):
            read(reader, path)

@pytest.mark.parametrize("reader", GOOD)
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
        items = read(reader, path)
    except InputError:
        refused(reader, path)
        return
    for item in items:
        sentence = item.premise if reader == "inferences" else item
        names = ["invert", "permute"] + ["syntax"] * bool(sentence.upos and sentence.heads)
        assert sentence.words and sl.restore(*sl.transform(sentence, names)) == sentence

# -------------------------------------------------------------------------------------- real data
@pytest.mark.parametrize("name", ["en_ewt-ud-test", "fr_gsd-ud-test"])
def test_treebanks_as_the_conllu_library_reads_them(name, real_data):
    path = real_data / "ud" / f"{name}.conllu"
    assert sl.looks_like_conllu(path)
    library = conllu.parse_incr(path.open(encoding="utf-8"))
    for sentence, tokens in zip(sl.read_conllu(path), library, strict=True):
        words = [token for token in tokens if isinstance(token["id"], int)]
        columns = {"words": "form", "upos": "upos", "heads": "head", "deprels": "deprel"}
        for name, theirs in columns.items():
            assert getattr(sentence, name) == [token[theirs] for token in words]

def test_entities_as_pandas_and_seqeval_read_them(real_data):
    path = real_data / "ner" / "en_ewt-ud-test.iob2"
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    rows = [line.split("\t")[:3] for line in lines]
    table = pandas.DataFrame(rows, columns=["id", "word", "tag"])
    ours = list(sl.read_bio(path))
    assert [word for s in ours for word in s.words] == table["word"].tolist()
    sentences = table.groupby((table["id"] == "1").cumsum())["tag"].apply(list)
    for sentence, tags in zip(ours, sentences, strict=True):
        assert sentence.entities == tags == sl.move_entities(tags, range(len(tags)))
        derived, _ = sl.transform(sentence, ["invert"])
        last = len(tags) - 1
        mirrored = [(kind, last - end, last - start) for kind, start, end in get_entities(tags)]
        if sentence.words[-1].strip(".!?…"):
            assert get_entities(derived.entities) == mirrored[::-1]

def test_pairs_as_pandas_reads_them(real_data):
    path = real_data / "nli" / "sick-train.tsv"
    table = pandas.read_csv(path, sep="\t", quoting=3, dtype=str)
    ours = list(sl.read_inferences(path))
    assert [pair.label for pair in ours] == table["gold_label"].tolist()
    for pair, premise, hypothesis in zip(ours, table["sentence1"], table["sentence2"], strict=True):
        assert "".join(pair.premise.words) == "".join(premise.split())
        assert "".join(pair.hypothesis.words) == "".join(hypothesis.split())

def test_no_character_of_a_real_text_is_lost(real_data):
    path = real_data / "text" / "wikitext2-test.txt"
    assert not sl.looks_like_conllu(path)
    ours = "".join("".join(sentence.words) for sentence in sl.read_text(path))
    assert ours == "".join(path.read_text(encoding="utf-8").split())
