"""Every tool says how it is used."""

import runpy
import sys

import pytest

from tests.conftest import ROOT

PARTS = {"gpu_models.py", "paper_formats.py"}  # imported by tools, nothing to run
TOOLS = sorted({path.name for path in (ROOT / "tools").glob("*.py")} - PARTS)


@pytest.mark.parametrize("name", TOOLS)
def test_help(name, monkeypatch, capsys):
    path = ROOT / "tools" / name
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(path.parent)  # as Python does for a script; some take parts of others
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    assert "usage: " in capsys.readouterr().out
