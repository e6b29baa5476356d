"""Prompt templates: a model tuned with one of them must be asked with it, byte for byte. And prompts as token ids."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from k2mini.errors import short

if TYPE_CHECKING:  # the command line lists the templates, and does without sentencepiece until it runs a command
    from k2mini.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """How an instruction, with or without an input, becomes a prompt.

    Args:
        with_input, without_input: patterns with `{instruction}` and `{input}`.
        response_mark: the line that the answer follows, or '' where there is none.
        name: by which TEMPLATES has it.

    Attributes:
        bos, special: how its text is encoded: after BOS, special tokens written out in it being plain text.
        lead, digest: '', as a chat template may have them.
    """

    with_input: str
    without_input: str
    response_mark: str
    name: str = ""
    bos: ClassVar[bool] = True
    special: ClassVar[bool] = False
    lead: ClassVar[str] = ""
    digest: ClassVar[str] = ""

    def prompt(self, instruction: str, input: str = "", system: str = "") -> str:
        """The prompt, up to where the model's answer begins. An empty `input` counts as none; `system` comes first."""
        pattern = self.with_input if input else self.without_input
        return (f"{system}\n\n" if system else "") + pattern.format(instruction=instruction, input=input)


Message = dict[str, Any]  # a role, its content, and other fields for a model's own template that knows them
ANSWER = "\ufdd0\ufdd1"  # which is no text: before and after what a template says is the model's answer


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation becomes text, special tokens written out in it.

    Args:
        name: of CHAT_TEMPLATES, or 'own'.
        write: the text of messages, and what opens the assistant's next turn where asked.
        reserved: special tokens and the template's marks, which nobody but the assistant may write.
        end: the token of these that ends the assistant's turn; '' where none does.
        lead: what it writes between what opens the assistant's turn and the answer, a space or ''.
        digest: of a model's own template and of what it writes, by which it is known again; else ''.

    Attributes:
        bos, special: how its text is encoded: BOS where the text has it, special tokens as themselves.
    """

    name: str
    write: Callable[[Sequence[Message], bool], str]
    reserved: re.Pattern[str] = re.compile(f"[{ANSWER}]")
    end: str = ""
    lead: str = ""
    digest: str = ""
    bos: ClassVar[bool] = False
    special: ClassVar[bool] = True

    def render(self, messages: Sequence[Message], *, generation: bool, answers: bool = False) -> str:
        """The text of a conversation.

        Args:
            generation: it ends with what opens the assistant's next answer, if anything does.
            answers: what the template says is an answer stands between the two characters of `ANSWER`.

        Raises ValueError where the template refuses it, or a text but the assistant's has a special token in it.
        """
        messages = [m | {"content": f"{m['content']}\n{m['input']}"} if m.get("input") else m for m in messages]
        for place, message in enumerate(messages):
            held = f"[{ANSWER}]" if message["role"] == "assistant" else self.reserved
            if found := re.search(held, message["content"]):
                said = f"messages[{place}] has {short(found[0])} in its text"
                raise ValueError(f"{said}, which the model would take for the conversation's structure")
        text = self.write(messages, generation)
        return text if answers else text.translate(dict.fromkeys(map(ord, ANSWER)))

    def prompt(self, instruction: str, input: str = "", system: str = "") -> str:
        """The prompt, up to where the model's answer begins; an input stands in a line after its instruction."""
        first = [{"role": "system", "content": system}] if system else []
        return self.render([*first, {"role": "user", "content": instruction, "input": input}], generation=True)


AnyTemplate = Template | ChatTemplate

_WITH = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_WITHOUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)  # fmt: skip
_WITH_FR = (
    "Ci-dessous se trouve une instruction qui décrit une tâche, associée à une entrée qui fournit un contexte "
    "supplémentaire. Écrivez une réponse qui complète correctement la demande.\n\n"
)
_WITHOUT_FR = (
    "Ci-dessous se trouve une instruction qui décrit une tâche. "
    "Écrivez une réponse qui complète correctement la demande.\n\n"
)
_FIELDS_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
_FIELDS = "### Instruction:\n{instruction}\n\n### Response:"
_K2 = "### Instruction:\nIdentify the choice that best completes the statement or answers the question.\n"

# The formats of alpaca-lora's templates/*.json (github.com/tloen/alpaca-lora), which K2 was tuned with.
TEMPLATES = {
    "alpaca": Template(_WITH + _FIELDS_INPUT + "\n", _WITHOUT + _FIELDS + "\n", "### Response:"),
    "alpaca_legacy": Template(_WITH + _FIELDS_INPUT, _WITHOUT + _FIELDS, "### Response:"),
    "alpaca_short": Template(_FIELDS_INPUT + "\n", _FIELDS + "\n", "### Response:"),
    "vigogne": Template(
        _WITH_FR + "### Instruction:\n{instruction}\n\n### Entrée:\n{input}\n\n### Réponse:\n",
        _WITHOUT_FR + "### Instruction:\n{instruction}\n\n### Réponse:\n",
        "### Réponse:",
    ),
    # K2's own questions at evaluation (github.com/davendw49/k2, evaluation/multiple_choice_samples*.txt).
    "k2": Template(_K2 + "{instruction}\n{input}\n\n### Response:\n", _K2 + "{instruction}\n\n### Response:\n", ""),
    "k2_wa": Template(
        _K2 + "{instruction}\n{input}\n\n### Response:\nThe answer is:\n",
        _K2 + "{instruction}\n\n### Response:\nThe answer is:\n",
        "",
    ),
    "none": Template("{instruction}\n{input}", "{instruction}", ""),
}
TEMPLATES = {name: replace(template, name=name) for name, template in TEMPLATES.items()}


def utf8(value: str) -> str:
    """The `type` of an option whose text a model reads. Raises ArgumentTypeError where its bytes are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not UTF-8") from None
    return value


def get_template(name: str) -> Template:
    """The template of that name. Raises ValueError with the names there are."""
    if name not in TEMPLATES:
        raise ValueError(f"there is no template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def encode_prompt(
    tokenizer: Tokenizer, template: AnyTemplate, instruction: str, input: str = "", system: str = ""
) -> list[int]:
    """The token ids of an instruction and its input in a template; `system` begins a conversation.

    Raises ValueError where the instruction is empty, or the template refuses it.
    """
    if not instruction.strip():
        raise ValueError("the prompt is empty")
    text = template.prompt(instruction, input, system)
    return tokenizer.encode(text, bos=template.bos, eos=False, special=template.special)


class Rendered(str):
    """A chat template's text: BOS and the special tokens that stand in it are meant."""


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a whole prompt, BOS first but for what is `Rendered`. Raises ValueError where there is none."""
    rendered = isinstance(text, Rendered)
    if not (ids := tokenizer.encode(text, bos=not rendered, eos=False, special=rendered)):
        raise ValueError("the prompt is empty")
    return ids


def room(prompt_tokens: int, max_new_tokens: int, max_seq_len: int, where: str = "") -> int:
    """How many tokens may follow a prompt: `max_new_tokens`, or what it leaves of the model's context.

    Raises ValueError, beginning with `where`, for a prompt that is empty or leaves nothing.
    """
    if prompt_tokens == 0:
        raise ValueError(f"{where}the prompt is empty")
    if prompt_tokens >= max_seq_len:
        raise ValueError(
            f"{where}a prompt of {prompt_tokens} tokens leaves no room for an answer in the model's context of "
            f"{max_seq_len}; shorten it by {prompt_tokens - max_seq_len + 1} or more"
        )
    return min(max_new_tokens, max_seq_len - prompt_tokens)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    first, last = (list(pick(prompts, key=list)) for pick in (min, max))  # in lexical order, all lie between them
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(common, *(len(prompt) - 1 for prompt in prompts))


def rooms(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_seq_len: int) -> list[int]:
    """Each prompt's `room`. Raises ValueError where there is no prompt, or where one is empty or too long."""
    if not prompts:
        raise ValueError("there is no prompt")
    return [room(len(prompt), max_new_tokens, max_seq_len) for prompt in prompts]
