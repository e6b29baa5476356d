"""The command `signals`: instruction data out of what a corpus and tables state."""

from __future__ import annotations

import argparse


def signals_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `k2mini signals`."""
