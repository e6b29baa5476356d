"""tokenizer.json against transformers: SmolLM2's own (byte-level BPE), and LLaMA's, converted from tokenizer.model."""

import json
import random
import shutil

import pytest

from k2mini.data.tokenizer import Tokenizer, open_tokenizer
from k2mini.weights.model_directory import ModelDirectory

PARTS = [
    *"abcXYZ0123456789 \n\t\r.,;:!?'\"()[]{}<>|/\\=+-*_#@~`^&%$",
    *["  ", "   ", "\n\n", " \n", "\t\t", "\r\n", " the", " rock", "granite", "Ġ", "▁", "\u00a0", "\u200b", "\ufeff"],
    *["é", "e\u0301", "ß", "ñ", "Ω", "д", "岩", "石", "の", "한", "ع", "ש", "₂", "²", "½", "٣", "Ⅷ", "ﬁ", "\ufffd"],
    *["🌋", "👩‍🔬", "🇩🇪", "👍🏽", "\U0001d54f", "\x00", "\x01", "\x1b[0m", "\x7f", "\x85", "\u2028", "don't", "we'LL"],
    *["def f(x):\n    return x**2\n", "#include <x>\n", "{{ x }}", "https://a.b/c?d=e&f=1", "\\frac{1}{2}", "3.14e-10"],
    *["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end", "<0x0A>", "[INST]"],
]


def strings(number, seed=0):
    """Random texts: mixtures of all kinds, and runs of code points from anywhere but the surrogates."""
    draw = random.Random(seed)
    for place in range(number):
        if place % 5:
            yield "".join(draw.choices(PARTS, k=draw.randrange(12)))
        else:
            points = [draw.randrange(draw.choice([0x100, 0x3000, 0x20000])) for _ in range(draw.randrange(12))]
            yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


@pytest.fixture(scope="module")
def smollm2(smollm2_json):
    """The tokenizer, here and in transformers."""
    from transformers import PreTrainedTokenizerFast

    return Tokenizer(smollm2_json / "tokenizer.json"), PreTrainedTokenizerFast.from_pretrained(smollm2_json)


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


def test_ids_and_texts_are_those_of_transformers(smollm2):
    tokenizer, reference = smollm2
    texts = list(strings(10_000))
    special = reference(texts, add_special_tokens=False)["input_ids"]
    plain = reference(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [tokenizer.encode(text, bos=False, eos=False, special=True) for text in texts] == special
    assert [tokenizer.encode(text, bos=False, eos=False) for text in texts] == plain
    assert special != plain
    assert not {0, 1, 2}.intersection(*plain)
    known = {tokenizer.piece_bytes(token) for token in range(tokenizer.vocab_size)}  # 21 bytes have no token at all
    decoded = reference.batch_decode(plain, clean_up_tokenization_spaces=False)
    for text, ids, expected in zip(texts, plain, decoded, strict=True):
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) == expected
        assert expected == text or not known.issuperset(bytes([byte]) for byte in text.encode())
        assert "\ufffd" in expected or all("\ufffd" not in piece for piece in pieces)


def test_any_ids_are_decoded_as_in_transformers(smollm2):
    """Half of them single bytes, so that broken UTF-8 is common; special tokens between them give nothing."""
    tokenizer, reference = smollm2
    draw = random.Random(0)
    many = [[draw.randrange(300 if draw.random() < 0.5 else 49152) for _ in range(8)] for _ in range(2_000)]
    decoded = reference.batch_decode(many, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for ids, expected in zip(many, decoded, strict=True):
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == expected


def test_what_smollm2_says_of_itself(smollm2, smollm2_json):
    tokenizer = open_tokenizer(smollm2[0].path)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.unk_id) == (49152, 2, None)
    assert tokenizer.bos_id is None  # <|im_start|> is named, and put before no text
    assert tokenizer.stop_ids == (2,)
    assert tokenizer.special_tokens["<|im_end|>"] == 2
    assert tokenizer.encode("rock", bos=True, eos=True) == [*tokenizer.encode("rock", bos=False, eos=False), 2]
    assert [tokenizer.kind(token) for token in (1, 2, 17, 5000)] == ["control", "control", "normal", "normal"]
    assert tokenizer.encode_more(" rock") == tokenizer.encode(" rock", bos=False, eos=False)
    assert tokenizer.hf_config()["tokenizer_class"] == "GPT2Tokenizer"
    assert ModelDirectory(smollm2_json).require_tokenizer().vocab_size == 49152
    with pytest.raises(ValueError, match="token 49152 is outside"):
        tokenizer.piece(49152)


def by_score(model, vocab):
    """The merges of a SentencePiece model, the best score first: as Hugging Face made LLaMA's tokenizer.json.

    (transformers 5 puts those of whitespace, whose scores are lowest, first.)
    """
    found = []
    for token in (token for token in range(model.vocab_size) if model.kind(token) == "normal"):
        piece = model.piece(token)
        pairs = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        pairs = sorted((p for p in pairs if p[0] in vocab and p[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]]))
        found += [(-model.score(token), list(pair)) for pair in pairs]
    return [pair for _, pair in sorted(found, key=lambda entry: entry[0])]


PREPEND = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]


@pytest.fixture(scope="module")
def llama(llama_tokenizer, tmp_path_factory):
    """LLaMA's tokenizer.json: as transformers writes it today (Metaspace), and as it stands on the hub (normalizer)."""
    from transformers import LlamaTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    for name in ("model", "metaspace", "hub"):
        (folder / name).mkdir()
    shutil.copyfile(llama_tokenizer.path, folder / "model" / "tokenizer.model")
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(llama_tokenizer.hf_config()))
    LlamaTokenizerFast.from_pretrained(folder / "model").save_pretrained(folder / "metaspace")
    content = json.loads((folder / "metaspace" / "tokenizer.json").read_text())
    content["model"]["merges"] = by_score(llama_tokenizer, content["model"]["vocab"])
    (folder / "metaspace" / "tokenizer.json").write_text(json.dumps(content))
    content["normalizer"], content["pre_tokenizer"] = {"type": "Sequence", "normalizers": PREPEND}, None
    (folder / "hub" / "tokenizer.json").write_text(json.dumps(content))
    shutil.copyfile(folder / "metaspace" / "tokenizer_config.json", folder / "hub" / "tokenizer_config.json")
    return folder


def test_llamas_tokenizer_json_is_its_tokenizer_model(llama, llama_tokenizer):
    """So, too, special tokens written out give the ids of transformers' legacy tokenizer, which that file is."""
    tokenizer = Tokenizer(llama / "hub" / "tokenizer.json")
    assert tokenizer.special_tokens == llama_tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    same = ("vocab_size", "bos_id", "eos_id", "adds_space", "stop_ids")
    assert all(getattr(tokenizer, name) == getattr(llama_tokenizer, name) for name in same)
    for text in strings(2_000):
        for special in (False, True):
            flags = {"bos": special, "eos": special, "special": special}
            ids = tokenizer.encode(text, **flags)
            assert ids == llama_tokenizer.encode(text, **flags), repr(text)
        plain = tokenizer.encode(text, bos=True, eos=True)
        assert tokenizer.decode(plain) == text.replace("▁", " ")  # as SentencePiece has it
        assert tokenizer.encode_more(text) == llama_tokenizer.encode_more(text)
        assert streamed(tokenizer, plain) == streamed(llama_tokenizer, plain)
    for token in range(32000):
        assert tokenizer.piece_bytes(token) == llama_tokenizer.piece_bytes(token) or token == 0
        assert tokenizer.kind(token) == llama_tokenizer.kind(token) or token == 0


def test_metaspace_gives_the_same_ids(llama, llama_tokenizer):
    """But where a text begins with a space: the one that SentencePiece puts before it is left out, as there."""
    tokenizer = Tokenizer(llama / "metaspace" / "tokenizer.json")
    for text in strings(1_000):
        if not text.startswith((" ", "▁")):
            ids = tokenizer.encode(text, bos=True, eos=False)
            assert ids == llama_tokenizer.encode(text, bos=True, eos=False)
            assert (
                "".join(streamed(tokenizer, ids)).removeprefix(" ") == tokenizer.decode(ids) == text.replace("▁", " ")
            )
