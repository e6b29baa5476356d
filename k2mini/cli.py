"""The command line: the list of commands, and how a command ends.

Each command declares its arguments in its file of `commands/`, once it is chosen: `k2mini --help` needs no torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from k2mini.commands import (
    audit,
    comparing,
    corpus,
    demo,
    doctor,
    evaluation,
    following,
    inference,
    judging,
    plan,
    rating,
    reproducing,
    scoring,
    serving,
    signals,
    training,
    weights,
)
from k2mini.commands.common import ANSWER, COMPUTE, CONFIG, DEBUG, MODEL, TARGET, Print, version
from k2mini.errors import ESCAPE, STOPPED, end


class CommandParser(argparse.ArgumentParser):
    """The parser of one command, which calls `declare` to add the command's arguments before it reads the first."""

    def __init__(self, *, declare: Callable[[argparse.ArgumentParser], None] | None = None, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)  # `--length 9` is not `--length-penalty 9`
        self._declare = declare

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        declare, self._declare = self._declare, None
        if declare is not None:
            declare(self)
        words = [word.split("=")[0] for word in args or ()]
        for name, option in self._option_string_actions.items():
            if words.count(name) > 1 and type(option) is argparse._StoreAction:  # lists are `extend`
                self.error(f"{name} is given twice")
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said with this command's own usage
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. What it returns has `run`, the function of `commands/` that does the work."""
    about, epilog = "The K2 geoscience LLM pipeline in plain PyTorch.", "k2mini COMMAND --help explains a command."
    parser = argparse.ArgumentParser("k2mini", description=about, epilog=epilog)
    parser.add_argument("--version", action=Print, nargs=0, const=version, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)

    def add(name: str, declare: Callable[[argparse.ArgumentParser], None], what: str, *parents: Any) -> None:
        commands.add_parser(name, declare=declare, help=what, parents=parents)

    add("demo", demo.demo_arguments, "the whole pipeline in miniature, in minutes: start here", DEBUG)
    add("doctor", doctor.doctor_arguments, "whether this machine computes what it should, in under a minute", DEBUG)
    add("generate", inference.generate_arguments, "answer a prompt, or a list", MODEL, ANSWER)
    add("chat", inference.chat_arguments, "a conversation in the terminal", MODEL, ANSWER)
    add("serve", serving.serve_arguments, "a page and OpenAI's API, for a model and adapters (extra: serve)", ANSWER)
    add("prepare", training.prepare_arguments, "documents into a corpus for pretrain", TARGET)
    add("corpus", corpus.corpus_arguments, "papers and documents into clean text (extra: corpus)", DEBUG)
    add("signals", signals.signals_arguments, "instruction data out of what a corpus and tables state", DEBUG)
    add("config", training.config_arguments, "the keys of a run's configuration, or a file with all of them", DEBUG)
    add("pretrain", training.pretrain_arguments, "further pretraining", CONFIG, COMPUTE)
    add("finetune", training.finetune_arguments, "instruction tuning with LoRA", CONFIG, COMPUTE)
    add("preview", training.preview_arguments, "what a run would be fed, token by token", CONFIG, DEBUG)
    add("plan", plan.plan_arguments, "memory, communication and length of a run, before it is run", CONFIG, DEBUG)
    add("export", training.export_arguments, "a checkpoint as a Hugging Face directory", TARGET)
    add("plot", training.plot_arguments, "loss curves of runs as a picture (extra: plot)", DEBUG)
    add("report", following.report_arguments, "what runs did, as text or as one page: curves, settings, answers", DEBUG)
    add("merge", weights.merge_arguments, "base + adapter as a Hugging Face directory", TARGET)
    add("delta", weights.delta_arguments, "publish a tuned model as its difference from the base")
    add("convert", weights.convert_arguments, "a model in another format, dtype or shard size", TARGET)
    add("verify", weights.verify_arguments, "compare a directory that k2mini wrote with its manifest", DEBUG)
    add("info", weights.info_arguments, "what a model or adapter is, from its headers alone", DEBUG)
    add("eval", evaluation.eval_arguments, "score a model on GeoBench, your own questions or texts", MODEL, COMPUTE)
    add("score", scoring.score_arguments, "log-probabilities of a text, token by token", MODEL, COMPUTE)
    add("judge", judging.judge_arguments, "answers of runs of eval, judged by another model", COMPUTE)
    add("rate", rating.rate_arguments, "answers of runs of eval, rated by people: a page, and what it gave")
    add("compare", comparing.compare_arguments, "runs of eval side by side, with paired tests", DEBUG)
    add("reproduce", reproducing.reproduce_arguments, "K2's published figures beside your own, in one command", COMPUTE)
    add("audit", audit.audit_arguments, "look into a model: lens, attention, attribute, patch, diff")
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0; 2 for what the user can mend; 128 + the number of a signal, SIGPIPE too."""
    _open_streams()
    options = argparse.Namespace(debug=False)
    try:
        options = build_parser().parse_args(arguments)
        _log_to_stderr()
        options.run(options)
        sys.stdout.flush()
        status: int | None = 0
    except (Exception, KeyboardInterrupt) as error:
        if options.debug and not isinstance(error, STOPPED):
            raise
        if not (_is_main() or isinstance(error, STOPPED)):
            with suppress(*STOPPED):  # a signal now; what is wrong is said all the same
                time.sleep(5)  # most errors are all ranks': rank 0 says it, and torchrun ends the others
        if (status := end(error)) is None:
            raise
    sys.exit(status)


def _open_streams() -> None:
    """Make a standard stream that is closed the null device, and let none fail on a character."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would take its number, and get what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors=ESCAPE if number else "surrogateescape")


def _is_main() -> bool:
    """`World.is_main`, known before the ranks that torchrun started have joined."""
    return os.environ.get("RANK", "0") == "0"


def _log_to_stderr() -> None:
    package, handler = logging.getLogger("k2mini"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("k2mini: %(message)s"))
    package.handlers = [handler]
    package.setLevel(logging.INFO if _is_main() else logging.ERROR)  # of the ranks that torchrun starts, one speaks
