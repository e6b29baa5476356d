"""What the documents say stands: figures in tools/results/, files where they are said to be, nothing from elsewhere."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

RESULTS = ROOT / "tools" / "results"
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / ".github").glob("*.md")), *sorted((ROOT / "tools").rglob("*.md"))]
# `<!-- NAME.txt: figure, figure -->` after what quotes them: the figures stand there, and in tools/results/NAME.txt.
QUOTED = re.compile(r"<!-- ([\w.]+\.txt): (.+?) -->")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
# Files and folders of the repository, as prose names them.
NAMED = re.compile(r"(?<![\w/.])(?:k2mini|tests|tools|configs|\.github|\.ci)/[\w./]*[\w/]")


def quotes():
    """(file, figure, the text before the comment, back to the heading or to other comments)."""
    for section in re.split(r"^## ", README.read_text(encoding="utf-8"), flags=re.MULTILINE):
        end, before = 0, ""
        for found in QUOTED.finditer(section):
            # Comments that follow one another speak of the same text.
            before = section[end : found.start()] if section[end : found.start()].strip() else before
            end = found.end()
            for figure in found[2].split(", "):
                yield found[1], figure, before


def stands(figure, text):
    """As a number of its own, not as a part of another."""
    return re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d]|[.,]\d)", text) is not None


def test_readme_takes_five_minutes():
    assert len(README.read_text(encoding="utf-8").split()) <= 2800


def test_figures_stand_in_the_results():
    found = list(quotes())
    assert len(found) > 10
    for name, figure, before in found:
        assert stands(figure, before), f"README.md: {figure!r} of {name} is not in the text before it"
        path = RESULTS / name
        assert path.is_file(), f"README.md quotes tools/results/{name}, which is not there (tools/record.py makes it)"
        assert stands(figure, path.read_text(encoding="utf-8")), f"tools/results/{name} has no {figure!r}"


def test_no_figure_is_missing():
    assert "{{" not in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        assert "://" in target or (path.parent / target).exists(), f"{path} links to {target}"
    if path.name in ("CHANGELOG.md", "LOG.md"):  # these speak of what was
        return
    for name in NAMED.findall(FENCE.sub("", text)):
        assert (ROOT / name).exists(), f"{path} names {name}"


def test_nothing_outside_the_repository_is_cited():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    elsewhere = re.compile(r"(?<![\w.])/(?:work|root)\b|DESIGN(?:\.md)?\b")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path == Path(__file__) or not path.is_file() or path.suffix in (".png", ".model", ".safetensors"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not elsewhere.search(line), f"{name}, line {number}: {line.strip()}"
