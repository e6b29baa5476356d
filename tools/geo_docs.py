"""`k2mini corpus` on real text: documentation of geoscience packages that Debian and PyPI carry, with its licences.

    python tools/geo_docs.py FOLDER --decontaminate geobench/geobench_npee.json geobench/geobench_apstudy.json

FOLDER gets the packages (`apt-get download`, `pip download`; what is there is not asked for again), in `in` their HTML,
text, Markdown and PDF (.rst as text), and the corpus. Printed: packages with licences, what each filter dropped and of
which packages, time, and what was found of the benchmarks. `--show N` prints beginnings of N documents of each fate.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from email import message_from_string
from pathlib import Path

from k2mini.corpus.shards import read_corpus, read_manifest

DEBIAN = """
debian-edu-doc-ja geographiclib-doc geotranz-doc gpsbabel-doc grass-doc libeccodes-doc libgeos-doc libhdf5-doc
libnetcdff-doc liboasis3-doc mapproxy-doc mapserver-doc nco netcdf-doc postgis-doc postgresql-15-pgrouting-doc
python-escript-doc python-geoalchemy2-doc python-osmnx-doc python-pyorbital-doc python-pyresample-doc python-ulmo-doc
python-xarray-doc python3-pyspectral-doc saga-common survex therion-doc udunits-bin
"""
PYPI = """
argopy==1.5.0 arm-pyart==2.3.0 boule==0.6.0 burnman==2.1.0 cartopy==0.26.0 cf-xarray==0.11.3 climlab==0.9.2 emg3d==0.8.0
empymod==1.10.0 ESMValTool==2.5.0 flopy==3.11.0 geopandas==1.2.0 gplately==1.3.0 harmonica==0.7.0 landlab==2.11.0
lasio==0.25.0 MetPy==0.10.2 mintpy==1.5.3 obspy==1.5.1 oggm==1.6.3 pastas==2.0.0 pooch==1.3.0 pygmt==0.2.1
pyrocko==2026.6.2 pyrolite==0.3.8.post1 rioxarray==0.19.0 satpy==0.60.0 scitools-iris==3.14.1 SimPEG==0.19.0
verde==1.5.0 wradlib==2.9.6 xclim==0.62.0 xesmf==0.3.0
"""
SUFFIXES = (".html", ".htm", ".xhtml", ".md", ".txt", ".pdf", ".rst")
OTHER_LICENCES = {
    "geotranz-doc": "NGA's terms of use",
    "udunits-bin": "UCAR's licence",
    "argopy": "EUPL-1.2",
    "survex": "GPL-2+",
    "liboasis3-doc": "LGPL",
}


def unpack(archive: Path, folder: Path) -> None:
    """The documentation in a package: of .deb what is under usr/share, of an sdist all files of these suffixes."""
    if archive.suffix == ".deb":
        process = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True, check=True)
        (folder / "data.tar").write_bytes(process.stdout)
        archive = folder / "data.tar"
    with tarfile.open(archive) as members:
        for member in members:
            name, path = member.name.removeprefix("./"), None
            if member.isfile() and name.lower().removesuffix(".gz").endswith(SUFFIXES):
                path = folder / re.sub(r"\.rst$", ".rst.txt", name)
            elif member.isfile() and (
                name.endswith("/copyright") or (name.count("/") == 1 and name.endswith("PKG-INFO"))
            ):
                path = folder / Path(name).name
            if path and (content := members.extractfile(member)):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
    (folder / "data.tar").unlink(missing_ok=True)


def licences(folder: Path) -> str:
    """As the package's own copyright file or metadata names them."""
    for path in (folder / "copyright", folder / "PKG-INFO"):
        if path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            found = re.findall(r"^License(?:-Expression)?: *(\S.*)$", text, re.MULTILINE)
            if path.name == "PKG-INFO":
                head = message_from_string(text)
                named = [line.split(" :: ")[-1] for line in head.get_all("Classifier", []) if "License ::" in line]
                found = head.get_all("License-Expression", []) or named or [text[:40] for text in found[:1]]
            return ", ".join(dict.fromkeys(found))
    return ""


def find(folder: Path, name: str) -> Path | None:
    """The downloaded archive of a package."""
    plain = re.sub("[-_.]", "-", name.lower())
    found = (path for path in folder.iterdir() if path.suffix in (".deb", ".gz"))
    return next((path for path in found if re.match(rf"{plain}-+\d", re.sub("[-_.]", "-", path.name.lower()))), None)


def collect(folder: Path) -> list[tuple[str, str, str, int, int]]:
    """(package, version, licences, files, bytes) of each package, after download and unpacking."""
    rows = []
    for package in f"{DEBIAN}{PYPI}".split():
        name, _, version = package.partition("==")
        place, own = folder / ("pypi" if version else "deb"), folder / "in" / name.lower()
        place.mkdir(parents=True, exist_ok=True)
        if find(place, name) is None:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, package]
            fetch = pip if version else ["apt-get", "download", "-q", name]
            subprocess.run(fetch, cwd=place, check=True, stdout=subprocess.DEVNULL)
        archive = find(place, name)
        assert archive is not None
        if not own.exists():
            own.mkdir(parents=True)
            unpack(archive, own)
        files = [path for path in own.rglob("*") if path.is_file() and path.name not in ("copyright", "PKG-INFO")]
        version = version or archive.name.split("_")[1].replace("%3a", ":")
        named = OTHER_LICENCES.get(name) or licences(own) or "not stated"
        rows.append((name, version, named, len(files), sum(path.stat().st_size for path in files)))
    return rows


def package_of(source: str) -> str:
    """The package that a document is from."""
    return source.partition("in/")[2].partition("/")[0]


def show(corpus: Path, number: int) -> None:
    """The beginnings of `number` documents that were kept, and of as many that each filter dropped."""
    fates = defaultdict(list)
    for record in read_corpus(corpus):
        fates["kept"].append((record["source"], "", record["text"]))
    for line in (corpus / "rejected.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        fates[entry["filter"]].append((entry["source"], entry["reason"], entry.get("text", "")))
    for fate, documents in fates.items():
        for source, reason, text in random.Random(0).sample(documents, min(number, len(documents))):
            print(f"--- {fate}: {source} ({reason})\n{text[:1500]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--decontaminate", nargs="+", default=[], metavar="FILE", help="as `k2mini corpus` takes them")
    parser.add_argument("--show", type=int, metavar="N", help="N documents of each fate of the corpus that is there")
    options = parser.parse_args()
    corpus = options.folder / "corpus"
    if options.show:
        return show(corpus, options.show)
    rows = collect(options.folder)
    print("package, version, licences, files, bytes")
    for name, version, named, files, size in rows:
        print(f"{name} {version}; {named}; {files:,}; {size:,}")
    command = [sys.executable, "-m", "k2mini", "corpus", "in", "--out", "corpus", "--workers", options.workers]
    benchmarks = [str(Path(file).absolute()) for file in options.decontaminate]
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    before = used.ru_utime + used.ru_stime
    subprocess.run([*command, *["--decontaminate"] * bool(benchmarks), *benchmarks], cwd=options.folder, check=True)
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu, megabytes = used.ru_utime + used.ru_stime - before, sum(row[4] for row in rows) / 1e6
    manifest = read_manifest(corpus)
    print(f"\n{sum(row[3] for row in rows):,} files, {megabytes:.1f} MB, {seconds:.0f} s, of CPU {cpu:.0f} s")
    entries = [json.loads(line) for line in (corpus / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    packages = defaultdict[str, Counter[str]](Counter)
    for entry in entries:
        packages[entry["filter"]][package_of(entry["source"])] += 1
    for step in manifest["counts"]:
        of = ", ".join(f"{name} {count}" for name, count in packages[step["filter"]].most_common(5))
        print(f"{step['filter']}: {step['in']:,} in, {step['dropped']:,} dropped, {step['changed']:,} changed; {of}")
    kept = Counter(package_of(record["source"]) for record in read_corpus(corpus))
    print(f"kept: {manifest['documents']:,} documents, {manifest['words']:,} words")
    print("kept, by package: " + ", ".join(f"{name} {count}" for name, count in kept.most_common()))
    for entry in entries:
        if entry["filter"].startswith("contamination"):
            print(f"{entry['filter']}: {entry['source']}: {entry['reason']}")


if __name__ == "__main__":
    main()
