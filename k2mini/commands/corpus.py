"""The command `corpus`: papers and documents into clean text."""

from __future__ import annotations

import argparse


def corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `k2mini corpus`."""
