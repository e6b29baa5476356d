import random
import subprocess
import sys

import pytest
import sentencepiece

from k2mini.data.tokenizer import Tokenizer
from k2mini.inference.decoding import TextStream
from tests.conftest import asset

TEXTS = [
    "Granite is an intrusive igneous rock.",
    " a leading space,  two  inside and one at the end ",
    "line\n\n\ttab\r\n",
    "",
    "olivine (Mg,Fe)₂SiO₄ 🌋 岩石 héllo",
    "text with <s> and </s> and <0x41> written out",
]

# transformers 5 departs from SentencePiece in two places, where SentencePiece is right: a text that begins with a
# space gets no second one put before it, and "<s>" written out becomes the control token.
REFERENCE_TEXTS = [text for text in TEXTS if not text.startswith(" ") and "<s>" not in text]


def test_llama_ids_are_the_known_ones(llama_tokenizer):
    encode = llama_tokenizer.encode
    assert encode("A", bos=False, eos=False) == [319]
    assert encode("\nA", bos=False, eos=False)[-1] == 29909
    assert encode("True", bos=False, eos=False) == [5852]
    assert encode("False", bos=False, eos=False) == [7700]
    assert (llama_tokenizer.bos_id, llama_tokenizer.eos_id, llama_tokenizer.vocab_size) == (1, 2, 32000)


def test_bos_and_eos_only_when_asked(tiny_tokenizer):
    plain = tiny_tokenizer.encode("rock", bos=False, eos=False)
    assert tiny_tokenizer.encode("rock", bos=True, eos=False) == [tiny_tokenizer.bos_id, *plain]
    assert tiny_tokenizer.encode("rock", bos=False, eos=True) == [*plain, tiny_tokenizer.eos_id]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text, bos=True, eos=True)
    assert tiny_tokenizer.decode(ids) == text
    inside = ids[1:-1]
    assert not {tiny_tokenizer.bos_id, tiny_tokenizer.eos_id} & set(inside)


@pytest.mark.parametrize("text", TEXTS)
def test_llama_text_survives(llama_tokenizer, text):
    assert llama_tokenizer.decode(llama_tokenizer.encode(text, bos=True, eos=True)) == text


def test_decode_equals_sentencepiece_on_any_ids(llama_tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama_tokenizer.path))
    rng = random.Random(0)
    for _ in range(1000):
        # Half of them byte pieces, so that broken UTF-8 is common.
        ids = [rng.randrange(3, 259) if rng.random() < 0.5 else rng.randrange(32000) for _ in range(8)]
        assert llama_tokenizer.decode(ids) == reference.decode(ids)


def test_stream_keeps_spaces_and_never_splits_a_character(llama_tokenizer):
    context = llama_tokenizer.encode("The rock", bos=True, eos=False)
    whole = llama_tokenizer.encode("The rock is 🌋 and 岩石", bos=True, eos=False)
    assert whole[: len(context)] == context
    stream = llama_tokenizer.stream()
    pieces = [stream.push(token) for token in whole[len(context) :]]
    assert "".join(pieces) == " is 🌋 and 岩石"
    assert stream.flush() == ""
    assert "" in pieces  # the volcano is four byte tokens, of which three complete nothing
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_at_the_end(llama_tokenizer):
    stream = llama_tokenizer.stream()
    volcano = [token for token in llama_tokenizer.encode("🌋", bos=False, eos=False) if token < 259]
    assert [stream.push(token) for token in volcano[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd" * 3


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no tokenizer file"):
        Tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


MUTATED = """
import random, sys
from k2mini.data.tokenizer import Tokenizer
path, draw = sys.argv[1], random.Random(0)
content = open(path, "rb").read()
for number in range(200):
    mutated = bytearray(content)
    place = draw.randrange(len(content))
    if number % 3 == 0:
        for _ in range(draw.choice([1, 3, 20])):
            mutated[draw.randrange(len(content))] = draw.randrange(256)
    elif number % 3 == 1:
        mutated[place : place + draw.choice([0, 1, 50])] = draw.randbytes(draw.choice([0, 1, 9]))
    else:
        del mutated[place:]
    open("m.model", "wb").write(mutated)
    try:
        tokenizer = Tokenizer("m.model")
        tokenizer.decode(tokenizer.encode("granite <s>", bos=True, eos=True) + list(range(tokenizer.vocab_size)))
        tokenizer.hf_config()
        print("read")
    except ValueError as error:
        assert "m.model" in str(error), error
        print("refused")
"""


def test_damaged_models_are_named(tiny_tokenizer, tmp_path):
    """Nor does SentencePiece, whose code is not Python, end the interpreter."""
    command = [sys.executable, "-c", MUTATED, str(tiny_tokenizer.path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) == 200
    assert done.stdout.count("refused") > 100


def test_what_is_no_model(tmp_path, tiny_tokenizer, monkeypatch):
    (tmp_path / "empty.model").touch()
    with pytest.raises(ValueError, match=r"empty.model is not a SentencePiece model"):
        Tokenizer(tmp_path / "empty.model")
    with pytest.raises(ValueError, match="there is no tokenizer file"):
        Tokenizer(tmp_path)
    monkeypatch.setattr("k2mini.data.tokenizer.MOST", 1000)
    with pytest.raises(ValueError, match=r"tokenizer.model is not a SentencePiece model: it has [\d,]+ bytes"):
        Tokenizer(tiny_tokenizer.path)


@pytest.mark.parametrize("half", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_named(tiny_tokenizer, half):
    with pytest.raises(ValueError, match=r"the text is not UTF-8 \(at the end of '.*granite a?\\ud"):
        tiny_tokenizer.encode(f"{'quartz ' * 9}granite {half} basalt", bos=True, eos=False)


def user_defined(folder, *pieces, **options):
    """A model like Yi's, whose role marks are user-defined pieces: ids 3, 4, …"""
    texts = [f"granite basalt rock mineral crust mantle erodes {n}" for n in range(300)]
    options = {"vocab_size": 340, "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "tokenizer"), model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=[*pieces], **options
    )  # fmt: skip
    return Tokenizer(folder / "tokenizer.model")


def test_user_defined_pieces_are_known(tmp_path, tiny_tokenizer):
    pieces = ["<|im_start|>", "é", "岩" * 30, "\n\x05\n\x03abc"]
    tokenizer = user_defined(tmp_path, *pieces)
    assert tokenizer.added_tokens == {piece: 3 + place for place, piece in enumerate(pieces)}
    assert tokenizer.encode(f"granite{pieces[0]}", bos=False, eos=False)[-1] == 3
    assert tiny_tokenizer.added_tokens == {}


def test_spaces_after_special_tokens(tmp_path, tiny_tokenizer):
    """SentencePiece puts one before each part, unless there is one; a model that puts none loses none."""
    bare = user_defined(tmp_path, add_dummy_prefix=False)
    for tokenizer in (tiny_tokenizer, bare):
        for text in ("<s> granite", "<s>  granite</s> ", "granite</s>\n"):
            ids = tokenizer.encode(text, bos=False, eos=False, special=True)
            written = "".join(map(tokenizer.piece, ids)).replace("▁", " ").replace("<0x0A>", "\n")
            assert written.removeprefix(" ") == text.replace("</s>\n", "</s> \n" if tokenizer.adds_space else "</s>\n")


def test_tokens_outside_the_vocabulary_are_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="outside the tokenizer's vocabulary"):
        tiny_tokenizer.decode([tiny_tokenizer.vocab_size])


def test_transformers_reads_what_is_written(tiny_directory, tiny_tokenizer):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny_directory)
    for text in REFERENCE_TEXTS:
        assert reference(text)["input_ids"] == tiny_tokenizer.encode(text, bos=True, eos=False)


def test_llamas_own_tokenizer_is_the_same_in_transformers(llama_tokenizer, tmp_path):
    import json
    import shutil

    from transformers import AutoTokenizer

    shutil.copy(asset("assets", "llama_tokenizer.model"), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(llama_tokenizer.hf_config()))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for text in REFERENCE_TEXTS:
        assert reference(text)["input_ids"] == llama_tokenizer.encode(text, bos=True, eos=False)


STREAMED = "granite is a rock. Response: émigré 岩石 made of quartz and the volcano erodes"


def streamed(tokenizer, text, stop):
    stream = TextStream(tokenizer, stop)
    given = []
    for token in tokenizer.encode(text, bos=False, eos=False):
        given.append(stream.push(token))
        if stream.stopped:
            break
    given.append(stream.flush())
    assert stream.text == "".join(given)
    return stream, given


@pytest.mark.parametrize("seed", range(30))
def test_the_first_stop_string_ends_the_text(tiny_tokenizer, seed):
    """Stop strings cut anywhere out of the text, and some that are not in it."""
    draw = random.Random(seed)
    whole = streamed(tiny_tokenizer, STREAMED, ())[0].text
    stops = ["zzz", "rockk"]
    for _ in range(draw.randint(0, 2)):
        start = draw.randrange(1, len(whole) - 8)
        stops.append(whole[start : start + draw.randint(1, 8)])
    places = [whole.find(stop) for stop in stops if stop in whole]
    stream, given = streamed(tiny_tokenizer, STREAMED, stops)
    assert stream.text == (whole[: min(places)] if places else whole)
    assert stream.stopped == bool(places)
    assert all("\ufffd" not in piece for piece in given)


def test_what_could_be_a_beginning_is_given_at_the_end(tiny_tokenizer):
    stream, _ = streamed(tiny_tokenizer, "granite quar", ("quartz",))
    assert stream.text.strip() == "granite quar"


def test_an_empty_stop_string_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(tiny_tokenizer, [""])


def test_text_that_goes_on_gets_no_space(tiny_tokenizer, llama_tokenizer):
    for tokenizer in (tiny_tokenizer, llama_tokenizer):
        for text in ("granite", " granite", "\n granite", "", "é", "  "):
            stream = tokenizer.stream()
            assert "".join(map(stream.push, tokenizer.encode_more(text))) + stream.flush() == text
        assert tokenizer.encode_more(" granite") == tokenizer.encode("granite", bos=False, eos=False)
