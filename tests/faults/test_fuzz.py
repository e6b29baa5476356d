"""Every file that is read, damaged or changed: a command refuses it by name, or its result is right (see mutate.py)."""

from collections import Counter

import pytest

from tests.faults import mutate
from tests.faults.world import said

FOUND = [2558, 5751]  # what the campaign of 10,000 found, and was mended


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files(forks, template, tmp_path, number):
    """0 tracebacks, 0 hangs, 0 crashes, 0 silent: exit 2 with one sentence that names the file, or a right result."""
    counts: dict[str, Counter] = {}
    bad = []
    for case, verdict, end in mutate.campaign([*{*range(number), *FOUND}], forks, template, tmp_path):
        counts.setdefault(case.target, Counter())[verdict] += 1
        if verdict not in mutate.GOOD:
            bad.append(f"{case}\n    {verdict}: {said(end)}")
    for target, found in sorted(counts.items()):
        print(f"{target:45}", ", ".join(f"{count} {verdict}" for verdict, count in found.most_common()))
    assert not bad, f"{len(bad)} are bad; python -m tests.faults.mutate SEED shows one\n" + "\n".join(bad)
