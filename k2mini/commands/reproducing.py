"""The command `reproduce`."""

from __future__ import annotations

import argparse


def reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `reproduce`."""
    parser.set_defaults(run=run_reproduce)


def run_reproduce(options: argparse.Namespace) -> None:
    """Not written yet."""
    raise ValueError("reproduce is not written yet")
