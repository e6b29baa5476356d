import json

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
    from transformers import LlamaConfig

    for changes in SHAPES.values():
        config = tiny_config(**changes)
        LlamaConfig(**hf_config(config, "float32", 1, 2)).save_pretrained(tmp_path)
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
