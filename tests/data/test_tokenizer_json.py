"""tokenizer.json against transformers: SmolLM2's own (byte-level BPE), and LLaMA's, converted from tokenizer.model."""

import json
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece

from k2mini.data.tokenizer import Tokenizer, open_tokenizer
from k2mini.files import sha256
from k2mini.weights.model_directory import ModelDirectory, tokenizer_file
from tests.data.test_tokenizer import MUTATED
from tests.json_tokenizer import ADDED, SPECIAL, write_json_tokenizer

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
    found, scores = [], sentencepiece.SentencePieceProcessor(model_file=str(model.path))
    for token in (token for token in range(model.vocab_size) if model.kind(token) == "normal"):
        piece = model.piece(token)
        pairs = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        pairs = sorted((p for p in pairs if p[0] in vocab and p[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]]))
        found += [(-scores.get_score(token), list(pair)) for pair in pairs]
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
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(llama / "hub" / "tokenizer.json")
    assert tokenizer.special_tokens == llama_tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    same = ("vocab_size", "bos_id", "eos_id", "adds_space", "stop_ids")
    assert all(getattr(tokenizer, name) == getattr(llama_tokenizer, name) for name in same)
    for text in strings(2_000):
        for special in (False, True):
            if special:  # a special token with a space after it: see test_sentencepiece_equals_transformers
                text = re.sub("(<s>|</s>|<unk>) +", r"\1", text)
            flags = {"bos": special, "eos": special, "special": special}
            ids = tokenizer.encode(text, **flags)
            assert ids == llama_tokenizer.encode(text, **flags), repr(text)
        plain = tokenizer.encode(text, bos=True, eos=True)
        assert tokenizer.decode(plain) == text.replace("▁", " ")  # as SentencePiece has it
        assert tokenizer.encode_more(text) == llama_tokenizer.encode_more(text)
        assert streamed(tokenizer, plain) == streamed(llama_tokenizer, plain)
    reference = PreTrainedTokenizerFast.from_pretrained(llama / "hub")
    many = [tokenizer.encode(text, bos=True, eos=True) for text in strings(1_000, seed=1)]
    draw = random.Random(0)
    many += [[draw.randrange(259, 32000) for _ in range(8)] for _ in range(1_000)]
    decoded = reference.batch_decode(many, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert [tokenizer.decode(ids) for ids in many] == decoded
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


@pytest.mark.parametrize(
    ("config", "bos", "expected"),
    [
        ({"bos_token": None}, None, None),  # Qwen's
        ({"bos_token": "<|im_start|>"}, None, None),  # SmolLM2's: named, and never used
        ({"bos_token": "<|im_start|>"}, "<|im_start|>", 1),  # LLaMA-3's
        ({"bos_token": "<|im_start|>", "add_bos_token": True}, None, None),  # by the file alone
        ({"bos_token": {"content": "<|im_start|>", "__type": "AddedToken"}, "add_bos_token": True}, "<|im_start|>", 1),
        ({"bos_token": "<|im_start|>", "add_bos_token": False}, "<|im_start|>", 1),
        ({"bos_token": None}, "<|im_start|>", None),
    ],
)
def test_bos_is_what_texts_begin_with(tmp_path, config, bos, expected):
    """As in transformers, but for a BOS without a name, which is none."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(write_json_tokenizer(tmp_path, config={"eos_token": "<|im_end|>", **config}, bos=bos))
    ids = tokenizer.encode("granite", bos=False, eos=False)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (expected, 2)
    assert tokenizer.encode("granite", bos=True, eos=True) == [1] * (expected == 1) + ids + [2]
    assert 1 not in ids
    if config["bos_token"] is not None:
        reference = AutoTokenizer.from_pretrained(tmp_path)
        assert reference("granite")["input_ids"] == tokenizer.encode("granite", bos=True, eos=False)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}}, 0),
        ("config.json", {"eos_token_id": 2}, 2),
        ("config.json", {"eos_token_id": [2, 0]}, 2),
        ("config.json", {"eos_token_id": 10**6}, "no EOS of .*tokenizer.json is named in tokenizer_config.json"),
        ("config.json", {}, "no EOS of .*tokenizer.json is named in tokenizer_config.json"),
        ("tokenizer_config.json", {"eos_token": None}, "no EOS of .*tokenizer.json is named"),
        ("tokenizer_config.json", {"eos_token": "</s>"}, "tokenizer_config.json: eos_token '</s>' is no token of"),
        ("tokenizer_config.json", {"eos_token": 5}, "tokenizer_config.json: eos_token 5 is no token of"),
        ("tokenizer_config.json", [], "tokenizer_config.json must hold a JSON object"),
    ],
)
def test_eos_by_the_files_beside(tmp_path, name, fields, expected):
    path = write_json_tokenizer(tmp_path, config=None, generation=None)
    path.with_name(name).write_text(json.dumps(fields))
    if isinstance(expected, int):
        assert Tokenizer(path).eos_id == expected
    else:
        with pytest.raises(ValueError, match=expected):
            Tokenizer(path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 2}, (2, 0)),
        ({"eos_token_id": [0, 2, 0]}, {}, (2, 0)),
        ({"eos_token_id": 0}, {}, (2, 0)),
        ({}, {"eos_token_id": [1, 0]}, (2, 1, 0)),
        (None, None, (2,)),
        ({"eos_token_id": [2, 10**6]}, {}, "generation_config.json: eos_token_id 1000000 is no token of"),
        ({"eos_token_id": "<|im_end|>"}, {}, "generation_config.json: eos_token_id '<|im_end|>' is no token of"),
        ({}, {"eos_token_id": [True]}, "config.json: eos_token_id True is no token of"),
        ([], {}, "generation_config.json must hold a JSON object"),
    ],
)
def test_all_end_tokens_are_known(tmp_path, generation, config, expected):
    path = write_json_tokenizer(tmp_path, generation=generation)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    if isinstance(expected, tuple):
        assert open_tokenizer(path).stop_ids == expected
    else:
        with pytest.raises(ValueError, match=re.escape(expected)):
            open_tokenizer(path)


def test_lists_end_answers_beside_tokenizer_model(tiny_tokenizer, tmp_path):
    """But a lone control token does not: LLaMA-1's files in the wild say 0 or 1. Yi's is a user-defined piece."""
    path = tmp_path / "tokenizer.model"
    shutil.copyfile(tiny_tokenizer.path, path)
    for said, expected in (
        (1, (2,)),
        (0, (2,)),
        (None, (2,)),
        (10**6, (2,)),
        (7, (2, 7)),
        ([2, 7], (2, 7)),
        ([7, 8], (2, 7, 8)),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        assert open_tokenizer(path).stop_ids == expected


def test_added_tokens_that_are_not_special(tmp_path):
    """They are themselves in any text, as in transformers with `split_special_tokens`; and their text is their own."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(write_json_tokenizer(tmp_path))
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = f"granite {ADDED} <|im_end|> rock"
    for special in (False, True):
        ids = tokenizer.encode(text, bos=False, eos=False, special=special)
        assert ids == reference.encode(text, add_special_tokens=False, split_special_tokens=not special)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert tokenizer.special_tokens == {token: place for place, token in enumerate(SPECIAL)}
    assert tokenizer.added_tokens == {ADDED: tokenizer.vocab_size - 1}
    assert tokenizer.kind(tokenizer.vocab_size - 1) == "normal"
    assert tokenizer.piece_bytes(tokenizer.vocab_size - 1) == ADDED.encode()


def test_a_tokenizer_is_known_by_bos_and_eos_as_well(tmp_path, tiny_tokenizer):
    """Which stand beside tokenizer.json; a tokenizer.model says them itself."""
    path = write_json_tokenizer(tmp_path, bos="<|im_start|>")
    known = set()
    for bos, eos in ((None, "<|im_end|>"), ("<|im_start|>", "<|im_end|>"), (None, "<|endoftext|>")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
        known.add(Tokenizer(path).fingerprint())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos, "more": 1}))
    assert Tokenizer(path).fingerprint() in known
    assert len(known) == 3
    assert tiny_tokenizer.fingerprint() == sha256(tiny_tokenizer.path)


def test_ids_that_the_vocabulary_leaves_out(tmp_path):
    path = write_json_tokenizer(tmp_path)
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zebra"] = 500
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(path)
    assert tokenizer.vocab_size == 501
    assert (tokenizer.kind(450), tokenizer.piece(450), tokenizer.piece_bytes(450)) == ("unused", "[PAD450]", b"")
    assert tokenizer.decode([450, 500]) == "zebra"


def test_texts_are_neither_cut_nor_padded(tmp_path):
    """Whatever the file was saved with."""
    limits = {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 900}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    }  # fmt: skip
    tokenizer = Tokenizer(write_json_tokenizer(tmp_path, **limits))
    ids = tokenizer.encode("granite basalt quartz rock mineral", bos=False, eos=False)
    assert 2 < len(ids) < 900
    assert tokenizer.decode(ids) == "granite basalt quartz rock mineral"


def test_threads_do_not_switch_each_others_special_tokens(tmp_path):
    tokenizer = Tokenizer(write_json_tokenizer(tmp_path))
    texts = [("<|im_end|> granite" * 50, place % 2 == 0) for place in range(400)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda asked: tokenizer.encode(asked[0], bos=False, eos=False, special=asked[1]), texts)
    assert all((2 in ids) == special for ids, (_, special) in zip(found, texts, strict=True))


def test_half_a_surrogate_pair_is_named(tmp_path):
    tokenizer = Tokenizer(write_json_tokenizer(tmp_path))
    with pytest.raises(ValueError, match=r"the text is not UTF-8 \(at the end of 'granite \\ud800'\)"):
        tokenizer.encode("granite \ud800", bos=True, eos=False)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "tokenizer.json is not valid JSON"),
        ("{}", "tokenizer.json is not a tokenizer.json, or is damaged"),
        ("[]", "tokenizer.json is not a tokenizer.json, or is damaged"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "is not a tokenizer.json, or is damaged"),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
            "is neither byte-level BPE nor SentencePiece's",
        ),
        ('{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "is not a tokenizer.json, or is damaged"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "is not a tokenizer.json, or is damaged"),
        ("[" * 100_000, "tokenizer.json is nested too deeply"),
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_tokenizer_json(tmp_path, content, match):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        Tokenizer(tmp_path / "tokenizer.json")


def test_a_decoder_that_joins_words_is_refused(tmp_path):
    path = write_json_tokenizer(tmp_path, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(
        ValueError, match=r"is neither byte-level BPE nor SentencePiece's: its decoder is \['WordPiece'\]"
    ):
        Tokenizer(path)


def test_damaged_files_are_named(tmp_path):
    """Nor does the code in Rust, which may panic, end the interpreter."""
    path = write_json_tokenizer(tmp_path / "whole")
    command = [sys.executable, "-c", MUTATED.replace("m.model", "m.json"), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 200
    assert done.stdout.count("refused") > 100


@pytest.mark.parametrize("more", [False, True])
def test_a_directory_with_both_says_which_it_took(llama_tokenizer, llama, tmp_path, caplog, more):
    """tokenizer.model, as ever; but what someone added is in tokenizer.json alone."""
    for source in (llama_tokenizer.path, llama / "hub" / "tokenizer.json", llama / "hub" / "tokenizer_config.json"):
        name = "tokenizer.model" if source.suffix == ".model" else source.name
        shutil.copyfile(source, tmp_path / name)
    if more:
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        for place, text in enumerate(("<|im_start|>", "<|im_end|>"), start=32000):
            content["added_tokens"].append({**content["added_tokens"][0], "id": place, "content": text})
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with caplog.at_level("INFO", logger="k2mini"):
        path = tokenizer_file(tmp_path)
    assert path.name == ("tokenizer.json" if more else "tokenizer.model")
    (said,) = caplog.messages
    why = "tokenizer.json is taken, for it has <|im_end|>, <|im_start|> more"
    assert said.endswith(why if more else "tokenizer.model is taken, for it has all tokens of the other")
    assert Tokenizer(path).vocab_size == 32000 + 2 * more
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(
        ValueError, match=r"tokenizer.json is not a tokenizer.json, or is damaged; copy it again, or remove"
    ):
        tokenizer_file(tmp_path)


def test_one_file_is_taken_without_a_word(tiny_tokenizer, tmp_path, caplog):
    caplog.set_level("INFO", logger="k2mini")
    assert tokenizer_file(tmp_path) is None
    shutil.copyfile(tiny_tokenizer.path, tmp_path / "tokenizer.model")
    assert tokenizer_file(tmp_path) == tmp_path / "tokenizer.model"
    (tmp_path / "tokenizer.model").unlink()
    assert tokenizer_file(tmp_path) is None
    write_json_tokenizer(tmp_path)
    assert tokenizer_file(tmp_path) == tmp_path / "tokenizer.json"
    assert not caplog.messages
