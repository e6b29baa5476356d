"""Conversations: chat templates written here, or a model's own, and conversations as token ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from k2mini.data.prompts import TEMPLATES, AnyTemplate, ChatTemplate, Message, encode_prompt

if TYPE_CHECKING:  # the command line lists the templates
    from k2mini.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

OWN = "own"  # the name of the template that a model's directory has
ROLES = ("system", "user", "assistant", "tool")


def _split(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """The system message that a conversation begins with, '' without one, and its other messages."""
    first = bool(messages) and messages[0]["role"] == "system"
    return messages[0]["content"] if first else "", messages[first:]


def in_turns(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """As `_split`. Raises ValueError unless user and assistant take turns after it."""
    system, turns = _split(messages)
    for place, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[place % 2]:
            said = f"messages[{place + len(messages) - len(turns)}] is the {message['role']}'s"
            raise ValueError(f"{said}; after at most one system message, user and assistant take turns")
    return system, turns


@dataclass(frozen=True)
class Layout:
    """A chat template as data: patterns with {text}, {role}, {bos} and {eos}.

    Args:
        user, assistant: a turn.
        answer: what opens the assistant's next turn, where its pattern's beginning does not.
        begin: what a conversation begins with.
        system: a system message as a turn of its own; '': it is joined to the first user's text.
        joined: how it is, a pattern with {system} and {text}.
        default: the system message of a conversation without one.
        strip: whether texts lose the white space at their ends.
        marks: the special tokens that the patterns write out.
    """

    user: str
    assistant: str
    answer: str = ""
    begin: str = "{bos}"
    system: str = ""
    joined: str = "{system}\n\n{text}"
    default: str = ""
    strip: bool = False
    marks: tuple[str, ...] = ()

    def write(self, messages: Sequence[Message], generation: bool, **tokens: str) -> str:
        """The text of a conversation. Raises ValueError where roles come in an order that the template has not."""
        system, turns = _split(messages) if self.user == self.assistant else in_turns(messages)
        system, strip = system or self.default, str.strip if self.strip else str
        parts = [self.begin.format(**tokens)]
        if self.system and system:
            parts.append(self.system.format(text=strip(system), role="system", **tokens))
        for place, message in enumerate(turns):
            text = message["content"]
            if not place and system and not self.system:
                text = self.joined.format(system=system, text=text)
            pattern = self.assistant if message["role"] == "assistant" else self.user
            parts.append(pattern.format(text=strip(text), role=message["role"], **tokens))
        return "".join(parts) + self.answer * generation


_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"
_IM = "<|im_start|>{role}\n{text}<|im_end|>\n"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# As published: by FastChat (conversation.py, vicuna_v1.1), and in the tokenizer_config.json of Llama-2-7b-chat-hf,
# Meta-Llama-3-8B-Instruct and Mistral-7B-Instruct-v0.2; ChatML as OpenAI described it.
CHAT_TEMPLATES = {
    "vicuna": Layout("USER: {text} ", "ASSISTANT: {text}{eos}", "ASSISTANT:", system="{text} ", default=_VICUNA),
    "llama2": Layout(
        "{bos}[INST] {text} [/INST]",
        " {text} {eos}",
        begin="",
        joined="<<SYS>>\n{system}\n<</SYS>>\n\n{text}",
        strip=True,
    ),
    "llama3": Layout(
        _HEADER,
        _HEADER,
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        system=_HEADER,
        strip=True,
        marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "chatml": Layout(_IM, _IM, "<|im_start|>assistant\n", begin="", system=_IM, marks=("<|im_start|>", "<|im_end|>")),
    "mistral": Layout(" [INST] {text} [/INST]", " {text}{eos}"),
}


def open_template(name: str | None, folder: Path, tokenizer: Tokenizer) -> AnyTemplate:
    """The template of that name, for a model in a folder and its tokenizer.

    Args:
        name: of TEMPLATES or CHAT_TEMPLATES; 'own': the model's; None: the model's where it has one, else 'alpaca'.

    Raises ValueError where there is no such template, it can't be read, or its special tokens are not the tokenizer's.
    """
    if name is None:
        name = "alpaca"
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name not in CHAT_TEMPLATES:
        there = ", ".join([*TEMPLATES, *CHAT_TEMPLATES, OWN])
        raise ValueError(f"there is no template {name!r}; there are {there} (the model's)")
    layout, known = CHAT_TEMPLATES[name], tokenizer.special_tokens
    if lacking := [mark for mark in layout.marks if mark not in known]:
        said = f"template {name} is written with {', '.join(lacking)}, which {tokenizer.path} has no tokens for"
        raise ValueError(f"{said}; vicuna and llama2 are written in plain text")
    tokens = {
        "bos": "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
        "eos": tokenizer.piece(tokenizer.eos_id),
    }

    def write(messages: Sequence[Message], generation: bool) -> str:
        return layout.write(messages, generation, **tokens)

    return ChatTemplate(name, write, frozenset(known), layout.marks[-1] if layout.marks else tokens["eos"])


def stop_ids(tokenizer: Tokenizer, template: AnyTemplate) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, and the one that ends the assistant's turn in the template."""
    end = [tokenizer.special_tokens[template.end]] if isinstance(template, ChatTemplate) and template.end else []
    return tuple(dict.fromkeys([*tokenizer.stop_ids, *end]))


def encode_chat(
    tokenizer: Tokenizer, template: AnyTemplate, messages: Sequence[Message], *, generation: bool = True
) -> list[int]:
    """The token ids of a conversation; `generation`: up to where the assistant's answer begins.

    A template of instructions has no conversations, so turns are joined: each user's as a prompt, with BOS, each
    assistant's as what follows it, with EOS.

    Raises ValueError where the template refuses the messages.
    """
    if isinstance(template, ChatTemplate):
        text = template.render(messages, generation=generation)
        return tokenizer.encode(text, bos=template.bos, eos=False, special=template.special)
    system, turns = in_turns(messages)
    ids: list[int] = []
    for message in turns:
        if message["role"] == "assistant":
            ids += [*tokenizer.encode_more(message["content"]), tokenizer.eos_id]
        else:
            ids += encode_prompt(tokenizer, template, message["content"], system="" if ids else system)
    return ids
