import hashlib

import pytest

from k2mini.data.prompts import TEMPLATES, encode_prompt, get_template

# sha256 of prompt_input + NUL + prompt_no_input of templates/NAME.json in github.com/tloen/alpaca-lora at 8bb8579,
# the same files as in K2's repository.
PUBLISHED = {
    "alpaca": "61ec00982ab1febe1aac277a0238e46879adf4bf45061ad829e16175a96ee6e7",
    "alpaca_legacy": "832d55b5e3033cb5130c245e2702c185118e49b2c4ce033ae4bafd753f2d779a",
    "alpaca_short": "3fe4a99f2875c86aa0b37dd137cd2a928f4bd527c75cd499690f2e1d49bee1fa",
    "vigogne": "c08ca668b750b5d79f8bb8a85ac4555c972117103f703314d135d8edc26019df",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_are_alpaca_loras_byte_for_byte(name):
    template = TEMPLATES[name]
    text = template.with_input + "\0" + template.without_input
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED[name]


def test_prompts_are_filled_in():
    template = get_template("alpaca_short")
    assert template.prompt("Name {a} rock.") == "### Instruction:\nName {a} rock.\n\n### Response:\n"
    assert template.prompt("Sort.", "b, {a}") == "### Instruction:\nSort.\n\n### Input:\nb, {a}\n\n### Response:\n"
    assert get_template("none").prompt("Basalt is") == "Basalt is"


def test_an_unknown_template_names_those_there_are():
    with pytest.raises(ValueError, match=r"no template 'alpacca'; there are alpaca, alpaca_legacy"):
        get_template("alpacca")


@pytest.mark.parametrize("question", [("byte \udcff",), ("granite", "byte \udcff")])
def test_prompts_that_are_not_utf8_are_named(tiny_tokenizer, question):
    with pytest.raises(ValueError, match=r"the text is not UTF-8 \(at the end of '.*byte \\udcff'"):
        encode_prompt(tiny_tokenizer, get_template("alpaca"), *question)
