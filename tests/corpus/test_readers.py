"""Every word that a file gives is in its text, whatever is wrong with the file, and nothing harmful is read."""

import gzip
import json
import os
import re
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from k2mini.corpus import pdf as pdf_reader
from k2mini.corpus import readers
from k2mini.corpus.markdown import join_lines
from k2mini.corpus.readers import list_files, read_file
from tests.corpus.papers import TEI_HEAD, Words, html, jats, pdf, pdf_lines, tei, work

pytest.importorskip("lxml")
pytest.importorskip("pypdfium2")
pytest.importorskip("reportlab")


def no_error(place, reason):
    raise AssertionError(f"{place}: {reason}")


def read(folder, name, content, **options):
    (folder / name).write_bytes(content)
    return list(read_file(folder / name, no_error, **options))


def read_and_list(path, **options):
    """The documents of a file, and what is listed."""
    listed = []
    return list(read_file(path, lambda *where: listed.append(where), **options)), listed


def refusal(folder, name, content, **options):
    (folder / name).write_bytes(content)
    documents, ((place, reason),) = read_and_list(folder / name, **options)
    assert documents == []
    assert place == str(folder / name)
    return reason


def div(*parts, head=None):
    return f"<div><head>{head}</head>{''.join(parts)}</div>" if head is not None else f"<div>{''.join(parts)}</div>"


def p(text):
    return f"<p>{text}</p>"


# Each makes a file of all that its Words are asked for. A number is that of a report in grobidOrg/grobid.
TEI = {
    "plain": lambda w: tei(div(p(w()), p(w()), head=w(2)), w(4), p(w())),
    "no title": lambda w: tei(div(p(w()), head=w(2)), "", p(w())),
    "no abstract": lambda w: tei(div(p(w()), head=w(2)), w(4)),
    "no header": lambda w: f"{TEI_HEAD}<text><body>{p(w())}</body></text></TEI>".encode(),
    "no body": lambda w: tei("", w(4), p(w())),
    "empty heading": lambda w: tei(f"<div><head/>{p(w())}</div>" + div(p(w()), head=" ")),
    "heading without text, 377": lambda w: tei(div(head=w(2)) + div(p(w()), head=w(2))),
    "nested sections": lambda w: tei(div(p(w()), div(p(w()), div(p(w()), head=w(1)), head=w(1)), head=w(1))),
    "text outside of paragraphs": lambda w: tei(w() + div(w(), p(w()), w(), head=w(1)) + w()),
    "citation without target, 338": lambda w: tei(div(p(f'{w()} <ref type="bibr">{w(1)} 1999</ref> {w(2)}.'))),
    "citation of nothing": lambda w: tei(div(p(f'{w()} <ref type="bibr" target="#b9">{w(1)}</ref> {w()}.'))),
    "citation of a work without title": lambda w: tei(
        div(p(f'{w()} <ref type="bibr" target="#b0">{w(1)}</ref> {w()}.')), works=work("b0", "", w(1))
    ),
    "citations without a space between": lambda w: tei(
        div(p(f'{w()} <ref type="bibr">{w(1)}</ref><ref type="bibr" target="#b0">{w(1)}</ref>')), works=work("b0", w(2))
    ),
    "reference only as it stands, 221": lambda w: tei(
        div(p(w())), works=f'<biblStruct xml:id="b0"><monogr/><note type="raw_reference">{w(8)}</note></biblStruct>'
    ),
    "figure nobody refers to": lambda w: tei(
        div(p(w())) + f'<figure xml:id="f"><head>Fig. 1.</head><label>1</label><figDesc>{w()}</figDesc></figure>'
    ),
    "text in figDesc, 1077": lambda w: tei(
        f"<figure><head>{w(2)}</head><label/><figDesc><div>{p(w())}{p(w())}</div></figDesc></figure>" + div(p(w()))
    ),
    "sentences in figDesc, 1265": lambda w: tei(
        f"<figure><head>Figure 2 :</head><label>2</label><figDesc><div><p><s>Figure 2: {w()}.</s><s>{w()}</s></p></div>"
        "</figDesc></figure>"
    ),
    "head that goes on in figDesc": lambda w: tei(
        f"<figure><head>Fig. 2 {w(1)}</head><label>2</label><figDesc>-{w()}</figDesc></figure>"
    ),
    "content of a figure, 722": lambda w: tei(f"<figure><head/><content>{w()}</content>{w(2)}</figure>"),
    "table in its description, 411": lambda w: tei(
        f'<figure type="table" xml:id="t"><head/><label/><figDesc>{w(9)}</figDesc><table/></figure>'
    ),
    "cells over columns, 815": lambda w: tei(
        f'<figure type="table"><head>{w(2)}</head><label>3</label><figDesc>{w()}</figDesc><table><row>'
        f"<cell>{w(1)}</cell>"
        f'<cell>{w(1)}</cell></row><row><cell cols="2">{w()}</cell><cell/></row></table><note>{w(3)}</note></figure>'
    ),
    "table without rows": lambda w: tei(f'<figure type="table"><table>{w(9)}</table></figure>'),
    "figure in the annex, 737": lambda w: tei(
        div(p(w())), back=f'<div type="annex">{div(p(w()), head=w(1))}<figure><figDesc>{w()}</figDesc></figure></div>'
    ),
    "annex without a paragraph, 895": lambda w: tei(
        div(p(w())), back=f'<div type="annex">{div(head=w(1))}</div><div type="funding">{w()}</div>'
    ),
    "footnotes after the figures, 657": lambda w: tei(
        div(p(w()))
        + f'<figure><figDesc>{w()}</figDesc></figure><note place="foot" n="2">{w()} <ref>3</ref> {w()}</note>'
    ),
    "sentences without spaces": lambda w: tei(div(p(f"<s>{w()}.</s><s>{w()}.</s><s>{w()}.</s>"))),
    "list and formula": lambda w: tei(
        div(p(w()), f"<list><item>{w()}</item><item>{w()}<list><item>{w()}</item></list></item></list>")
        + div(f'<formula xml:id="x">{w(3)}<label>(1)</label></formula>', p(f"{w(2)} <formula>{w(2)}</formula> {w(2)}"))
    ),
    "a namespace on every element": lambda w: tei(
        div(p(w())).replace("<p>", '<p xmlns="http://www.tei-c.org/ns/1.0">')
    ),
    "titles in a sentence": lambda w: tei(
        div(p(f"{w()} <title>{w(2)}</title> {w()} <bibl><title>{w(1)}</title></bibl>"))
    ),
    "unknown elements, line and page breaks": lambda w: tei(
        div(p(f"{w(1)}<lb/>{w(1)}<pb/>{w(1)} <new>{w(1)} <hi rend='italic'>{w(1)}</hi></new> {w()}"))
    ),
}
JATS = {
    "plain": lambda w: jats(
        f"<sec><title>{w(2)}</title>{p(w())}{p(w())}</sec>", w(4), f"<abstract>{p(w())}</abstract>"
    ),
    "no title, no front": lambda w: f"<article><body>{p(w())}</body></article>".encode(),
    "empty title": lambda w: jats(f"<sec><title/>{p(w())}</sec>"),
    "abstract in sections": lambda w: jats(
        p(w()), w(3), f"<abstract><title>Abstract</title><sec><title>{w(1)}</title>{p(w())}</sec></abstract>"
    ),
    "an entity of the DTD that is not read": lambda w: jats(
        p(f"{w(2)}&nbsp;{w(2)}"), doctype='<!DOCTYPE article PUBLIC "-//NLM//DTD JATS" "JATS-archivearticle1.dtd">'
    ),
    "figures and tables at the end": lambda w: jats(
        p(w()),
        back=f'<floats-group><fig id="f"><label>Figure 1</label><caption><title>{w()}.</title>{p(w())}</caption></fig>'
        f"<table-wrap><label>Table 1</label><caption>{p(w())}</caption><table><thead><tr><th rowspan='2'>{w(1)}</th>"
        f"<th colspan='2'>{w(1)}</th></tr><tr><th>{w(1)}</th><th>{w(1)}</th></tr></thead><tbody><tr><td>{w(1)}</td>"
        f"<td>{w(1)}</td><td>{w(1)} | {w(1)}</td></tr></tbody></table><table-wrap-foot><fn><label>a"
        f"</label>{p(w())}</fn>"
        "</table-wrap-foot></table-wrap></floats-group>",
    ),
    "blocks within a paragraph": lambda w: jats(
        p(
            f"{w()}<disp-formula><label>(1)</label><alternatives>"
            f"<tex-math>\\begin{{document}}$${w(1)}$$\\end{{document}}"
            f"</tex-math><graphic/></alternatives></disp-formula>{w()}<list>"
            f"<list-item>{p(w())}{p(w())}</list-item></list>"
            f"{w()}<fig><caption>{p(w())}</caption></fig>{w()} <inline-formula><mml:math>"
            f"<mml:mi>{w(1)}</mml:mi></mml:math>"
            f"</inline-formula>"
        )
    ),
    "boxes, quotes, definitions, notes": lambda w: jats(
        f"<boxed-text><label>{w(1)}</label><title>{w(2)}</title>{p(w())}</boxed-text><disp-quote>{p(w())}</disp-quote>"
        f"<def-list><def-item><term>{w(1)}</term><def>{p(w())}</def></def-item></def-list>"
        f"{p(w() + '<fn>' + p(w()) + '</fn>' + w())}<code>{w(2)}\n{w(2)}</code>",
        back=f"<back><ack>{p(w())}</ack><fn-group><fn><label>1</label>{p(w())}</fn></fn-group><app-group>"
        f"<app><title>{w(1)}"
        f"</title>{p(w())}</app></app-group></back>",
    ),
    "two ways of listing a work": lambda w: jats(
        p(f'{w()} <xref ref-type="bibr" rid="a b">{w(1)}</xref><sup>2</sup>'),
        back=f'<back><ref-list><title>References</title><ref id="a"><label>1</label><element-citation>'
        f"<person-group><name>"
        f"<surname>{w(1)}</surname><given-names>{w(1)}</given-names></name></person-group><article-title>{w()}"
        f"</article-title><source>{w(1)}</source></element-citation></ref><ref id='b'><mixed-citation><name>"
        f"<surname>{w(1)}"
        f"</surname><given-names>{w(1)}</given-names>"
        f"</name>, <article-title>{w()}</article-title>. <source>{w(1)}</source>,"
        f" {w(2)}.</mixed-citation></ref></ref-list></back>",
    ),
}
HTML = {
    "plain": lambda w: html(f"<h1>{w(2)}</h1>{p(w())}<div>{w()}</div>{w()}<ul><li>{w()}<li>{p(w())}</ul>"),
    "Sphinx": lambda w: html(
        f'<div class="related">skipped</div><div role="main"><h1>{w(2)}<a class="headerlink" href="#">¶</a>'
        f"</h1>{p(w())}"
        f"<dl><dt>{w(1)}</dt><dd>{p(w())}</dd></dl><pre>{w(2)}\n  {w(2)}</pre></div><footer>skipped</footer>"
    ),
    "table and figure": lambda w: html(
        f"<main><table><caption>{w()}</caption><tr><th>{w(1)}<td>{w(1)}<tr><td colspan=2>{w(2)}</table>"
        f"<figure><img src=x><figcaption>{w()}</figcaption></figure></main>"
    ),
    "layout by tables": lambda w: html(
        f"<table><tr><td><h2>{w(1)}</h2>{p(w())}<table><tr><td>{w(2)}</td><td>{w(1)}</td></tr></table></td>"
        f"</tr></table>"
    ),
    "Latin 1, tags never closed": lambda w: (
        html(f"<p>{w()}<p>é {w()} <b>{w()}").replace(b"utf-8", b"latin1").replace("é".encode(), b"\xe9")
    ),
    "XHTML": lambda w: (
        f'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><body>{p(w())}</body></html>'.encode()
    ),
}
PDF = {
    "one column": lambda w: pdf([w(150) for _ in range(4)]),
    "two columns": lambda w: pdf([w(120) for _ in range(12)], columns=2),
    "three columns, headers": lambda w: pdf(
        [w(200) for _ in range(8)], columns=3, header="A Journal of Rocks, volume 3"
    ),
    "a line outside of the columns": lambda w: pdf_lines([[(50, 700, w(3)), (300, 700, w(3)), (50, 20, w(2))]]),
}
FILES = [
    (f"{n}{suffix}", name, make)
    for suffix, files in ((".tei.xml", TEI), (".nxml", JATS), (".html", HTML), (".pdf", PDF))
    for n, (name, make) in enumerate(files.items())
]
FILES += [("x.XHTML", "XHTML", HTML["XHTML"]), ("x.tei.xml.gz", "gz", lambda w: gzip.compress(tei(p(w()))))]
FILES += [
    ("x.pdf.GZ", "gz", lambda w: gzip.compress(pdf([w(50)]))),
    ("x.md", "BOM", lambda w: b"\xef\xbb\xbf" + w().encode()),
]


def test_there_are_enough_of_them():
    assert len(FILES) >= 40
    assert sum(bool(re.search(r", \d+$", name)) for _, name, _ in FILES) >= 10


@pytest.mark.parametrize(
    ("name", "make"), [file[::2] for file in FILES], ids=[f"{file[0]}: {file[1]}" for file in FILES]
)
@pytest.mark.parametrize("marks", ["none", "k2"])
def test_every_word_is_there(tmp_path, name, make, marks):
    """Once, and where a title is cited, as often as that."""
    words = Words()
    content = make(words)
    (document,) = read(tmp_path, name, content, marks=marks)
    found = Counter(re.findall(r"\w+", document.text))
    missing = [word for word in words.given if not found[word]]
    shown_as_title = {"citations without a space between", "two ways of listing a work"}
    if marks == "k2" and any(make is files.get(n) for files in (TEI, JATS) for n in shown_as_title):
        assert len(missing) == 1  # K2 writes the title in place of the citation's own text
    else:
        assert missing == []
        assert max(found[word] for word in words.given) == 1
    assert document.source == str(tmp_path / name)
    assert "skipped" not in document.text
    assert not re.search(r"[\x00-\x08]| \n|\n\n\n", document.text)
    assert make is not TEI["titles in a sentence"] or "#" not in document.text


PAPER = (
    tei(
        div(
            p(
                'Sea ice <ref type="bibr" target="#b0">[1]</ref> melts. It was seen by Frey et al. '
                '<ref type="bibr" target="#b1">[2]</ref>, as in Fig. 3. The rest <ref type="bibr">[7]</ref> is water.'
            ),
            head="Melt",
        ).replace("<head>", '<head n="2.1">')
        + '<figure xml:id="fig_0"><head>Fig. 3 .</head><label>3</label><figDesc>Fig. 3. A map.</figDesc></figure>'
        '<figure type="table" xml:id="tab_0"><head>Table 1</head><label>1</label><figDesc>Ages.</figDesc>'
        "<table><row><cell>a"
        "</cell><cell>b</cell></row><row><cell>1</cell><cell>2</cell></row></table></figure>"
        '<formula xml:id="f">E = mc 2</formula><note place="foot">By hand.</note>',
        "On ice",
        "<div><p>Ice melts.</p></div>",
        works=work("b0", "Ice and salt", "Frey") + work("b1", "A second work") + work("b2", "Ice  and salt.", "Frey"),
        header='<publicationStmt><publisher/><availability status="unknown">'
        '<licence target="https://creativecommons.org/licenses/by'
        '/4.0/"/></availability><date type="published" when="2017-05-01"/></publicationStmt>',
    )
    .replace(
        b"<profileDesc>",
        b"<profileDesc><textClass><keywords>ice; <term>sea water</term><term>salt</term></keywords></textClass>",
    )
    .replace(
        b"<monogr><imprint><date/>", b'<idno type="DOI">10.1029/2017GL1</idno><monogr><imprint><date when="2018"/>', 1
    )
)

MARKDOWN = """# On ice

## Abstract

Ice melts.

### Melt

Sea ice [1] melts. It was seen by Frey et al. [2], as in Fig. 3. The rest [7] is water.

Figure 3: A map.

Table 1: Ages.

| a | b |
| - | - |
| 1 | 2 |

E = mc 2

By hand.

## References

- A Frey. Ice and salt. 1999
- A second work. 1999"""


def test_a_paper_as_markdown(tmp_path):
    (document,) = read(tmp_path, "a.tei.xml", PAPER)
    assert document.text == MARKDOWN
    assert (document.title, document.abstract) == ("On ice", "Ice melts.")
    assert (document.doi, document.year, document.keywords) == ("10.1029/2017GL1", 2017, ["sea water", "salt"])
    assert document.licence == "https://creativecommons.org/licenses/by/4.0/"
    assert document.figures == [
        {"label": "Figure 3", "caption": "A map."},
        {"label": "Table 1", "caption": "Ages."},
    ]
    assert document.citations == [
        {"sentence": "Sea ice [1] melts.", "title": "Ice and salt"},
        {"sentence": "It was seen by Frey et al. [2], as in Fig. 3.", "title": "A second work"},
    ]
    assert all(citation["sentence"] in document.text for citation in document.citations)


def test_a_paper_with_k2s_marks(tmp_path):
    """As davendw49/sciparser writes them, but a citation without target keeps its text, and no figure is lost."""
    (document,) = read(tmp_path, "a.xml", PAPER, marks="k2")
    expected = MARKDOWN.replace("[1]", "[START_REF]Ice and salt[END_REF]").replace(
        "[2]", "[START_REF]A second work[END_REF]"
    )
    expected = expected.replace("Figure 3: A map.", "[START_FIGURE]\nFigure 3: A map.\n[END_FIGURE]")
    expected = expected.replace("Table 1: Ages.", "[START_TABLE]\nTable 1: Ages.").replace(
        "| 2 |", "| 2 |\n[END_TABLE]"
    )
    expected = expected.replace("E = mc 2", "[START_FORMULA]E = mc 2[END_FORMULA]")
    assert document.text == expected.replace("By hand.", "[START_NOTE]By hand.[END_NOTE]")
    assert document.abstract == "Ice melts."


def test_jats_as_markdown(tmp_path):
    meta = (
        '<article-id pub-id-type="doi">10.1/x</article-id><article-id pub-id-type="doi">10.5194/cp-1</article-id>'
        '<pub-date pub-type="pmc-release"><year>2001</year></pub-date><pub-date><year>2012</year></pub-date>'
        "<permissions><license xlink:href='simple'>"
        "<license-p>See <ext-link xlink:href='http://creativecommons.org/licenses/by/3.0/'"
        ">CC</ext-link>.</license-p></license></permissions><kwd-group><kwd>ice</kwd><kwd>salt</kwd></kwd-group>"
    )
    body = (
        "<sec><label>1</label><title>Melt</title><p>At 10<sup>-3</sup> m the ice melts.<sup>"
        '<xref ref-type="bibr" rid="r1">1</xref>'
        '</sup> It is H<sub>2</sub>O.</p><sec><title>Salt</title><p>See <xref ref-type="fig" rid="f1">Fig. 1'
        "</xref>.</p>"
        '<fig id="f1"><label>Fig. 1</label><caption><title>A map</title><p>Of ice.</p></caption></fig></sec></sec>'
        "<table-wrap><label>Table 2.</label><table><tr><th rowspan='2'>a</th><th colspan='2'>b</th></tr><tr>"
        "<td>c</td><td>d|e</td></tr>"
        "</table></table-wrap>"
    )
    back = (
        "<back><ref-list><ref id='r1'><element-citation><name><surname>Frey</surname><given-names>A"
        "</given-names></name>"
        "<article-title>Ice and salt</article-title><source>J. Ice</source><year>1999</year>"
        "</element-citation></ref></ref-list></back>"
    )
    (document,) = read(tmp_path, "a.nxml", jats(body, "On ice", "<abstract><p>Ice.</p></abstract>", back, meta))
    assert document.text == (
        "# On ice\n\n## Abstract\n\nIce.\n\n## Melt\n\nAt 10^-3 m the ice melts.1 It is H2O.\n\n"
        "### Salt\n\nSee Fig. 1.\n\nFigure 1: A map. Of ice.\n\nTable 2\n\n"
        "| a | b |  |\n| - | - | - |\n|  | c | d\\|e |\n\n"
        "## References\n\n- Frey A. Ice and salt. J. Ice. 1999"
    )
    assert document.citations == [{"sentence": "At 10^-3 m the ice melts.1", "title": "Ice and salt"}]
    assert (document.doi, document.year, document.keywords) == ("10.5194/cp-1", 2012, ["ice", "salt"])
    assert document.licence == "http://creativecommons.org/licenses/by/3.0/"


def test_what_a_page_says_of_itself(tmp_path):
    head = (
        "<title>A page | Site</title><meta name=citation_title content='On ice'>"
        "<meta name=citation_doi content='doi:10.1029/a'>"
        "<meta name=citation_publication_date content='2017/05/01'><link rel='license' href='https://x.org/l'>"
    )
    (document,) = read(tmp_path, "a.html", html("<nav>menu</nav><p>Ice<sup>2</sup> <b>melts</b>.</p>", head))
    assert document.text == "# On ice\n\nIce^2 melts."
    assert (document.title, document.doi, document.year, document.licence) == (
        "On ice",
        "10.1029/a",
        2017,
        "https://x.org/l",
    )


@pytest.mark.parametrize(
    ("lines", "joined"),
    [
        ("the adapta-\ntion of", "the adaptation of"),
        ("the sea-\nlevel, and sea-level", "the sea-level, and sea-level"),  # written so elsewhere
        ("of α2-\nintegrin", "of α2-integrin"),  # grobidOrg/grobid 180
        ("Navier-\nStokes and x-\nray", "Navier-Stokes and x-ray"),
        ("short-\nand long-term", "short-\nand long-term"),
        ("1998-\n2003", "1998-2003"),
    ],
)
def test_hyphens_of_line_ends(tmp_path, lines, joined):
    assert join_lines(lines) == joined
    if lines.isascii():  # which the fonts that reportlab brings can write
        places = [(72, 700 - 12 * n, line) for n, line in enumerate(lines.split("\n"))]
        (document,) = read(tmp_path, "a.pdf", pdf_lines([places]))
        assert document.text == joined.replace("\n", " ")


def test_hyphens_that_grobid_leaves(tmp_path):
    (document,) = read(tmp_path, "a.tei.xml", tei(div(p("the adapta- tion, mid- and high-latitude - or not"))))
    assert document.text == "the adaptation, mid- and high-latitude - or not"


def test_hyphens_of_words_that_the_paper_has(tmp_path):
    """Elsewhere in it with the hyphen, without, or as two words; and those of words with a common end."""
    elsewhere = "Sea-level rise and rainfall. The sea has a high level, the ice a low one. Land subsidence, uplift."
    broken = (
        "sea- level, rain- fall, land- level, two- dimensional, up- lift, medium- as well as long-term, pre- but not"
        " post-seismic, first- through third-order, adapta- tion"
    )
    joined = broken.replace("rain- ", "rain").replace("up- ", "up").replace("adapta- ", "adapta")
    for word in ("sea", "land", "two"):
        joined = joined.replace(f"{word}- ", f"{word}-")
    (document,) = read(tmp_path, "a.tei.xml", tei(div(p(elsewhere), p(broken))))
    assert document.text.split("\n\n")[1] == joined


def test_columns_are_read_one_after_the_other(tmp_path):
    words = Words()
    (document,) = read(tmp_path, "a.pdf", pdf([words(150) for _ in range(10)], columns=2, header="Rocks 3"))
    text = [word for word in re.findall(r"\w+", document.text) if word in set(words.given)]
    assert text == words.given
    # The header and the page's number are paragraphs, which a filter can drop, and break none.
    paragraphs = document.text.split("\n\n")
    assert paragraphs.count("Rocks 3") == paragraphs[-1].count("Rocks") + sum(part == "Rocks 3" for part in paragraphs)
    assert {"1", "2"} <= set(paragraphs)


def test_lines_of_one_page_are_no_headers(tmp_path):
    lines = [(50, 800 - 20 * n, f"Sample {n} is a basalt of the ocean floor.") for n in range(9)]
    (document,) = read(tmp_path, "a.pdf", pdf_lines([lines]))
    assert document.text == " ".join(text for _, _, text in lines)


def test_what_a_pdf_says_of_itself(tmp_path):
    lines = [[(50, 700, "Sea ice of the north"), (50, 650, "Received 2019. It melts, and much of it is gone already.")]]
    (document,) = read(tmp_path, "a.pdf", pdf_lines(lines, title="Sea Ice of the North", subject="doi:10.1029/2019GL8"))
    assert (document.title, document.doi) == ("Sea Ice of the North", "10.1029/2019GL8")
    (document,) = read(tmp_path, "b.pdf", pdf_lines(lines, title="Microsoft Word - draft7.doc"))
    assert (document.title, document.year) == ("", None)  # the year of reportlab's file is not on the page


BOMB = b"".join(b'<!ENTITY e%d "%s">' % (n, b"&e%d;" % (n - 1) * 10) for n in range(1, 12))
DEEP = b"<p>" * 100_000
EVIL = {
    "entity": b'<!DOCTYPE TEI [<!ENTITY e "word">]><TEI><text><body><p>&e;</p></body></text></TEI>',
    "entity bomb": b'<!DOCTYPE TEI [<!ENTITY e0 "word">'
    + BOMB
    + b"]><TEI><text><body><p>&e11;</p></body></text></TEI>",
    "bomb in an attribute": b'<!DOCTYPE TEI [<!ENTITY e0 "word">' + BOMB + b']><TEI a="&e11;"/>',
    "large entity": b'<!DOCTYPE TEI [<!ENTITY e "' + b"a" * 10**6 + b'">]><TEI a="' + b"&e;" * 9000 + b'"/>',
    "external entity": b'<!DOCTYPE TEI [<!ENTITY e SYSTEM "SECRET">]><TEI><text><body><p>&e;</p></body></text></TEI>',
    "parameter entity": b'<!DOCTYPE TEI [<!ENTITY % e SYSTEM "SECRET"> %e;]><TEI><text><body>x</body></text></TEI>',
    "external DTD": b'<!DOCTYPE TEI SYSTEM "SECRET"><TEI><text><body/></text></TEI>',
    "nesting": b"<TEI><text><body>" + DEEP + b"word" + DEEP.replace(b"<", b"</") + b"</body></text></TEI>",
    "nesting without end": b"<article><body>" + DEEP,
}


@pytest.mark.parametrize("name", EVIL)
def test_xml_that_harms_is_refused(tmp_path, name):
    """And no other file is looked at."""
    (tmp_path / "secret.dtd").write_text('<!ENTITY inner "secret">')
    reason = refusal(tmp_path, "a.xml", EVIL[name].replace(b"SECRET", (tmp_path / "secret.dtd").as_uri().encode()))
    assert "secret" not in reason
    assert re.search("entity|Excessive depth|no text", reason), reason


JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(3000)
LOOP = (
    b"%PDF-1.4\n1 0 obj\n<</Type/Catalog/Pages 2 0 R>>\nendobj\n2 0 obj\n"
    b"<</Type/Pages/Count 1000000/Kids[2 0 R 2 0 R]>>\n"
    b"endobj\ntrailer<</Size 3/Root 1 0 R>>\n%%EOF"
)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pdf", pdf_lines([[(50, 50, "secret")]], encrypt="password"), "encrypted"),
        ("a.pdf", b"", "an empty file"),
        ("a.pdf", JPEG, "not a PDF"),
        ("a.pdf", pdf_lines([[], []]), "no text layer"),
        ("a.pdf", pdf_lines([[(50, 50, "text")]])[:300], "a damaged PDF"),
        ("a.pdf", LOOP, "1,000,000 pages"),
        ("a.txt", b"caf\xe9", r"not UTF-8 \(byte 3\)"),
        ("a.md", b" \n", "no text"),
        ("a.html", b"<p>caf\xe9", "not utf-8"),
        ("a.html", b"<meta charset=klingon><p>text", "klingon"),
        ("a.html", b"<div>" * 100_000 + b"word", "nested more than 256 deep"),
        ("a.html", b"", "no text"),
        ("a.html", b"<script>text</script>", "no text"),
        ("a.xml", b"", "not well-formed XML"),
        ("a.xml", b"<TEI><text><body><p>salt & ice</p></body></text></TEI>", "not well-formed XML.*line 1"),  # 50
        ("a.xml", "<?xml version='1.0' encoding='UTF-8'?><TEI>é</TEI>".encode("latin1"), "not well-formed XML"),
        ("a.xml", b"<TEI><teiHeader/></TEI>", "no text"),
        ("a.xml", b"<article><front/></article>", "no text"),
        ("a.xml", b"<rss/>", "neither TEI nor JATS: its root is <rss>"),
        ("a.xml", b"[TIMEOUT] PDF to XML conversion timed out", "not well-formed XML"),  # grobidOrg/grobid 905
        ("a.xml", b"<html><body>Error 503</body></html>", "neither TEI nor JATS"),  # 1195
        ("a.xml.gz", gzip.compress(PAPER)[:-20], "damaged"),
        ("a.txt.gz", b"text", "damaged"),
        ("a.csv", b'text\n"a', "unexpected end of data"),
    ],
)
def test_what_cant_be_read_is_listed(tmp_path, name, content, reason):
    assert re.search(reason, refusal(tmp_path, name, content))


def test_what_a_gz_becomes_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MOST", 10**6)
    monkeypatch.setattr(readers, "MOST_OF_A_TREE", 10**6)
    for suffix in ("txt", "md", "pdf", "xml", "html", "jsonl", "csv"):
        (tmp_path / f"a.{suffix}.gz").write_bytes(gzip.compress(bytes(10**7)))
        documents, ((_, reason),) = read_and_list(tmp_path / f"a.{suffix}.gz")
        assert not documents
        assert reason.endswith("more than 1,000,000 bytes")


def test_a_small_file_stays_small(tmp_path):
    cells = "<tr>" + "<td colspan=9999 rowspan=9999>x</td>" * 10 + "</tr>"
    (document,) = read(tmp_path, "a.html", html(f"<table>{cells * 100}</table>"))
    assert len(document.text) < 2_000_000
    cited = '<ref type="bibr" target="#b{n}">x</ref> and '
    works = "".join(work(f"b{n}", f"Work {n}") for n in range(500))
    body = p("".join(cited.replace("{n}", str(n)) for n in range(500)))  # one sentence
    (document,) = read(tmp_path, "a.tei.xml", tei(body, works=works))
    assert len(json.dumps(document.record())) < 200_000


def test_records(tmp_path):
    lines = [
        '{"text": "one", "title": "t", "year": "2001", "license": "MIT"}',
        "",
        '{"text": " "}',
        "{",
        "[1]",
        '{"text": "two"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (one, two), said = read_and_list(tmp_path / "a.jsonl")
    assert (one.text, one.title, one.year, one.licence, one.source) == (
        "one",
        "t",
        2001,
        "MIT",
        f"{tmp_path}/a.jsonl, line 1",
    )
    assert (two.text, two.source) == ("two", f"{tmp_path}/a.jsonl, line 6")
    assert [place.split(", ")[1] for place, _ in said] == ["line 3", "line 4", "line 5"]
    assert "--text-field" in said[0][1]
    for name, mark in (("b.csv", ","), ("b.tsv", "\t")):
        (tmp_path / name).write_text(f'body{mark}title\n"one\nmore"{mark}t\nshort\ntwo{mark}u\n')
        documents, said = read_and_list(tmp_path / name, text_field="body")
        assert [(d.text, d.title, d.source.split(", ")[1]) for d in documents] == [
            ("one\nmore", "t", "line 2"),
            ("two", "u", "line 5"),
        ]
        assert said == [(f"{tmp_path / name}, line 4", "1 cells, the header has 2")]


def test_a_wrong_quote_ends_no_table(tmp_path):
    rows = [f"text {n}" for n in range(1, 100)]
    rows[2], rows[50], rows[60], rows[98] = '"a" b', "caf\udce9", '"c\nd"', '"e'
    (tmp_path / "a.csv").write_bytes("\n".join(["text", *rows]).encode(errors="surrogateescape"))
    documents, listed = read_and_list(tmp_path / "a.csv")
    assert [d.text for d in documents] == [row.strip('"') for n, row in enumerate(rows) if n not in (2, 50, 98)]
    assert documents[-1].source.endswith("a.csv, line 100")
    assert [(place.removeprefix(str(tmp_path)), reason[:14]) for place, reason in listed] == [
        ("/a.csv", "lines 4 to 4, "),
        ("/a.csv, line 52", "not UTF-8"),
        ("/a.csv", "lines 101 to 1"),
    ]


def test_a_table_is_not_held_in_memory(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "word\n" * 10**6)
    documents = read_file(tmp_path / "a.csv", no_error)
    tracemalloc.start()
    assert next(documents).text == "word"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_the_text_of_a_pdf_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf_reader, "MOST_CHARACTERS", 30)
    line = [(50, 700, "twenty characters ok")]
    assert len(read(tmp_path, "a.pdf", pdf_lines([line]))) == 1
    assert refusal(tmp_path, "a.pdf", pdf_lines([line, line])) == "more than 30 characters of text"


def test_text_and_trees_are_bounded_more_than_pdfs(tmp_path):
    for suffix in ("txt", "xml", "csv"):
        reason = refusal(tmp_path, f"a.{suffix}.gz", gzip.compress(b"a" * (2**25 + 1), 1))
        assert reason.endswith("more than 33,554,432 bytes")


def test_sub_articles_are_listed(tmp_path):
    works = "<ref-list><ref><mixed-citation>reply</mixed-citation></ref></ref-list>"
    reply = f"<sub-article><body><p>reply</p></body><back>{works}</back>"
    (tmp_path / "a.nxml").write_bytes(jats(p("ice"), back=f"{reply}</sub-article>"))
    (document,), ((_, reason),) = read_and_list(tmp_path / "a.nxml")
    assert (document.text, reason[:16]) == ("ice", "of its 1 sub-art")


def test_another_name_for_the_source(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ice"}\n{}')
    listed = []
    (document,) = read_file(tmp_path / "a.jsonl", lambda *where: listed.append(where), source="b.pdf")
    assert (document.source, listed[0][0]) == ("b.pdf, line 1", "b.pdf, line 2")


def test_the_title_of_markdown(tmp_path):
    (document,) = read(tmp_path, "a.md", b"# On ice\r\n\r\nIt melts.")
    assert (document.title, document.text) == ("On ice", "# On ice\n\nIt melts.")


def test_names_that_are_not_utf8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("text")
    assert list_files([tmp_path]) == [path]
    (document,) = read_file(path, no_error)
    assert document.source == f"{tmp_path}/caf\\xe9.txt"
    assert json.loads(json.dumps(document.record(), ensure_ascii=False).encode())["text"] == "text"


def test_files_of_folders(tmp_path):
    for name in ("b.tei.xml", "a/c.PDF", "a/d.txt.gz", "a/.hidden.txt", "a/e.docx", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    passed_over = Counter()
    assert [str(path.relative_to(tmp_path)) for path in list_files([tmp_path], passed_over)] == [
        "a/c.PDF",
        "a/d.txt.gz",
        "b.tei.xml",
    ]
    assert passed_over == {".txt": 1, ".docx": 1, "no suffix": 1}
    for inputs, message in [
        ([tmp_path / "no"], "there is no file or folder"),
        ([tmp_path / "a" / "e.docx"], "documents are read from .xml, "),
        ([tmp_path, tmp_path / "b.tei.xml"], "b.tei.xml is named twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            list_files(inputs)


def test_links_to_folders_are_counted(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path)
    passed_over = Counter()
    assert list_files([tmp_path], passed_over) == [tmp_path / "a" / "b.txt"]
    assert passed_over == {"links to folders": 1}


def test_without_the_extra(tmp_path, monkeypatch):
    """Text and records are read all the same."""
    for name in ("lxml", "lxml.etree", "pypdfium2"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("a.xml", "a.html", "a.pdf"):
        (tmp_path / name).write_bytes(b"%PDF-1.4")
        with pytest.raises(ValueError, match="needs the extra 'corpus'"):
            list(read_file(tmp_path / name, no_error))
    assert [d.text for d in read(tmp_path, "a.txt", b"text")] == ["text"]
    assert [d.text for d in read(tmp_path, "a.jsonl", b'{"text": "text"}')] == ["text"]
    assert [d.text for d in read(tmp_path, "a.csv", b"text\nmore\n")] == ["more"]


CITED = '<{0} {1}="bibr" {2}="{3}b1">Frey ({4})</{0}>'
IN_TEI, IN_JATS = (
    [CITED.format(*names, year) for year in range(2010, 2014)]
    for names in (("ref", "type", "target", "#"), ("xref", "ref-type", "rid", ""))
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "a.nxml",
            jats(
                f"<sec><title>After {IN_JATS[0]}</title><fig><label>Figure 1</label><caption><p>By {IN_JATS[1]}."
                f"</p></caption></fig><table-wrap><table><tr><td>{IN_JATS[2]}</td><td>1</td></tr></table></table-wrap>"
                f"<p>Ice<fn><p>See {IN_JATS[3]}</p></fn> melts.</p></sec>",
                back="<back><ref-list><ref id='b1'><mixed-citation><article-title>On maps</article-title>"
                "</mixed-citation></ref></ref-list></back>",
            ),
        ),
        (
            "a.tei.xml",
            tei(
                div(
                    f"<figure><label>1</label><figDesc>By {IN_TEI[1]}.</figDesc></figure><figure><table><row>"
                    f"<cell>{IN_TEI[2]}</cell><cell>1</cell></row></table></figure>",
                    p(f"Ice<note>See {IN_TEI[3]}</note> melts."),
                    head=f"After {IN_TEI[0]}",
                ),
                works=work("b1", "On maps"),
            ),
        ),
    ],
)
def test_citations_in_headings_captions_cells_and_notes(tmp_path, name, content):
    (document,) = read(tmp_path, name, content)
    for text in ("## After Frey (2010)\n", "Figure 1: By Frey (2011).\n", "| Frey (2012) | 1 |", "See Frey (2013)"):
        assert text in document.text
    assert document.figures[0]["caption"] == "By Frey (2011)."
    (document,) = read(tmp_path, name, content, marks="k2")
    assert document.text.count("[START_REF]On maps[END_REF]") == 4
    assert document.figures[0]["caption"] == "By [START_REF]On maps[END_REF]."


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<article><h2>a</h2></article><article><header><h1>b</h1></header><p>c</article>", "## a\n\n# b\n\nc"),
        ("menu<main><h1>a</h1></main><main><p>b</main>", "# a\n\nb"),
        ("menu<div role=main><h1>a</h1><main><p>b</main></div>", "# a\n\nb"),
        ("<header><h1>a</h1></header><main><p>b</main>", "# a\n\nb"),
        ("menu<article><p>a<article>b</article></article>", "a\n\nb"),
        ("<h1>a<br>b</h1><aside>c</aside>", "# a b"),
        (
            "<p>a<aside class='footnote brackets'>b</aside><aside class=topic>c</aside>"
            "<aside class=sidebar><p class=sidebar-title>d</aside><aside class=sidebar>menu</aside>",
            "a\n\nb\n\nc\n\nd",
        ),
        ("<table><tr><th>a<th>b<tr><td><code>c</code><td>1</table>", "| a | b |\n| - | - |\n| c | 1 |"),
        ("<table><tr><td>a<td><code>b\nc</code></table>", "a\n\n```\nb\nc\n```"),
    ],
)
def test_the_main_parts_of_a_page(tmp_path, body, text):
    (document,) = read(tmp_path, "a.html", html(body))
    assert document.text == text
    assert document.title in ("", "a", "b", "a b")


def test_a_page_that_says_utf16_in_ascii(tmp_path):
    (document,) = read(tmp_path, "a.html", html("<p>é").replace(b"utf-8", b"utf-16"))
    assert document.text == "é"


@pytest.mark.parametrize(
    ("name", "open_", "close"),
    [("a.tei.xml", "<div><head>a ", "</head></div>"), ("a.html", "<section><h2>a ", "</h2></section>")],
)
def test_headings_in_headings_are_written_once(tmp_path, name, open_, close):
    nested = open_ * 40 + close * 40  # took twice as long with each
    (document,) = read(tmp_path, name, tei(nested) if name.endswith("xml") else html(nested))
    assert document.text.count("a") == 40


def test_entities_and_breaks_of_papers(tmp_path):
    doctype = '<!DOCTYPE article SYSTEM "a.dtd">'
    content = jats(p("M&uuml;ller, &foo; &lt;"), "M&uuml;ller<break/>flow", doctype=doctype)
    (document,) = read(tmp_path, "a.nxml", content)
    assert (document.title, document.text) == ("Müller flow", "# Müller flow\n\nMüller, &foo; <")
    content = b"<!DOCTYPE TEI SYSTEM 'a.dtd'><TEI><text><body><p>M&uuml;ller</p></body></text></TEI>"
    (document,) = read(tmp_path, "b.tei.xml", content)
    assert document.text == "Müller"
