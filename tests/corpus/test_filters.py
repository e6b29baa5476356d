"""Each filter by cases worked out by hand and by references written another way; a paper goes through all of them."""

import random
import re
import sys
from collections import Counter

import pytest

from k2mini.corpus.clean import FILTERS, choose, clean
from k2mini.corpus.document import Document
from k2mini.corpus.filters.boilerplate import boilerplate
from k2mini.corpus.filters.c4 import c4
from k2mini.corpus.filters.language import language
from k2mini.corpus.filters.mojibake import mojibake
from k2mini.corpus.filters.quality import quality
from k2mini.corpus.filters.references import references
from k2mini.corpus.filters.repetition import repetition
from k2mini.corpus.filters.words import words
from k2mini.corpus.prose import prose, without_references

PAPER = """# Hydrothermal alteration of the Ñuble granite, Chile

## Abstract

We report zircon ages and δ18O values from 42 samples of the Ñuble granite. The alteration is older than was thought, \
and it left the feldspar untouched.

## 1 Introduction

Granites that are altered by hot water are common in the Andes [@smith2001; @jones2004]. Their age is often unknown. \
“Old” ages (> 20 Ma) were found by Smith et al. (2001), whereas {x} …

- samples were crushed,
- zircon was picked by hand,
- ages were measured by LA-ICP-MS.

## 2 Methods

The velocity is given by

$$
v = \\frac{k}{\\mu} \\nabla p
$$

where $k$ is the permeability {in m2} and $\\mu_{w}$ the viscosity.

Figure 1: Map of the area. a, sample sites; b, faults

| Sample | SiO2 | TiO2 |
| --- | --- | --- |
| N1 | 70.1 | 0.3 |
| N2 | 70.1 | 0.3 |
| N2 | 70.1 | 0.3 |

Table 1: Oxides in weight per cent

## 3 Results

Ages are between 12.1 ± 0.3 and 18.4 ± 0.2 Ma. They fall towards the north, where the faults are. The map in Figure 1 \
shows how they lie.

### 3.1 North

The northern samples are young and carry much chlorite, which replaced biotite along its edges and cleavage.

## References

- Smith, J. 2001. Ages of granites. Journal of Geology 12, 1–10.
- Jones, B. 2004. Water in rocks. Journal of Geology 15, 11–20.
- Jones, B. 2004. Water in rocks. Journal of Geology 15, 11–20.

## Acknowledgements

We thank the people of Chillán."""
ENGLISH = "The granite of the north is older than the basalt, and both of them have been altered by water. "
GERMAN = "Der Granit im Norden ist älter als der Basalt, und beide wurden durch heißes Wasser verändert. "


def sentences(count, seed=0):
    """Sentences of their own words, none like another."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    for _ in range(count):
        yield "The " + " ".join("".join(rng.choices(syllables, k=3)) for _ in range(11)) + "."


def test_a_paper_goes_through_all_filters():
    document, counts = Document(PAPER, abstract="An abstract."), Counter()
    assert clean(document, choose([], []), counts) is None
    assert (document.text, counts) == (PAPER, Counter())
    running = prose(PAPER)
    for gone in ("#", "|", "frac", "Journal", "SiO2"):
        assert gone not in running
    for there in ("- zircon was picked", "Figure 1: Map", "We thank", "where $k$ is"):
        assert there in running


def test_thresholds():
    every = choose([], [])
    assert list(every) == list(FILTERS)
    assert every["words"] == {"minimum": 50, "maximum": 100_000}
    chosen = choose(["language.minimum=0.7", "references.keep=False", "language.keep=en,de", "words.minimum=9"], ["c4"])
    assert chosen["language"] == {"keep": "en,de", "minimum": 0.7, "letters": 200}
    assert (chosen["references"], chosen["words"]["minimum"]) == ({"keep": False}, 9)
    assert "c4" not in chosen
    assert choose([], []) == every, "the defaults changed"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("language.least=1", "'language.least=1' sets no threshold of a filter that is run; there are boilerplate."),
        ("minimum=1", "sets no threshold"),
        ("words.minimum", "words.minimum is '', not a whole number from 0"),
        ("words.minimum=1.5", "words.minimum is '1.5', not a whole number from 0"),
        ("language.minimum=nan", "language.minimum is 'nan', not a number from 0"),
        ("quality.symbols=-1", "quality.symbols is '-1', not a number from 0"),
        ("references.keep=no", "references.keep is 'no', not true or false"),
        ("language.keep=", "language.keep is '', not a name"),
        ("language.keep=en,english", "language.keep: 'english' is none of ace, "),
        ("c4.curly=1", "'c4.curly=1' sets no threshold of a filter that is run"),
    ],
)
def test_thresholds_that_are_wrong(override, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        choose([override], ["c4"])


def test_filters_that_are_unknown():
    with pytest.raises(ValueError, match="there is no filter 'c5'; there are mojibake, boilerplate"):
        choose([], ["c5"])


def test_counts_and_reasons():
    counts = Counter()
    assert clean(Document("MÃ¶ssbauer " * 3), choose([], ["repetition", "quality", "c4"]), counts) == (
        "words: 3 words (least: 50)"
    )
    assert counts == {"mojibake: changed": 1, "words: rejected": 1}


def test_a_document_that_is_far_too_long_is_looked_at_no_further(monkeypatch):
    monkeypatch.setitem(FILTERS, "mojibake", None)
    chosen = choose(["words.maximum=10"], [])
    assert clean(Document("one two " * 6), chosen, Counter()) == "words: 12 words (most: 10)"
    assert clean(Document("one two " * 6), choose([], ["mojibake", "words"]), Counter()).startswith("repetition: ")


def test_lines_of_spaces_take_no_time():
    """As a layout of text has them; where each costs as much as all before it, these take an hour."""
    assert prose(f"a\n{' ' * 400_000}b\n{' ' * 400_000}\n") == f"a\n{' ' * 400_000}b"


def test_mojibake():
    kept = "“Quotes”, 5′ × 3″, ﬁne → fine, Ａ, ĳ, &amp; &lt;, H₂O, 1–3 µm, Å, Ñuble"
    document = Document(
        f"MÃ¶ssbauer found Î´18O = âˆ’3 â€°.\r\n{kept}\ne\u0301",
        title="SÃ£o Paulo",
        keywords=["Î´18O"],
        figures=[{"label": "Figure 1", "caption": "MÃ¶ssbauer"}],
        citations=[{"sentence": "MÃ¶ssbauer", "title": "CafÃ©"}],
    )
    assert mojibake(document) is None
    assert document.text == f"Mössbauer found δ18O = −3 ‰.\n{kept.replace('ﬁ', 'fi')}\né"
    assert (document.title, document.keywords) == ("São Paulo", ["δ18O"])
    assert document.figures == [{"label": "Figure 1", "caption": "Mössbauer"}]
    assert document.citations == [{"sentence": "Mössbauer", "title": "Café"}]


def pages(*, header="J. Smith et al. / Rocks {}", count=4):
    """Pages of 120 words; each but the first begins with a header, amid a sentence."""
    page = [" ".join(sentences(10, seed)) for seed in range(count)]
    return page, "".join(f"{text} and then\n\n{header.format(n + 11)}\n\nit goes on. " for n, text in enumerate(page))


def test_headers_and_footers():
    page, text = pages()
    document = Document(f"# Rocks\n\n{text}")
    boilerplate(document)
    assert document.text == "# Rocks\n\n" + "".join(f"{one} and then\nit goes on. " for one in page).strip()
    for header in ("Journal of Old Rocks", "– {} –", "{}", "Rocks, volume 7, page {}"):
        _, text = pages(header=header)
        document = Document(f"# Rocks\n\n{text}")
        boilerplate(document)
        assert header.format(12) not in document.text.split("\n"), header
        assert document.text.count("and then") == 4
    document = Document(text.replace("it goes", "It goes"))
    boilerplate(document)
    assert "and then\n\nIt goes on." in document.text
    _, text = pages(header="Journal of Old Rocks", count=2)
    document = Document(f"Journal of Old Rocks\n\n{text}")
    boilerplate(document)
    assert document.text.count("Journal of Old Rocks") == 1, "the first line counts, and stays"


@pytest.mark.parametrize(
    "line",
    ["Returns", "## Results of 2001", "- a sample of 3 g", "| N1 | 70.1 |", "$$ x = 1 $$", "a line of 5, 1 and {}, {}"],
)
def test_lines_that_are_no_headers(line):
    text = "".join(f"{one}\n\n{line.format(n, 2 * n)}\n\n" for n, one in enumerate(pages()[0])).strip()
    document = Document(text)
    boilerplate(document)
    assert document.text == text


@pytest.mark.parametrize("line", ["CHAPTER {}", "Theorem {}. Let x be in S.", "Proof of the theorem.", "Question {}:"])
def test_a_text_s_own_parts_are_no_headers(line):
    text = "".join(f"{one}\n\n{line.format(n)}\n\n" for n, one in enumerate(pages()[0])).strip()
    document = Document(text)
    boilerplate(document)
    assert document.text == text


def test_markdown_html_and_xml_have_no_pages():
    _, text = pages()
    for source, is_cut in (
        ("a.pdf", True),
        ("a.txt.gz", True),
        ("a.md", False),
        ("A.HTML.gz", False),
        ("a.xml", False),
    ):
        boilerplate(document := Document(text, source=source))
        assert (document.text != text) == is_cut, source


def test_numbers_that_don_t_count_up_and_lines_close_together_stay():
    page = pages()[0]
    for texts in (
        [f"{text}\n\nThe sample has {n} g\n\n" for n, text in zip((3, 1, 2, 4), page, strict=True)],
        [f"{text}\n\nThe sample has 1 g\n\n" for text in sentences(20)],
        [f"{text}\n\nThe sample has 1 g\n\n" for text in page[:2]],
        [f"{text}\n\nThe sample has 1 g\n\n" for text in page] + list(sentences(60)),  # in a part of the text
        [f"{text}\n\n{'1' * 5000}\n\n" for text in page],
    ):
        document = Document("".join(texts).strip())
        boilerplate(document)
        assert document.text == "".join(texts).strip()


def test_references():
    document = Document(PAPER)
    references(document)
    assert document.text == PAPER
    references(document, keep=False)
    assert document.text == PAPER[: PAPER.index("## Ref")] + PAPER[PAPER.index("## Ack") :]
    text = "Contents\nReferences\n\n" + ENGLISH * 3 + "\n\nREFERENCES\n\nSmith 2001."
    assert without_references(text) == text[: text.index("REF")], "a table of contents is none"
    text = "# A\n\n## Bibliography\n\n- one\n\n### Books\n\n- two\n\n# B\n\n## 7. Literature cited:\n\n- three"
    assert without_references(text) == "# A\n\n# B\n\n"


def test_language():
    assert language(Document(ENGLISH * 5)) is None
    reason = language(Document(GERMAN * 5))
    assert reason.startswith("en with a probability of 0.0")
    assert "(least: 0.5), de of " in reason
    assert language(Document(GERMAN * 5), keep="en,de") is None
    assert language(Document(GERMAN)) is None, "too short to be judged"
    assert language(Document("Wert 12.345 67.89 " * 100)) is None, "mostly digits"
    assert language(Document(ENGLISH * 5 + "\n\n## References\n\n" + GERMAN * 20)) is None


def test_language_of_papers():
    """Names of species and places, units and formulas don't make English another language."""
    assert language(Document(PAPER), minimum=0.9) is None
    names = "Quercus robur, Fagus sylvatica and Picea abies grow near Reykjavík, Åre, Zürich and São Paulo. "
    assert language(Document((names + ENGLISH) * 3)) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        # 4 of 10 lines stood before; their characters are fewer
        ("\n".join([*"abcdef", *"abcd"]), "40% of the lines are repeated (most: 30%)"),
        ("\n".join([*"bcdefgh", "a" * 3, "a" * 3]), "23% of the characters are in repeated lines (most: 20%)"),
        # lines differ in the number of paragraphs' lines: 2 of 5 paragraphs, 2 of 9 lines
        (
            "a\n\nb\n\na\n\nb\n\n" + "\n".join(f"{n} {'xyzuvw'[n]}long{n}" for n in range(5)),
            "40% of the paragraphs are repeated (most: 30%)",
        ),
        # 'ab cd' thrice is 12 of 54 characters
        (
            "ab cd efgh ab cd ijklm ab cd " + " ".join(letter * 3 for letter in "nopqrstuvwx"),
            "22% of the characters are in the most frequent 2 words (most: 20%)",
        ),
        # two runs of five words come twice: the second times are 10 of 60 words of equal length
        (
            "aa bb cc dd ee ff gg hh ii jj xx aa bb cc dd ee yy ff gg hh ii jj "
            + " ".join(f"{a}{b}" for a in "klm" for b in "nopqrstuvwxyz"),
            "16% of the characters are in repeated runs of 5 words (most: 15%)",
        ),
    ],
)
def test_repetition(text, reason):
    assert repetition(Document(text)) == reason


def test_an_address_and_a_dotted_name_are_one_word():
    for name in ("https://rocks.org/of/the/old/world/", "`~rocks.old.world.of.the.Sample`"):
        text = "\n\n".join(re.sub(r"(?<=^The \w{6} )", f"{name} ", text) for text in sentences(40))
        assert repetition(Document(text)) is None
        assert repetition(Document(re.sub(r"[./]", " ", text)))


def test_nothing_but_code_is_not_repeated():
    document = Document("# Source\n\n```\nx = 1\n```")
    assert repetition(document) is None
    assert clean(document, choose([], []), Counter()) == "quality: there is no running text"


def test_thresholds_of_repetition_are_those_of_gopher():
    text = " ".join(sentences(20))
    assert repetition(Document(text)) is None
    assert repetition(Document("\n".join([text] * 2)), lines=0.6, line_characters=0.6, repeated=0.6) is None
    headings = "\n\n".join(f"## Results\n\n{one}" for one in sentences(9))
    assert repetition(Document(headings)) is None, "headings are alike"


def naive_repeated(found, n):
    """Characters of words inside an n-gram that stood before, over those of all words."""
    seen, inside = set(), set()
    for start in range(len(found) - n + 1):
        ngram = tuple(found[start : start + n])
        inside.update(range(start, start + n) if ngram in seen else [])
        seen.add(ngram)
    return sum(len(found[place]) for place in inside) / sum(map(len, found))


def naive_top(found, n):
    ngrams = [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]
    best = max(ngrams, key=ngrams.count)
    inside = {start + k for start, ngram in enumerate(ngrams) if ngram == best for k in range(n)}
    return sum(len(found[place]) for place in inside) / sum(map(len, found)) if ngrams.count(best) > 1 else 0


def test_shares_of_ngrams_are_those_of_a_naive_count():
    """The first rule that random words break, and its share; which rule it is differs."""
    rng, seen = random.Random(1), set()
    for vocabulary, runs in [(0, 0), (1, 0), (2, 1), (90, 1), (300, 2), (300, 2), (300, 3)] * 6:
        found = rng.choices(["ab", "cde", "f", "ghij"] + [f"w{n}" for n in range(vocabulary)], k=80)
        for _ in range(runs):
            start, length = rng.randrange(60), rng.choice((5, 6, 9, 14))
            found += ["x", *found[start : start + length]]
        shares = {n: naive_top(found, n) for n in (2, 3, 4)} | {n: naive_repeated(found, n) for n in range(5, 11)}
        limits = {2: 0.2, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
        broken = next((n for n in shares if shares[n] > limits[n]), 0)
        kind = f"the most frequent {broken} words" if broken < 5 else f"repeated runs of {broken} words"
        said = f"{shares.get(broken, 0):.0%} of the characters are in {kind} (most: {limits.get(broken, 0):.0%})"
        assert repetition(Document(" ".join(found))) == (said if broken else None)
        seen.add(broken)
    assert len(seen) >= 4, seen


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "there is no running text"),
        ("## Only a heading\n\n| a | b |", "there is no running text"),
        ("a be to of", "1.8 characters a word (least: 3)"),
        ("the extraordinarily, (internationalisation)", "13 characters a word (most: 10)"),
        ("the rocks and mines ##", "0.4 hash signs a word (most: 0.1)"),
        ("the rocks and mines... of stone…", "0.33 ellipses a word (most: 0.1)"),
        ("the rocks of\n" * 3 + "the rocks and many others are here...\n" * 2, "0.4 of the lines end in an ellipsis"),
        ("- the rocks\n• and mines\n* of stone", "1 of the lines begin with a bullet (most: 0.9)"),
        ("the rocks and 1234 5678", "0.6 of the words have a letter (least: 0.8)"),
        ("rocks and mines are stones", "1 of eight stop words (least: 2)"),
    ],
)
def test_quality(text, reason):
    found = quality(Document(text))
    assert found is not None
    assert found.startswith(reason)


def test_quality_of_tables_and_headings():
    assert (
        quality(Document("\n".join(["# The rocks of the north have names"] + ["| 1 | 2 |"] * 50 + [ENGLISH]))) is None
    )
    assert quality(Document("Rocks and mines are stones"), stop_words=1) is None


def test_c4():
    assert c4(Document(ENGLISH * 3)) is None
    assert c4(Document(ENGLISH * 2)) == "sentences: 2 (least: 3)"
    assert c4(Document(ENGLISH * 3 + "Lorem ipsum dolor.")) == "there is 'lorem ipsum'"
    code = "function f(x) { return { a: x }; }\n"
    assert c4(Document(code * 3 + ENGLISH * 3)) == "0.14 curly brackets a word (most: 0.1)"
    assert c4(Document(f"```\n{code * 9}```\n" + ENGLISH * 3)) is None
    assert c4(Document(ENGLISH * 3 + "$x_{1}^{2}$ `{}` " * 20)) is None
    assert c4(Document(ENGLISH * 3 + r"\[ \frac{1}{2}n^{2}\sin \textstyle{} x_{1} \] see {ref}`a {b}` " * 20)) is None
    assert c4(Document(PAPER)) is None


def test_c4_s_lines():
    notices = ["Please enable JavaScript in your browser.", "Terms of Use", "We use cookies.", "x" * 1001]
    stay = [
        "## A privacy policy for sensors",
        "The map is drawn by a program in JavaScript.",
        "A browser " + "shows the maps of the north " * 5 + "by JavaScript.",
        "| uses cookies | 3 |",
        "Table 1: Oxides in weight per cent",
        "velocity is given by",
        ENGLISH * 3,
    ]
    document = Document("\n\n".join(line for pair in zip(notices + [""] * 3, stay, strict=True) for line in pair))
    assert c4(document) is None
    assert [line for line in document.text.split("\n\n") if line] == [line.strip() for line in stay]


def test_words():
    assert words(Document("one two -- 3 " * 17 + "\n\n## four five\n\n| six | 7 |")) is None
    assert words(Document("one two " * 24 + "one")) == "49 words (least: 50)"
    assert words(Document("one two"), minimum=1, maximum=1) == "2 words (most: 1)"


@pytest.mark.parametrize(("name", "package"), [("mojibake", "ftfy"), ("language", "py3langid.langid")])
def test_the_extra(name, package, monkeypatch):
    from k2mini.corpus.filters.language import _model

    _model.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"k2mini corpus needs the extra 'corpus'"):
        FILTERS[name](Document(ENGLISH * 5))
