"""What `k2mini corpus` reads, cleans and signs in a minute on one core, by kind of file, and what memory it takes.

    python tools/bench_corpus.py

The papers are made for it: 5,000 random English words in 40 paragraphs, 120 citations of 40 works, a quarter of them
copies with 3 % of the words replaced. TEI is as GROBID writes it, PDF as reportlab does, in two columns; a real PDF
takes longer, for its drawings and fonts. A million papers are extrapolated from these rates; the merge, which
is one process, from its own. Peak memory is the sum over the process and its workers of what each held at most.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from html import escape
from pathlib import Path

from k2mini.corpus.clean import choose
from k2mini.corpus.group import Group, Settings, read_group
from k2mini.corpus.readers import read_file

_WORDS = """the of and to in is that for it as was with be by on not this are from at or an which were but have has had
there been one more no if out so what about into than them can only other some could time these two may first any such
like over our most before must through back years where much your way down should because each just those people how
too little state good very make world still own see work long get here between both life under never same another know
while last might great year since against use off few water rock basin fault river granite basalt sediment layer
sample age grain surface depth pressure heat field map core mantle crust plate ridge trench delta flow model value data
result method study area region zone unit series figure section"""
WORDS = _WORDS.split()
COMMON = ("the", "of", "and", "to", "in", "is", "that", "for", "with", "be")  # one word in three


def paragraphs(draw: random.Random, number: int, length: int = 125) -> list[list[str]]:
    """Sentences of 10 to 25 words in paragraphs."""
    made = []
    for _ in range(number):
        sentences, count = [], 0
        while count < length:
            size = draw.randint(10, 25)
            words = [draw.choice(COMMON) if draw.random() < 0.33 else draw.choice(WORDS) for _ in range(size)]
            sentences.append(" ".join(words).capitalize() + ".")
            count += size
        made.append(sentences)
    return made


def edited(made: list[list[str]], draw: random.Random) -> list[list[str]]:
    """A copy with 3 % of its words replaced."""
    return [
        [" ".join(draw.choice(WORDS) if draw.random() < 0.03 else word for word in said.split(" ")) for said in part]
        for part in made
    ]


def as_tei(made: list[list[str]], draw: random.Random) -> bytes:
    """With three citations a paragraph, and the works."""
    body = ""
    for place, part in enumerate(made):
        cited = [f'<ref type="bibr" target="#b{draw.randrange(40)}">[{draw.randrange(40)}]</ref>' for _ in range(3)]
        said = " ".join(f"{text} {cited[n] if n < 3 else ''}" for n, text in enumerate(part))
        body += (f'<div><head n="{place}">Section {place}</head>' if place % 4 == 0 else "") + f"<p>{said}</p>"
        body += "</div>" if place % 4 == 3 else ""
    works = "".join(
        f'<biblStruct xml:id="b{n}"><analytic><title level="a" type="main">{" ".join(draw.choices(WORDS, k=9))}</title>'
        "<author><persName><forename>A</forename><surname>Berg</surname></persName></author></analytic>"
        '<monogr><title level="j">Rocks</title><imprint><date when="1999"/></imprint></monogr></biblStruct>'
        for n in range(40)
    )
    title = f'<title level="a" type="main">{" ".join(draw.choices(WORDS, k=9))}</title>'
    return (
        '<?xml version="1.0" encoding="UTF-8"?><TEI xmlns="http://www.tei-c.org/ns/1.0"><teiHeader><fileDesc><titleStmt>'
        f"{title}</titleStmt></fileDesc><profileDesc><abstract><p>{' '.join(made[0])}</p></abstract></profileDesc>"
        f"</teiHeader><text><body>{body}</body><back><div type='references'><listBibl>{works}</listBibl></div></back>"
        "</text></TEI>"
    ).encode()


def as_html(made: list[list[str]], draw: random.Random) -> bytes:
    """With a heading each four paragraphs, and navigation around."""
    links = "".join(f'<li><a href="{n}.html">{escape(draw.choice(WORDS))}</a></li>' for n in range(40))
    body = "".join(
        (f"<h2>Section {n}</h2>" if n % 4 == 0 else "") + f"<p>{' '.join(part)}</p>" for n, part in enumerate(made)
    )
    head = f"<head><title>A page</title></head><body><nav><ul>{links}</ul></nav><h1>A page</h1>"
    return f"<html>{head}{body}</body></html>".encode()


def as_pdf(made: list[list[str]], draw: random.Random) -> bytes:
    """A4 in two columns."""
    import io

    from reportlab.lib.pagesizes import A4
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.platypus import BaseDocTemplate, Frame, PageTemplate, Paragraph

    out = io.BytesIO()
    document = BaseDocTemplate(out, pagesize=A4, invariant=1)
    frames = [Frame(40 + n * 260, 40, 250, A4[1] - 80) for n in range(2)]
    document.addPageTemplates(PageTemplate(frames=frames))
    style = getSampleStyleSheet()["Normal"]
    document.build([Paragraph(" ".join(part), style) for part in made])
    return out.getvalue()


def as_jsonl(made: list[list[str]], draw: random.Random) -> bytes:
    """One record."""
    text = "\n\n".join(" ".join(part) for part in made)
    return json.dumps({"text": text, "year": draw.randint(1980, 2024), "licence": "CC-BY-4.0"}).encode() + b"\n"


KINDS: dict[str, Callable[[list[list[str]], random.Random], bytes]] = {
    "TEI": as_tei,
    "PDF": as_pdf,
    "HTML": as_html,
    "JSONL": as_jsonl,
}
ENDINGS = {"TEI": ".tei.xml", "PDF": ".pdf", "HTML": ".html", "JSONL": ".jsonl"}


def write(folder: Path, kind: str, number: int, seed: int = 0) -> list[Path]:
    """Papers in files, JSONL in one."""
    folder.mkdir(parents=True)
    draw, before, files = random.Random(seed), paragraphs(random.Random(seed), 40), []
    for place in range(number):
        made = edited(before, draw) if place % 4 == 3 else paragraphs(draw, 40)
        before = made
        content = KINDS[kind](made, draw)
        files.append(folder / (f"all{ENDINGS[kind]}" if kind == "JSONL" else f"{place:05}{ENDINGS[kind]}"))
        with files[-1].open("ab") as file:
            file.write(content)
    return sorted(set(files))


def rates(folder: Path, kind: str, number: int) -> tuple[float, float, int]:
    """Seconds a document in this process: reading, and all of it; and bytes a document."""
    files, settings = write(folder / kind, kind, number), Settings(choose([], []))
    size = sum(file.stat().st_size for file in files)
    warm = write(folder / f"{kind}-warm", kind, 2)
    read_group(Group(warm, folder / f"{kind}-warm.part"), settings, None, lambda _: None)  # loads what is imported late
    start = time.perf_counter()
    for file in files:
        for _ in read_file(file, lambda place, why: print(place, why)):
            pass
    reading = time.perf_counter() - start
    start = time.perf_counter()
    read_group(Group(files, folder / f"{kind}.part"), settings, None, lambda _: None)
    everything = time.perf_counter() - start
    note = json.loads((folder / f"{kind}.json").read_text())
    if note["documents"] != number:
        print(f"  of {number} documents {note['documents']} were kept, dropped: {note['dropped']}")
    return reading / number, everything / number, size // number


def peak(command: list[str]) -> tuple[int, float]:
    """MiB that a command and its children held at most, each at its own peak, summed; and its seconds."""
    start, most = time.perf_counter(), Counter[int]()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        for pid in [process.pid, *children(process.pid)]:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            held = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
            most[pid] = max(most[pid], *held, 0)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return most.total() // 1024, time.perf_counter() - start


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200, metavar="N", help="of each kind (default: 200)")
    parser.add_argument("--memory", type=int, default=200, metavar="N", help="papers at 1 x the input (default: 200)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("on one core: reading, cleaning, signing (the merge is below)")
        print(f"{'':6} {'kB each':>8} {'documents/min':>14} {'GB/min':>7} {'reading':>8} {'a million papers':>17}")
        for kind in KINDS:
            reading, everything, size = rates(folder, kind, options.documents)
            hours = everything * 1e6 / 3600
            print(
                f"{kind:6} {size / 1e3:8.0f} {60 / everything:14,.0f} {60 * size / everything / 1e9:7.3f} "
                f"{reading / everything:8.0%} {hours:9.1f} core hours"
            )
        memory(folder, options.memory)


def memory(folder: Path, number: int) -> None:
    """Peak memory at 1 x and 10 x, with two workers, and how long the merge of the larger takes."""
    print("\npeak memory, process and two workers; half of the papers are files of TEI, half stand in files of JSONL")
    found = []
    for factor in (1, 10):
        inputs = folder / f"in{factor}"
        write(inputs / "tei", "TEI", factor * number // 2, factor)
        for place in range(10):
            write(inputs / f"jsonl{place}", "JSONL", factor * number // 20, factor + place)
        command = [sys.executable, "-m", "k2mini", "corpus", str(inputs)]
        part, out = str(folder / f"part{factor}"), str(folder / f"out{factor}")
        made, seconds = peak([*command, "--part", "1/1", "--workers", "2", "--out", part])
        merged, merging = peak([*command[:4], "merge", part, "--out", out])
        found.append((made, merged, merging))
        print(f"{factor:2} x, {factor * number:6,} papers: {made} MiB in {seconds:.0f} s; ", end="")
        print(f"merge {merged} MiB in {merging:.1f} s", flush=True)
    (one, small, first), (ten, large, last) = found
    print(f"10 x / 1 x: {ten / one:.2f}, merge {large / small:.2f}")
    hours = (last - first) / (9 * number) * 1e6 / 3600
    print(f"a million papers: the merge takes about {hours:.1f} hours of one core, extrapolated")


if __name__ == "__main__":
    main()
