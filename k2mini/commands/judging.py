"""The command `judge`."""

from __future__ import annotations

import argparse


def judge_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `judge`."""
    parser.set_defaults(run=run_judge)


def run_judge(options: argparse.Namespace) -> None:
    """Not written yet."""
    raise ValueError("judge is not written yet")
