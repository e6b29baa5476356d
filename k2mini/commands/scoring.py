"""The command `score`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from k2mini.commands.common import LOADED
from k2mini.data.prompts import utf8

log = logging.getLogger("k2mini.commands")


def score_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `score`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=utf8, metavar="TEXT", help="what to score; '-' reads standard input")
    source.add_argument("--input", type=Path, metavar="FILE", help="score a file's text, line ends and all")
    parser.add_argument("--context", type=utf8, default="", metavar="TEXT", help="stands before it and is not scored")
    parser.add_argument("--json", action="store_true", help="print it as JSON, where rank 0 is the likeliest")
    parser.set_defaults(run=run_score)


def run_score(options: argparse.Namespace) -> None:
    """Each token of a text with its log-probability and rank, then what they come to."""
    from k2mini.audit.reports import visible
    from k2mini.build import open_model
    from k2mini.data.documents import read_user_text
    from k2mini.evaluation.perplexity import score_text

    text = read_user_text(options.input) if options.input is not None else options.text
    text = sys.stdin.read().removeprefix("\ufeff") if options.text == "-" else text
    if not text:
        raise ValueError(f"{options.input or '--text'}: there is no text to score")
    if options.compile:
        log.warning("--compile: no effect, since nothing is decoded")
    wanted = {name: getattr(options, name) for name in LOADED}
    model, directory = open_model(options.model, options.device, options.threads, **wanted)
    tokenizer = directory.require_tokenizer()
    found, scored = score_text(model, tokenizer, text, options.context)
    total = sum(logprob for _, logprob, _ in scored)
    if options.json:
        tokens = [
            {"token": visible(tokenizer, token), "id": token, "logprob": logprob, "rank": rank}
            for token, logprob, rank in scored
        ]
        values = {"model": options.model, **asdict(found), "total": total, "mean": total / len(scored)}
        print(json.dumps({**values, "logprobs": tokens}, ensure_ascii=False))
        return
    print(f"{'log p':>9}  {'rank':>6}  {'id':>6}  token")
    for token, logprob, rank in scored:
        print(f"{logprob:>9.4f}  {rank + 1:>6}  {token:>6}  {visible(tokenizer, token)}")
    sums = f"total {total:.4f} nats over {len(scored):,} tokens, mean {total / len(scored):.4f}"
    print(f"{sums}, perplexity {found.perplexity:.2f}, {found.bits_per_byte:.4f} bits a byte")
