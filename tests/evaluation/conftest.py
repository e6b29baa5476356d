"""What several tests of evaluation ask."""

import json

import pytest

ROCKS = ["granite", "basalt", "quartz", "rock", "mineral", "crust", "mantle", "volcano", "plates", "erodes"]


@pytest.fixture
def rocks(tmp_path):
    """A user's own questions: three options, of one token and of several."""
    path = tmp_path / "rocks.jsonl"
    rows = [
        {"question": f"{a} is?", "choices": [b, f"{b} {a}", "crust"], "answer": 1}
        for a, b in zip(ROCKS, ROCKS[3:], strict=False)
        if b != "crust"
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results(folder):
    """The lines of a run's results.jsonl."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
