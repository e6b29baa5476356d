"""Answers in a terminal: streamed as they are made, and a conversation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TextIO

import torch

from k2mini.inference.generate import Completion, check_length, prefill, steps
from k2mini.inference.sampling import Sampling
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.llama import Llama
from k2mini.text.prompts import Template
from k2mini.text.tokenizer import Tokenizer


def encode_prompt(tokenizer: Tokenizer, template: Template, prompt: str) -> list[int]:
    """The token ids, with BOS, of an instruction in its template. Raises ValueError where it is empty."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return tokenizer.encode(template.prompt(prompt), bos=True, eos=False)


def collect(tokens: Iterable[list[int | None]], completion: Completion, tokenizer: Tokenizer, out: TextIO) -> str:
    """Print one row's answer to `out` as it is made, filling `completion` as it goes. Returns its text."""
    stream, text = tokenizer.stream(), ""
    for (token,) in tokens:
        assert token is not None
        if token == tokenizer.eos_id:
            completion.finish = "eos"
            break
        completion.tokens.append(token)
        piece = stream.push(token)
        out.write(piece)
        out.flush()
        text += piece
    else:
        completion.finish = "length"
    rest = stream.flush()
    out.write(rest)
    return text + rest


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
) -> tuple[str, Completion]:
    """Continue one prompt until EOS, streaming the text to `out`.

    Raises ValueError where prompt and answer do not fit the model's context.
    """
    check_length(len(prompt), max_new_tokens, model.config.max_seq_len)
    cache = KVCache(model.config, 1, dtype=model.dtype, device=model.device, capacity=len(prompt) + max_new_tokens)
    completion = Completion()
    tokens = steps(
        model,
        prefill(model, [prompt], cache),
        cache,
        sampling=sampling,
        seeds=[seed],
        stop_ids=[tokenizer.eos_id],
        max_new_tokens=max_new_tokens,
        vocab_size=tokenizer.vocab_size,
    )
    return collect(tokens, completion, tokenizer, out), completion


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
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.sampling, self.seed, self.max_new_tokens = sampling, seed, max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.history: list[int] = []  # every token so far
        self.cache = KVCache(self.model.config, 1, dtype=self.model.dtype, device=self.model.device)

    @torch.inference_mode()
    def turn(self, prompt: str, out: TextIO) -> Completion:
        """Answer one prompt, streaming to `out`. Ctrl-C ends the answer; what was said of it stays in the history.

        Raises ValueError where the prompt is empty or the context is full; the history is as before then.
        """
        history = self.history + encode_prompt(self.tokenizer, self.template, prompt)
        check_length(len(history), self.max_new_tokens, self.model.config.max_seq_len)
        known = self.cache.length
        completion = Completion(finish="stop")
        try:
            tokens = torch.tensor([history[known:]], device=self.model.device)
            hidden = self.model.model(tokens, cache=self.cache)
            decoded = steps(
                self.model,
                self.model.logits(hidden[:, -1]),
                self.cache,
                sampling=self.sampling,
                seeds=[self.seed],
                stop_ids=[self.tokenizer.eos_id],
                max_new_tokens=self.max_new_tokens,
                vocab_size=self.tokenizer.vocab_size,
            )
            collect(decoded, completion, self.tokenizer, out)
        except KeyboardInterrupt:
            # The step that was cut may have reached some layers only.
            self.cache.truncate(known)
        self.history = [*history, *completion.tokens, self.tokenizer.eos_id]
        self.seed += 1
        return completion


def chat(conversation: Conversation) -> None:
    """Read prompts from standard input and answer them, until end of file or /exit."""
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing, where the platform has it)
    print("/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.", file=sys.stderr)
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
        elif command:
            try:
                completion = conversation.turn(command, sys.stdout)
            except ValueError as error:
                print(f"k2mini: {error}; /reset starts anew", file=sys.stderr)
                continue
            print(" [stopped]" if completion.finish == "stop" else "", flush=True)
