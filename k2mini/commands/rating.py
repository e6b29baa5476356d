"""The command `rate`."""

from __future__ import annotations

import argparse


def rate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rate`."""
    parser.set_defaults(run=run_rate)


def run_rate(options: argparse.Namespace) -> None:
    """Not written yet."""
    raise ValueError("rate is not written yet")
