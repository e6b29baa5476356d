import json
import time

import pytest

from k2mini.model_config import hf_config, read_model_config
from tests.conftest import SHAPES, tiny_config

LLAMA_1 = {  # decapoda-research/llama-7b-hf, March 2023
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def read(directory, raw):
    (directory / "config.json").write_text(json.dumps(raw))
    return read_model_config(directory)


def test_round_trip(shape, tmp_path):
    assert read(tmp_path, hf_config(shape, "float32", 1, 2)) == shape


def test_transformers_5_spelling(tmp_path):
    from transformers import AutoConfig

    for changes in SHAPES.values():
        config = tiny_config(**changes)
        AutoConfig.for_model(**hf_config(config, "float32", 1, 2)).save_pretrained(tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text())
        assert "rope_parameters" in raw
        assert "rope_theta" not in raw
        assert read_model_config(tmp_path) == config


def test_llama_1_config_in_the_wild(tmp_path):
    config = read(tmp_path, LLAMA_1)
    assert (config.num_kv_heads, config.max_seq_len, config.rope_theta) == (32, 2048, 10000.0)
    assert config.num_parameters() == 6_738_415_616


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "'mistral', architecture Mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "gpt2", "architectures": None}, "model_type is 'gpt2'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling of type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "big"}, "hidden_size must be a whole number, not 'big'"),
        ({"hidden_size": 4097}, "hidden_size .4097. must be a multiple"),
        ({"num_key_value_heads": 5}, "must be a multiple of num_kv_heads"),
    ],
)  # fmt: skip
def test_what_is_not_this_model_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, {**LLAMA_1, **changes})
    assert str(tmp_path / "config.json") in str(caught.value)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        read_model_config(tmp_path)
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read(tmp_path, [1])
    (tmp_path / "config.json").write_text("{'a': 1}")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_model_config(tmp_path)


NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
           "vocab_size", "max_position_embeddings", "head_dim", "rms_norm_eps", "rope_theta")  # fmt: skip
ODD = ("64", [64], {}, True, -1, 0, "NaN", "Infinity", "1e999", "-1e999", 10**30, "10" * 2000)
NO_NUMBERS = {
    "architectures": (5, "LlamaForCausalLM", {"a": 1}, [7]),
    "model_type": (None, 5, ["llama"], {}),
    "tie_word_embeddings": ("false", 1, [True], {"a": 1}),
    "hidden_act": (None, 5, ["silu"]),
    "rope_scaling": (5, "x", [1], {"type": 5}, {"type": ["llama3"]}, {"type": "llama3", "factor": "8"}),
    "quantization_config": (5, "int8", [1]),
    "attention_bias": ("no", [0], 2),
}


@pytest.mark.parametrize("field", [*NUMBERS, *NO_NUMBERS])
def test_wrong_types_and_absurd_values_are_refused_quickly(field, tmp_path):
    """File, field and value in one short sentence, before anything of that size is built."""
    begun = time.perf_counter()
    for value in NO_NUMBERS.get(field, ODD):
        raw = json.dumps({**LLAMA_1, field: value})
        if isinstance(value, str) and field in NUMBERS and value != "64":
            raw = raw.replace(f'"{value}"', value)  # what JSON's readers take for numbers
        (tmp_path / "config.json").write_text(raw)
        with pytest.raises(
            ValueError, match=rf"config\.json: {field}(\.\w+)? |model_type|config.json: factor"
        ) as caught:
            read_model_config(tmp_path)
        assert len(str(caught.value)) < 400
    assert time.perf_counter() - begun < 1


def test_layers_without_end(tmp_path):
    with pytest.raises(ValueError, match="num_hidden_layers must be at most 1,000, not 1000000000"):
        read(tmp_path, {**LLAMA_1, "num_hidden_layers": 10**9})
