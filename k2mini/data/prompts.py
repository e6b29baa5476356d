"""Prompt templates: a model tuned with one of them wants it back byte for byte."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """How an instruction, with or without an input, becomes a prompt.

    Args:
        with_input, without_input: patterns with `{instruction}` and `{input}`.
        response_mark: the line that the answer follows, or '' where there is none.
    """

    with_input: str
    without_input: str
    response_mark: str

    def prompt(self, instruction: str, input: str = "") -> str:
        """The prompt, up to where the model's answer begins. An empty `input` counts as none."""
        if input:
            return self.with_input.format(instruction=instruction, input=input)
        return self.without_input.format(instruction=instruction)


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


def get_template(name: str) -> Template:
    """The template of that name. Raises ValueError with the names there are."""
    if name not in TEMPLATES:
        raise ValueError(f"there is no template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
