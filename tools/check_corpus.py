"""What near duplicates and decontamination find of what is there, and of what is not.

    python tools/check_corpus.py near --geobench DIR --arc arc_sft.json --text DIR …
    python tools/check_corpus.py contamination --geobench DIR --arc arc_sft.json --text DIR …

`near` prints how many copies with 5 % of their words replaced are found, by length, and how
many of other texts are dropped: questions and reference answers of GeoBench, K2's instruction data, paragraphs and
pages of documentation, and made-up papers of one template. J of their 5-grams and those of the kept text says which of
them are distinct: those below the threshold, or below it by more than its estimate's error. `contamination` plants each
question of GeoBench, as published and with case and spaces changed, and counts what is found in clean paragraphs.
Documentation is read from .md, .rst, .txt and .html, also .gz.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from k2mini.corpus.contamination import Benchmarks
from k2mini.corpus.document import Document
from k2mini.corpus.filters.quality import quality
from k2mini.corpus.filters.repetition import repetition
from k2mini.corpus.near import THRESHOLD, near_duplicates, signature
from k2mini.corpus.ngrams import words

LENGTHS = (300, 500, 1000, 2000, 5000)
CHECKED = 500  # copies of each length


def ngrams(text: str) -> set[tuple[str, ...]]:
    """The runs of five words."""
    found = words(text)
    return {tuple(found[start : start + 5]) for start in range(max(1, len(found) - 4))}


def pages(folders: Sequence[Path]) -> Iterator[str]:
    """The texts of documentation."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            suffix = Path(path.name.removesuffix(".gz")).suffix
            if suffix not in (".md", ".rst", ".txt", ".html") or not path.is_file() or path.is_symlink():
                continue
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            if suffix == ".html":
                text = re.sub(r"(?is)<(script|style|pre).*?</\1>|<!--.*?-->", "", text)
                text = re.sub(
                    r"<[^>]*>", "", re.sub(r"(?i)</?(p|div|h\d|li|td|tr|table|ul|dd|dt)\b[^>]*>", "\n\n", text)
                )
            yield text


def paragraphs(texts: Sequence[str], least: int = 20) -> list[str]:
    """Their paragraphs of prose: 20 words or more, each once, words of letters and stop words in them."""
    found: dict[str, str] = {}
    for text in texts:
        for part in re.split(r"\n\s*\n", text):
            each = part.split()
            if (
                len(each) >= least
                and sum(word.strip(".,;:()\"'`*").isalpha() for word in each) > 0.8 * len(each)
                and len({"the", "of", "to", "and", "is", "a"} & {*map(str.lower, each)}) >= 3
            ):
                found.setdefault(" ".join(words(part)), part.strip())
    return list(found.values())


def is_kept(text: str) -> bool:
    """Whether the filters for repetition and quality keep it: other text has no near duplicates to find."""
    return repetition(Document(text)) is None and quality(Document(text)) is None


def edited(found: Sequence[str], share: float, rng: random.Random, vocabulary: Sequence[str]) -> str:
    """A text with a share of its words, anywhere, replaced."""
    copy = list(found)
    for place in rng.sample(range(len(copy)), round(share * len(copy))):
        copy[place] = rng.choice(vocabulary)
    return " ".join(copy)


def templates(count: int, rng: random.Random, vocabulary: Sequence[str], shared: float) -> list[str]:
    """Papers of some 600 words in sentences, of which a share is the template's."""

    def sentence() -> str:
        return " ".join(rng.choices(vocabulary, k=15)) + "."

    template, papers = [sentence() for _ in range(round(40 * shared))], []
    for _ in range(count):
        papers.append([*template, *(sentence() for _ in range(40 - len(template)))])
        rng.shuffle(papers[-1])
    return [" ".join(paper) for paper in papers]


def distinct(texts: Sequence[str]) -> list[str]:
    """Each text once, by its words."""
    return list({" ".join(words(text)): text for text in texts if words(text)}.values())


def report_lost(name: str, texts: Sequence[str]) -> None:
    """How many of the texts are dropped, and how many of those share less than the threshold with what is kept."""
    signatures = np.stack([signature(text) for text in texts])
    kept = near_duplicates(signatures, np.array([len(text) for text in texts]), THRESHOLD)
    shares = []
    for place in np.flatnonzero(kept != np.arange(len(texts))).tolist():
        one, other = ngrams(texts[place]), ngrams(texts[kept[place]])
        shares.append(len(one & other) / len(one | other))
    said = f"{name}: {len(texts):,} texts, {len(shares):,} dropped"
    for least in (THRESHOLD, THRESHOLD - 0.1):
        lost = sum(share < least for share in shares)
        said += f"; J < {least:.1f}: {lost} ({lost / len(texts):.2%})"
    print(said, flush=True)


def near(questions: list[str], answers: list[str], arc: list[str], texts: list[str]) -> None:
    """Print what is found, of copies of text that the filters for repetition and quality keep, and what is lost."""
    rng = random.Random(0)
    running = [word for text in texts for word in text.split()]
    vocabulary = rng.sample(running, 50_000)
    for count in LENGTHS:
        originals: list[list[str]] = []
        starts = rng.sample(range(0, len(running) - count, count), (len(running) - count) // count)
        while starts and len(originals) < CHECKED:
            taken = running[(start := starts.pop()) : start + count]
            if is_kept(" ".join(taken)):
                originals.append(taken)
        both = [" ".join(one) for one in originals] + [edited(one, 0.05, rng, vocabulary) for one in originals]
        kept = near_duplicates(np.stack([signature(text) for text in both]), np.array([1] * len(both)), THRESHOLD)
        found = np.mean(kept[: len(originals)] == kept[len(originals) :])
        print(f"copies of {count:5,} words, 5 % replaced: {found:.1%} of {len(originals)} found", flush=True)
    longer = [text for text in texts if len(text.split()) >= 50 and is_kept(text)]
    report_lost("GeoBench's questions", distinct(questions))
    report_lost("GeoBench's reference answers of 20 words", distinct([a for a in answers if len(a.split()) >= 20]))
    report_lost("K2's instruction data, each record", distinct(arc))
    report_lost("K2's instruction data, ten records a text", distinct(["\n".join(arc[n : n + 10]) for n in
                range(0, len(arc), 10)]))  # fmt: skip
    report_lost("pages of documentation that the filters keep", longer)
    report_lost("paragraphs of documentation", paragraphs(texts))
    for shared in (0.2, 0.4, 0.5, 0.6):
        papers = templates(1000, rng, vocabulary, shared)
        report_lost(f"papers that share {shared:.0%} of their sentences", papers)


def contamination(folder: Path, questions: list[str], arc: list[str], texts: list[str]) -> None:
    """Print what is found of each way to plant the questions, and in clean paragraphs."""
    benchmarks = Benchmarks([folder / "geobench_npee.json", folder / "geobench_apstudy.json"])
    rng = random.Random(0)
    clean = rng.sample(paragraphs(texts), 20_000)

    def mixed(text: str) -> str:
        text = "".join(rng.choice((one.upper(), one.lower())) for one in text)
        return re.sub(r"\s+", lambda _: rng.choice((" ", "  ", "\t", " \n", "\u00a0")), text)

    for way, change in (("as published", str), ("case and spaces changed", mixed)):
        for place, between in (("as a paragraph", "\n\n"), ("within a paragraph", " ")):
            missed = []
            for question in questions:
                before, after = rng.sample(clean, 2)
                document = Document(f"{before}{between}{change(question)}{between}{after}")
                if not benchmarks.clean(document, cut=False):
                    missed.append(question)
            few = sum(len(words(question)) < 6 for question in missed)
            print(
                f"planted {place}, {way}: {len(questions) - len(missed):,} of {len(questions):,} found; "
                f"missed: {few} of fewer than six words, {len(missed) - few} others",
                flush=True,
            )
    checks = {"clean paragraphs of documentation": clean, "records of K2's instruction data": arc}
    for name, checked in (checks | {"pages of documentation": texts}).items():
        found = [(said, text) for text in checked for said in benchmarks.clean(Document(text), cut=False)[:1]]
        print(f"{name}: {len(found)} of {len(checked):,} ({len(found) / len(checked):.3%})")
        for said, _ in found[:20]:
            print(f"    {said}")


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["near", "contamination"])
    parser.add_argument("--geobench", type=Path, required=True, help="folder of GeoBench's files")
    parser.add_argument("--arc", type=Path, required=True, help="K2's instruction data, arc_sft.json")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="folders of documentation in English")
    options = parser.parse_args()
    npee = json.loads((options.geobench / "geobench_npee.json").read_text())
    ap = json.loads((options.geobench / "geobench_apstudy.json").read_text())
    questions = [text for task in npee.values() for text in task["question"]]
    questions += [stem for entry in ap if words(stem := entry["question"]["stem"])]
    answers = [text for task in npee.values() for text in task["answer"]]
    arc = ["\n".join(entry.values()) for entry in json.loads(options.arc.read_text())]
    texts = distinct(list(pages(options.text)))
    print(f"{len(texts):,} pages, {sum(map(len, texts)) / 1e6:.1f} MB, {len(paragraphs(texts)):,} paragraphs")
    if options.what == "near":
        near(questions, answers, arc, texts)
    else:
        contamination(options.geobench, questions, arc, texts)


if __name__ == "__main__":
    main()
