"""A tokenizer goes along wherever a model is written, with its template and all tokens that end an answer."""

import json
import shutil

import pytest

from k2mini.build import load_model
from k2mini.config import LoraSection
from k2mini.data.tokenizer import Tokenizer, open_tokenizer
from k2mini.nn.lora import adapter_tensors, attach
from k2mini.weights.adapter import save_adapter
from k2mini.weights.convert import convert
from k2mini.weights.delta import apply_delta, make_delta
from k2mini.weights.info import describe_directory, inspect_directory
from k2mini.weights.merge import merge_adapters
from k2mini.weights.model_directory import ModelDirectory
from k2mini.weights.model_files import save_model
from tests.conftest import make_tokenizer, tiny_config, tiny_llama
from tests.helpers import one_step
from tests.json_tokenizer import CONFIG, GENERATION, TEMPLATE, write_json_tokenizer

TEXT = "granite <|im_end|> is made of quartz 岩石\n\n  12"


def assert_same_tokenizer(one, other):
    """Here, and in transformers."""
    from transformers import AutoTokenizer

    ours = [ModelDirectory(folder).require_tokenizer() for folder in (one, other)]
    theirs = [AutoTokenizer.from_pretrained(folder) for folder in (one, other)]
    for tokenizer, reference in zip(ours, theirs, strict=True):
        assert tokenizer.path.read_bytes() == ours[0].path.read_bytes()
        assert tokenizer.stop_ids == ours[0].stop_ids
        assert (tokenizer.bos_id, tokenizer.eos_id) == (ours[0].bos_id, ours[0].eos_id)
        assert reference.chat_template == theirs[0].chat_template
        assert reference(TEXT)["input_ids"] == theirs[0](TEXT)["input_ids"]
        assert reference(TEXT)["input_ids"] == tokenizer.encode(TEXT, bos=True, eos=False, special=True)


@pytest.fixture
def folder(tmp_path):
    """Two models with one tokenizer.json, whose template stands in tokenizer_config.json."""
    write_json_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = open_tokenizer(tmp_path / "tokenizer" / "tokenizer.json")
    config = tiny_config(vocab_size=tokenizer.vocab_size + 3)
    for seed, name in enumerate(("base", "tuned")):
        save_model(tiny_llama(config, seed=seed).state_dict(), config, tmp_path / name, tokenizer=tokenizer)
    return tmp_path


def test_what_belongs_to_it_is_written(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (folder / "base" / name).read_bytes() == (folder / "tokenizer" / name).read_bytes()
    assert json.loads((folder / "base" / "generation_config.json").read_text()) == {"bos_token_id": None, **GENERATION}
    assert not (folder / "base" / "tokenizer.model").exists()
    assert {"tokenizer.json", "tokenizer_config.json"} <= ModelDirectory(folder / "base").manifest["files"].keys()
    assert_same_tokenizer(folder / "base", folder / "tuned")
    assert ModelDirectory(folder / "base").require_tokenizer().stop_ids == (2, 0)
    assert load_model(folder / "base")[1].decode([2, 4]) == '"'


def test_convert_delta_and_merge(folder):
    convert(folder / "base", "hf", folder / "hf")
    convert(folder / "base", "bin", folder / "bin")
    make_delta(folder / "base", folder / "tuned", folder / "delta")
    apply_delta(folder / "base", folder / "delta", folder / "applied")
    model = tiny_llama(ModelDirectory(folder / "base").config)
    section = LoraSection(rank=2)
    attach(model, section)
    for tensor in adapter_tensors(model).values():
        tensor.data.fill_(0.01)
    save_adapter(adapter_tensors(model), section, folder / "adapter", base=str(folder / "base"))
    merge_adapters(folder / "base", [folder / "adapter"], folder / "merged")
    for name in ("hf", "bin", "delta", "applied", "merged"):
        assert (folder / name / "tokenizer_config.json").read_bytes() == json.dumps(CONFIG).encode()
        assert (folder / name / "generation_config.json").read_bytes() == (
            folder / "base" / "generation_config.json"
        ).read_bytes()
        assert_same_tokenizer(folder / "base", folder / name)


def test_pretraining_ends_with_it(folder, run):
    """Documents are prepared with it, its corpus is refused with another's model, and the model written has it."""
    (folder / "text.txt").write_text("granite is made of quartz. " * 40)
    settings = one_step(folder, folder / "base", path=str(folder / "text.txt"), seq_len=16)
    status, _, err = run("pretrain", settings)
    assert status == 0, err
    assert_same_tokenizer(folder / "base", folder / "run" / "model")
    assert run("prepare", folder / "text.txt", "--tokenizer", folder / "base", "--out", folder / "corpus")[0] == 0
    (folder / "base" / "manifest.json").unlink()
    shutil.rmtree(folder / "run" / "model")
    for changes in ({"config": {**CONFIG, "eos_token": "<|endoftext|>"}}, {"normalizer": {"type": "NFC"}}):
        write_json_tokenizer(folder / "base", **changes)
        status, _, err = run("pretrain", settings, f"data.path={folder}/corpus", f"run.dir={folder}/other")
        assert status == 2
        assert f"corpus was prepared with another tokenizer than {folder / 'base' / 'tokenizer.json'}" in err
        status, _, err = run("pretrain", settings)
        assert status == 2
        assert "another tokenizer; set run.dir" in err


def test_meta_and_back(folder, caplog):
    """Meta's own code has no use for it; k2mini finds it there again."""
    convert(folder / "base", "meta", folder / "meta")
    assert "Meta's code reads tokenizer.model" in caplog.text
    convert(folder / "meta", "hf", folder / "again")
    assert_same_tokenizer(folder / "base", folder / "again")
    assert json.loads((folder / "again" / "generation_config.json").read_text())["temperature"] == 0.7


def test_without_what_is_usually_beside(tmp_path):
    """End tokens by config.json alone, and a template in a file of its own."""
    path = write_json_tokenizer(tmp_path / "tokenizer", config=None, generation=None)
    (tmp_path / "tokenizer" / "config.json").write_text('{"eos_token_id": [2, 0]}')
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = open_tokenizer(path)
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "model", tokenizer=tokenizer)
    opened = ModelDirectory(tmp_path / "model").require_tokenizer()
    assert (opened.bos_id, opened.stop_ids) == (None, (2, 0))
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == TEMPLATE
    convert(tmp_path / "model", "hf", tmp_path / "copy")
    assert_same_tokenizer(tmp_path / "model", tmp_path / "copy")


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_sentencepiece_model_keeps_its_template(tmp_path, file):
    """And its end tokens; without them, all that is written is what it was."""
    plain = make_tokenizer(tmp_path / "tokenizer")
    config = tiny_config(vocab_size=plain.vocab_size)
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "plain", tokenizer=plain)
    assert json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text()) == plain.hf_config()
    written = (tmp_path / "plain" / "generation_config.json").read_text()
    assert written == '{\n  "bos_token_id": 1,\n  "eos_token_id": 2\n}\n'
    own = json.dumps({"chat_template": TEMPLATE, "bos_token": "x"}) if file.endswith("json") else TEMPLATE
    (tmp_path / "tokenizer" / file).write_text(own)
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": [2, 7], "top_p": 0.5}')
    tokenizer = open_tokenizer(plain.path)
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "model", tokenizer=tokenizer)
    convert(tmp_path / "model", "hf", tmp_path / "copy")
    for name in ("model", "copy"):
        fields = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert fields.pop("chat_template", TEMPLATE) == TEMPLATE
        assert fields == plain.hf_config()
        assert (tmp_path / name / "chat_template.jinja").exists() == file.endswith("jinja")
        assert json.loads((tmp_path / name / "generation_config.json").read_text()) == {
            "bos_token_id": 1,
            "eos_token_id": [2, 7],
        }
        assert ModelDirectory(tmp_path / name).require_tokenizer().stop_ids == (2, 7)


def test_info_names_it(folder):
    found = inspect_directory(folder / "base")
    tokens = found["shape"]["vocab_size"] - 3
    assert found["tokenizer"] == {"tokens": tokens, "bos": None, "eos": 2}
    assert f"tokenizer: {tokens} tokens, no BOS, EOS 2" in describe_directory(found)


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (399, True), (512, True), (513, False), (-1, False)])
def test_vocabularies_are_padded(tmp_path, spare, fits):
    """Qwen2.5's by 399 rows."""
    tokenizer = Tokenizer(write_json_tokenizer(tmp_path / "tokenizer"))
    config = tiny_config(vocab_size=tokenizer.vocab_size + spare)
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "model", tokenizer=tokenizer)
    directory = ModelDirectory(tmp_path / "model")
    if fits:
        assert directory.require_tokenizer().vocab_size == tokenizer.vocab_size
    else:
        match = r"tokenizer.json has [\d,]+ tokens, the embedding has [\d,]+ rows; this tokenizer belongs to another"
        with pytest.raises(ValueError, match=match):
            directory.require_tokenizer()


def test_another_tokenizer_than_the_manifests_is_refused(folder):
    path = folder / "base" / "tokenizer.json"
    path.write_text(path.read_text().replace("granite", "granate"))
    with pytest.raises(ValueError, match=r"tokenizer.json is not the one that manifest.json has the hash of"):
        ModelDirectory(folder / "base").require_tokenizer()


def test_config_json_that_disagrees_is_named(folder, caplog):
    path = folder / "base" / "config.json"
    for said, logged in ((2, ""), ([0, 2], ""), (0, ""), ([0], "eos_token_id [0], tokenizer.json says 2")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": said, "bos_token_id": 0}))
        caplog.clear()
        ModelDirectory(folder / "base").require_tokenizer()
        assert logged in caplog.text
        assert bool(logged) == bool(caplog.text)


DIGITS = {"type": "Digits", "individual_digits": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}  # as older files have it


def qwen2(pattern="\\p{N}"):
    """The pre-tokenizer of Qwen2's tokenizer.json; LLaMA-3's has another number of digits."""
    regex = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + pattern + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "gpt-2"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}}, "smollm"),
        ({"pre_tokenizer": qwen2()}, "qwen2"),
        ({"pre_tokenizer": qwen2(r"\p{N}{1,3}")}, "llama-bpe"),
    ],
    ids=["gpt-2", "smollm", "qwen2", "llama-bpe"],
)
def test_gguf_has_the_vocabulary(tmp_path, change, name):
    import gguf

    tokenizer = open_tokenizer(write_json_tokenizer(tmp_path / "tokenizer", **change))
    config = tiny_config(vocab_size=tokenizer.vocab_size + 3)
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "model", tokenizer=tokenizer)
    convert(tmp_path / "model", "gguf", tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    content = json.loads(tokenizer.path.read_text())
    tokens = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.tokens"] == [*tokens, *(f"[PAD{len(tokens) + n}]" for n in range(3))]
    assert found["tokenizer.ggml.token_type"] == [3] * 3 + [1] * (len(tokens) - 4) + [4] + [5] * 3
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in content["model"]["merges"]]
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (2, False)
    assert "tokenizer.ggml.bos_token_id" not in found
    assert found["tokenizer.chat_template"] == TEMPLATE


@pytest.mark.parametrize("change", ["space", "unknown", "metaspace"])
def test_gguf_without_a_name_for_what_cuts_texts(tmp_path, change):
    changes = {
        "space": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
        "unknown": {"pre_tokenizer": qwen2(r"\p{N}{1,2}")},
        "metaspace": {"pre_tokenizer": None, "decoder": {"type": "Metaspace", "replacement": "▁",
                                                         "prepend_scheme": "always", "split": True}},
    }  # fmt: skip
    tokenizer = open_tokenizer(write_json_tokenizer(tmp_path / "tokenizer", **changes[change]))
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "model", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"GGUF has no name that k2mini knows for how .*tokenizer.json cuts texts"):
        convert(tmp_path / "model", "gguf", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
