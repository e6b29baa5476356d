"""Answers in a terminal: streamed as they are made, and a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TextIO

import torch

from k2mini.data.prompts import Template
from k2mini.data.tokenizer import Tokenizer
from k2mini.inference.generate import Completion, Step, add_step, check_length, extend, prefill, steps
from k2mini.inference.sampling import Sampling
from k2mini.inference.text import TextStream
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.llama import Llama


def encode_prompt(tokenizer: Tokenizer, template: Template, prompt: str) -> list[int]:
    """The token ids, with BOS, of an instruction in its template. Raises ValueError where it is empty."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return tokenizer.encode(template.prompt(prompt), bos=True, eos=False)


def collect(
    tokens: Iterable[list[Step | None]], completion: Completion, text: TextStream, stop_ids: Sequence[int], out: TextIO
) -> str:
    """Print one row's answer to `out` as it is made, filling `completion` as it goes. Returns its text."""
    for (step,) in tokens:
        assert step is not None
        add_step(completion, step, stop_ids)
        if completion.finish:
            break
        out.write(text.push(step.token))
        out.flush()
        if text.stopped:
            completion.finish = "stop"
            break
    completion.finish = completion.finish or "length"
    out.write(text.flush())
    return text.text


@torch.inference_mode()
def answer(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
    seed: int,
    max_new_tokens: int,
    out: TextIO,
    stop: Sequence[str] = (),
) -> tuple[str, Completion]:
    """Continue one prompt until EOS or one of the strings `stop`, streaming the text to `out`.

    Raises ValueError where prompt and answer do not fit the model's context.
    """
    check_length(len(prompt), max_new_tokens, model.config.max_seq_len)
    cache, logits = prefill(model, [prompt], capacity=len(prompt) + max_new_tokens)
    completion = Completion()
    tokens = steps(
        model,
        logits,
        cache,
        [prompt],
        sampling=sampling,
        seeds=[seed],
        stop_ids=[tokenizer.eos_id],
        max_new_tokens=max_new_tokens,
        vocab_size=tokenizer.vocab_size,
    )
    return collect(tokens, completion, TextStream(tokenizer, stop), [tokenizer.eos_id], out), completion


class Conversation:
    """A chat: each turn is the template's prompt, the answer and EOS, after all turns before it.

    What earlier turns left in the KV cache is not computed again.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        template: Template,
        *,
        sampling: Sampling,
        seed: int,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.sampling, self.seed, self.max_new_tokens, self.stop = sampling, seed, max_new_tokens, stop
        self.system = ""  # stands before the first turn
        self.interrupted = False  # the last answer was cut by Ctrl-C
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.history: list[int] = []  # every token so far
        self.cache = KVCache(
            self.model.config,
            1,
            dtype=self.model.dtype,
            device=self.model.device,
            fixed=self.model.model.decode_block is not None,
        )

    @torch.inference_mode()
    def turn(self, prompt: str, out: TextIO) -> Completion:
        """Answer one prompt, streaming to `out`. Ctrl-C ends the answer; what was said of it stays in the history.

        Raises ValueError where the prompt is empty or the context is full; the history is as before then.
        """
        if self.history or not self.system:
            history = self.history + encode_prompt(self.tokenizer, self.template, prompt)
        else:
            text = self.system + "\n\n" + self.template.prompt(prompt)
            history = self.tokenizer.encode(text, bos=True, eos=False)
        check_length(len(history), self.max_new_tokens, self.model.config.max_seq_len)
        known = self.cache.length
        completion, self.interrupted = Completion(), False
        try:
            hidden = extend(self.model, [history[known:]], self.cache)
            decoded = steps(
                self.model,
                self.model.logits(hidden),
                self.cache,
                [history],
                sampling=self.sampling,
                seeds=[self.seed],
                stop_ids=[self.tokenizer.eos_id],
                max_new_tokens=self.max_new_tokens,
                vocab_size=self.tokenizer.vocab_size,
            )
            collect(decoded, completion, TextStream(self.tokenizer, self.stop), [self.tokenizer.eos_id], out)
        except KeyboardInterrupt:
            completion.finish, self.interrupted = "stop", True
            # The step that was cut may have reached some layers only.
            self.cache.truncate(known)
        self.history = [*history, *completion.tokens, self.tokenizer.eos_id]
        self.seed += 1
        return completion


def chat(conversation: Conversation) -> None:
    """Read prompts from standard input and answer them, until end of file or /exit."""
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing, where the platform has it)
    print(
        "/reset forgets the conversation, /system TEXT begins anew with TEXT before it, /exit or Ctrl-D ends it, "
        "Ctrl-C stops an answer.",
        file=sys.stderr,
    )
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        command = line.strip()
        if command == "/exit":
            return
        if command == "/reset":
            conversation.reset()
            print("(forgotten)", file=sys.stderr)
        elif command.split(maxsplit=1)[:1] == ["/system"]:
            conversation.system = command.removeprefix("/system").strip()
            conversation.reset()
            print("(begun anew)", file=sys.stderr)
        elif command:
            try:
                conversation.turn(command, sys.stdout)
            except ValueError as error:
                print(f"k2mini: {error}; /reset starts anew", file=sys.stderr)
                continue
            print(" [stopped]" if conversation.interrupted else "", flush=True)
