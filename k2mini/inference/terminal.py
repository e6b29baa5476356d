"""A conversation in a terminal, its answers printed as they are made."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from select import select
from typing import TextIO

from k2mini.data.chats import encode_chat, stop_ids
from k2mini.data.prompts import AnyTemplate, ChatTemplate, encode_prompt, room
from k2mini.data.tokenizer import Tokenizer
from k2mini.inference.decoding import Completion, Decoding, Step, TextStream
from k2mini.inference.request import End, Prompt, Request
from k2mini.inference.scheduler import Scheduler
from k2mini.nn.llama import Llama

RESERVE = 1024  # tokens of a conversation to make room for at once
QUOTES = '"""'
HELP = f"""\
/help          this
/reset         forget the conversation
/system TEXT   begin anew with TEXT before it; without TEXT, with nothing
/exit          end, as Ctrl-D does; Ctrl-C stops an answer
{QUOTES}            begins and ends a question of several lines, or with a / in front; a pasted paragraph needs none"""


class Conversation:
    """A chat: each turn is the template's prompt, the answer and EOS, after all turns before it.

    A chat template is given all messages each time: it may change what it wrote of earlier ones.
    What stays the same is not computed again. Turn i (from 0) draws with decoding.seed + i.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, template: AnyTemplate, decoding: Decoding) -> None:
        self.model, self.tokenizer, self.template, self.decoding = model, tokenizer, template, decoding
        self.system = ""  # stands before the first turn
        self.interrupted = False  # the last answer was cut by Ctrl-C
        context = model.config.max_seq_len
        self._scheduler = Scheduler(
            model,
            slots=1,
            capacity=context,
            reserve=min(context, RESERVE),
            vocab_size=tokenizer.vocab_size,
            keep_answers=True,
        )
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.history: list[int] = []  # every token so far
        self.messages = [{"role": "system", "content": self.system}] * bool(self.system)  # and all that was said

    def turn(self, prompt: str, out: TextIO) -> Completion:
        """Answer one prompt, streaming to `out` (see `extended` and `answer`)."""
        return self.answer(self.extended(prompt), out)

    def extended(self, prompt: str) -> list[int]:
        """The tokens of all turns and of one more prompt. Raises ValueError where it is empty or too long."""
        self._asked = {"role": "user", "content": prompt}
        if isinstance(self.template, ChatTemplate):
            history = encode_chat(self.tokenizer, self.template, [*self.messages, self._asked])
        else:
            system = "" if self.history else self.system
            history = self.history + encode_prompt(self.tokenizer, self.template, prompt, system=system)
        self.room(history)
        return history

    def room(self, history: list[int]) -> int:
        """How many tokens may follow."""
        return room(len(history), self.decoding.max_new_tokens, self.model.config.max_seq_len)

    def answer(self, history: list[int], out: TextIO) -> Completion:
        """Answer what `extended` gave. Ctrl-C ends the answer; what was printed of it stays in the history.

        Raises ValueError where the model's logits are not finite.
        """
        completion, self.interrupted = Completion(), False
        stream, ends = TextStream(self.tokenizer, self.decoding.stop), list[End]()

        def deliver(event: Prompt | Step | End) -> bool:
            if isinstance(event, End):
                ends.append(event)
            elif isinstance(event, Step):
                completion.add(event)
                return stream.write(event.token, out)
            return False

        request = Request(history, self.decoding, stop_ids(self.tokenizer, self.template), deliver)
        try:
            self._scheduler.admit(request)
            while self._scheduler.step():
                pass
            out.write(stream.flush())
            completion.finish = ends[0].reason
        except KeyboardInterrupt:
            self._scheduler.cancel([request])
            completion.finish, self.interrupted = "stop", True
        if completion.finish == "error":
            raise ValueError(ends[0].error)
        self.history = [*history, *completion.tokens, self.tokenizer.eos_id]
        self.messages += [self._asked, {"role": "assistant", "content": stream.text}]
        self.decoding = replace(self.decoding, seed=self.decoding.seed + 1)
        return completion


def chat(conversation: Conversation) -> None:
    """Read prompts from standard input and answer them, until end of file or /exit."""
    with suppress(ImportError):
        import readline  # line editing, where the platform has it

        readline.parse_and_bind("set enable-bracketed-paste on")
    print("/help for help", file=sys.stderr)
    while True:
        try:
            text, quoted = _read()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        except ValueError as error:
            if not sys.stdin.isatty():
                raise
            print(f"\nk2mini: {error}", file=sys.stderr)
            continue
        command = "" if quoted else next(iter(text.split(maxsplit=1)), "")
        if command == "/exit":
            return
        if command == "/help":
            print(HELP, file=sys.stderr)
        elif command == "/reset":
            conversation.reset()
            print("(forgotten)", file=sys.stderr)
        elif command == "/system":
            conversation.system = text.removeprefix("/system").strip()
            conversation.reset()
            print("(begun anew)", file=sys.stderr)
        elif command.startswith("/"):
            print(f"k2mini: there is no {command}; /help says what there is", file=sys.stderr)
        elif text:
            _answer(conversation, text)


def _read() -> tuple[str, bool]:
    """What is typed or pasted next, and whether it stood in three quotes. Raises ValueError where these have no end."""
    live = sys.stdin.isatty()
    # What was typed while an answer came is a question a line. Lines that come at once later were pasted.
    ahead = live and select([sys.stdin], [], [], 0)[0]
    text = input("> " if live else "")
    with suppress(EOFError):
        while live and not ahead and not text.startswith("/") and select([sys.stdin], [], [], 0.05)[0]:
            text += "\n" + input()
    text = text.strip()
    if not text.startswith(QUOTES):
        return text, False
    text = text.removeprefix(QUOTES)
    try:
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + input("... " if live else "")
    except EOFError:
        raise ValueError(f"a question that begins with {QUOTES} must end with {QUOTES}") from None
    return text.rstrip().removesuffix(QUOTES).strip(), True


def _answer(conversation: Conversation, text: str) -> None:
    """Print an answer, and what is to be known of its end."""
    try:
        history = conversation.extended(text)
    except ValueError as error:
        print(f"k2mini: {error}{'; /reset starts anew' if conversation.history else ''}", file=sys.stderr)
        return
    completion = conversation.answer(history, sys.stdout)
    print(" [stopped]" if conversation.interrupted else "", flush=True)
    if completion.finish == "length":
        cut = len(completion.tokens) < conversation.decoding.max_new_tokens
        why = "the model's context ends; /reset starts anew" if cut else "--max-new-tokens says so"
        print(f"k2mini: stopped after {len(completion.tokens)} tokens: {why}", file=sys.stderr)
