"""Conversations: chat templates written here, or a model's own, and conversations as token ids."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2mini.data.prompts import ANSWER, TEMPLATES, AnyTemplate, ChatTemplate, Message, encode_prompt
from k2mini.errors import short

if TYPE_CHECKING:  # the command line lists the templates
    from k2mini.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

OWN = "own"  # the name of the template that a model's directory has
SPECIAL = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # as templates name them
MARK = re.compile(r"[^\w\s▁]+\w.*[^\w\s▁]")  # a token that is markup: '<|im_end|>', '[INST]'
ROLES = ("system", "user", "assistant", "tool")


def in_turns(messages: Sequence[Message], *, any_order: bool = False) -> tuple[str, Sequence[Message]]:
    """The system message that a conversation begins with, '' without one, and its other messages.

    Raises ValueError unless user and assistant take turns in these, or `any_order`.
    """
    skip = sum(message["role"] == "system" for message in messages[:1])
    for place, message in enumerate(messages[skip:]):
        if not any_order and message["role"] != ("user", "assistant")[place % 2]:
            said = f"messages[{place + skip}] is the {message['role']}'s"
            raise ValueError(f"{said}; after at most one system message, user and assistant take turns")
        if message.get("tool_calls"):
            raise ValueError(f"messages[{place + skip}] has tool_calls, which only a model's own template can write")
    return messages[0]["content"] if skip else "", messages[skip:]


@dataclass(frozen=True)
class Layout:
    """A chat template as data: patterns with {text}, {role}, {system}, {bos} and {eos}.

    Args:
        turn: a message of any role, in any order; where there is a pattern for the assistant's, the user's.
        assistant: the assistant's, in turns with the user's after at most one system message.
        begin: what a conversation begins with.
        first: the first user's text, where there is a system message that `begin` has not.
        system: the system message of a conversation without one.
        strip: whether texts lose the white space at their ends.
    """

    turn: str
    assistant: str = ""
    begin: str = "{bos}"
    first: str = "{system}\n\n{text}"
    system: str = ""
    strip: bool = False

    def write(self, messages: Sequence[Message], generation: bool, **tokens: str) -> str:
        """The text of a conversation. Raises ValueError where roles come in an order that the template has not."""
        system, turns = in_turns(messages, any_order=not self.assistant)
        system, turns = (system or self.system, turns) if self.assistant else ("", messages)
        out = self.begin.format(system=system, **tokens)
        for place, message in enumerate(turns):
            text, pattern = message["content"], self.turn
            if system and place == 0:
                text = self.first.format(system=system, text=text)
            elif message["role"] == "assistant":
                pattern = self.assistant or self.turn
            out += pattern.format(text=text.strip() if self.strip else text, role=message["role"], **tokens)
        opening = (self.assistant or self.turn).partition("{text}")[0].format(role="assistant")
        return out + opening.removesuffix(" ") * generation


_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_SYSTEM = "<<SYS>>\n{system}\n<</SYS>>\n\n{text}"

# As published: by FastChat (conversation.py, vicuna_v1.1), and in the tokenizer_config.json of Llama-2-7b-chat-hf,
# Meta-Llama-3-8B-Instruct and Mistral-7B-Instruct-v0.2; ChatML as OpenAI described it.
CHAT_TEMPLATES = {
    "vicuna": Layout("USER: {text} ", "ASSISTANT: {text}{eos}", "{bos}{system} ", "{text}", _VICUNA),
    "llama2": Layout("{bos}[INST] {text} [/INST]", " {text} {eos}", "", _SYSTEM, strip=True),
    "llama3": Layout("<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>", strip=True),
    "chatml": Layout("<|im_start|>{role}\n{text}<|im_end|>\n", begin=""),
    "mistral": Layout(" [INST] {text} [/INST]", " {text}{eos}"),
}


def open_template(name: str | None, folder: Path, tokenizer: Tokenizer) -> AnyTemplate:
    """The template of that name, for a model in a folder and its tokenizer.

    Args:
        name: of TEMPLATES or CHAT_TEMPLATES; 'own': the model's; None: the model's where it has one, else 'alpaca'.

    Raises ValueError where there is no such template, it can't be read, or its special tokens are not the tokenizer's.
    """
    if name in (None, OWN) and (own := _own_template(folder, tokenizer, chosen=name is None)):
        return own
    if name == OWN:
        raise ValueError(f"{folder} has no chat template, in chat_template.jinja or tokenizer_config.json")
    name = name or "alpaca"
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name not in CHAT_TEMPLATES:
        there = ", ".join([*TEMPLATES, *CHAT_TEMPLATES])
        raise ValueError(f"there is no template {name!r}; there are {there}, and own, the model's")
    layout, known = CHAT_TEMPLATES[name], tokenizer.special_tokens | tokenizer.added_tokens
    marks = re.findall(r"<\|\w+\|>", layout.turn)  # the last one ends a turn
    if lacking := [mark for mark in marks if mark not in known]:
        said = f"template {name} is written with {', '.join(lacking)}, which {tokenizer.path} has no tokens for"
        raise ValueError(f"{said}; vicuna and llama2 are written in plain text")
    bos = "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id)
    eos = tokenizer.piece(tokenizer.eos_id)
    return _tried(ChatTemplate(name, partial(layout.write, bos=bos, eos=eos)), f"template {name}", tokenizer)


def _own_template(folder: Path, tokenizer: Tokenizer, *, chosen: bool) -> ChatTemplate | None:
    """A model's own template, or None where it has none; a line of the log says where it is, if it was `chosen`."""
    from k2mini.files import read_text  # the command line lists the templates, and does without these
    from k2mini.model_config import read_fields

    config = read_fields(path := folder / "tokenizer_config.json")
    where, text = f"{path}: chat_template", config.get("chat_template")
    if isinstance(text, list):
        named = [each.get("template") for each in text if isinstance(each, dict) and each.get("name") == "default"]
        text = named[0] if named else text
    if os.path.lexists(newer := folder / "chat_template.jinja"):  # which transformers prefers, too
        where, text = str(newer), read_text(newer)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{where} must be text, or a list with one named default, not {short(text)}")
    if chosen:
        log.info("the template is the model's own, %s", where)
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    tokens: dict[str, Any] = {name: tokenizer.piece(token) for name, token in ids.items() if token is not None}
    tokens |= {name: config[name] for name in SPECIAL if name in config}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    variables = {name: token for name, token in tokens.items() if isinstance(token, str)}
    from k2mini.data.jinja_template import compile_template

    template = ChatTemplate(OWN, compile_template(text, where, variables))
    return _tried(template, where, tokenizer, f"{text} {sorted(variables.items())}")


def _tried(template: ChatTemplate, where: str, tokenizer: Tokenizer, source: str = "") -> ChatTemplate:
    """A template with what it says itself of two messages: what it reserves, `end`, `lead`, and a digest of a source.

    Raises ValueError where it can't be used.
    """
    asked, answered = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}
    opened, closed = (template.render([asked], generation=generation) for generation in (True, False))
    if "ask" not in opened:
        raise ValueError(f"{where} does not write what is asked; --template or data.template can name another")
    whole = template.render([asked, answered], generation=False)
    opening, _, rest = whole.removeprefix(opened).partition("answer")
    if opened == closed and opening.strip():
        said = f"{where} has no generation prompt: it does not write {short(opening)}, which comes before an answer,"
        raise ValueError(f"{said} where add_generation_prompt is true; --template or data.template can name another")
    # Some role marks are not flagged as special; added words and line ends are nobody's marks.
    marks = [token for token in tokenizer.added_tokens if MARK.fullmatch(token) and token in opened + whole]
    known = {*tokenizer.special_tokens, *marks}
    ends = [(rest.index(token), -len(token), token) for token in known if token in rest]
    if not ends:
        log.warning("%s ends an answer with no token of %s, so none teaches a model to stop", where, tokenizer.path)
    reserved, end = re.compile("|".join(map(re.escape, [*known, *ANSWER]))), min(ends)[2] if ends else ""
    written = f"{source} {opened} {whole}"  # it may depend on the day
    digest = source and f"@{hashlib.sha256(written.encode()).hexdigest()[:12]}"
    return replace(template, reserved=reserved, end=end, lead=" " * (opening == " "), digest=digest)


def stop_ids(tokenizer: Tokenizer, template: AnyTemplate) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, and the one that ends the assistant's turn in the template."""
    known = tokenizer.special_tokens | tokenizer.added_tokens
    end = [known[template.end]] if isinstance(template, ChatTemplate) and template.end else []
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
            input = message.get("input", "")
            ids += encode_prompt(tokenizer, template, message["content"], input, "" if ids else system)
    return ids


Span = tuple[int, int]


def encode_conversation(
    tokenizer: Tokenizer, template: AnyTemplate, messages: Sequence[Message]
) -> list[tuple[list[int], list[Span]]]:
    """A conversation for training: token ids, and from where to where they are the assistant's, each end included.

    A chat template's `{% generation %}` blocks say what is the assistant's. One without them is asked for each answer:
    it is what comes to the conversation up to where it begins, with its end token and without white space after it.

    Returns: one pair; where the template writes an earlier answer in another way once the conversation goes on (as
        some leave out what was thought), one for each answer, with what is before it as it was when it was given.

    Raises ValueError where the template refuses the messages, or what it writes of an answer can't be told.
    """
    if isinstance(template, ChatTemplate):
        return [_encoded(tokenizer, template, *found) for found in _answers(template, messages)]
    system, turns = in_turns(messages)
    ids: list[int] = []
    spans = []
    for asked, answer in zip(turns[::2], turns[1::2], strict=False):
        prompt = template.prompt(asked["content"], asked.get("input", ""), "" if ids else system)
        tokens = tokenizer.encode(prompt + answer["content"], bos=True, eos=True)
        start = _shared(tokenizer.encode(prompt, bos=True, eos=False), tokens)
        spans.append((len(ids) + start, len(ids) + len(tokens)))
        ids += tokens
    return [(ids, spans)]


def _answers(template: ChatTemplate, messages: Sequence[Message]) -> list[tuple[str, list[Span]]]:
    """As `encode_conversation`, in characters."""
    whole = template.render(messages, generation=False, answers=True)
    if calls := [place for place, message in enumerate(messages) if message.get("tool_calls")]:
        plain, without = [{key: m[key] for key in m if key != "tool_calls"} for m in messages], ""
        with suppress(ValueError):  # a template that needs them writes them
            without = template.render(plain, generation=False, answers=True)
        if without == whole:
            said = f"messages[{calls[0]}] has tool_calls, which the template does not write"
            raise ValueError(f"{said}; data.template can name another")
    if ANSWER[0] in whole:
        parts = re.split(f"[{ANSWER}]", whole)  # every second one is an answer
        edges = accumulate(map(len, parts))
        return [("".join(parts), [span for span in zip(edges, edges, strict=False) if span[0] < span[1]])]
    found = []
    for place in [place for place, message in enumerate(messages) if message["role"] == "assistant"]:
        before = template.render(messages[:place], generation=True)
        text = template.render(messages[: place + 1], generation=False)
        if not text.startswith(before):
            said = f"the template opens an answer otherwise than it writes messages[{place}]"
            raise ValueError(f"{said}, so it can't be told where that begins; data.template can name another")
        end = text.rfind(template.end, len(before)) if template.end else -1
        text = text[: end + len(template.end)] if end >= 0 else text.rstrip()
        found.append((text, [(len(before), len(text))]))
    if all(whole.startswith(text) for text, _ in found):
        return [(whole, [span for _, spans in found for span in spans])]
    return found


def _encoded(
    tokenizer: Tokenizer, template: ChatTemplate, text: str, spans: list[Span]
) -> tuple[list[int], list[Span]]:
    """Tokens of a text, all at once, and spans of them for spans of characters: any token that has some of these."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=template.bos, eos=False, special=template.special)

    ids, ends, found = encode(text), tokenizer.ends(text), []
    origin, skip = 0, 0  # a special token and its place, from where on tokens do not depend on what comes before

    def before(place: int) -> int:  # the token that has the character at a place
        if ends is not None:
            return bisect_right(ends, place)
        return skip + _shared(encode(text[origin:place]), ids[skip:])

    for start, end in spans:
        found.append((before(start), max(before(end), before(end - 1) + 1)))
        if template.end in tokenizer.special_tokens and text.endswith(template.end, start, end):
            origin, skip = end - len(template.end), found[-1][1] - 1
    return ids, found


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
