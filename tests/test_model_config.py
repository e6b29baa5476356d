import json
import time

import pytest

from k2mini.architectures import ARCHITECTURES, LinearRopeScaling
from k2mini.model_config import PRESETS, ModelConfig, hf_config, read_model_config
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


SIZES = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99}
SIZES["num_attention_heads"] = 32
PUBLISHED = {  # what of their config.json says the shape
    "llama-3-8b": {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
                   "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "model_type": "llama",
                   "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32,
                   "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
                   "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256},
    "mistral-7b": {"architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
                   "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
                   "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
                   "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000},
    "qwen2.5-7b": {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
                   "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072,
                   "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
                   "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
                   "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064},
}  # fmt: skip


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


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_as_published(preset, tmp_path):
    assert read(tmp_path, PUBLISHED[preset]) == PRESETS[preset]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_left_out_is_as_transformers_takes_it(kind, tmp_path):
    from transformers import AutoConfig

    theirs, ours = AutoConfig.for_model(kind, **SIZES), read(tmp_path, {"model_type": kind, **SIZES})
    assert ours.model_type == kind
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 128 // 32)
    assert (ours.max_seq_len, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


def test_a_mistral_without_a_window_stays_one(tmp_path):
    config = read(tmp_path, {**PUBLISHED["mistral-7b"], "sliding_window": None})
    assert (config.sliding_window, config.model_type) == (None, "mistral")
    fields = hf_config(config, "float32", 1, 2)
    assert (fields["model_type"], fields["sliding_window"]) == ("mistral", None)
    assert read(tmp_path, fields) == config


def test_linear_scaling_as_transformers_4_spelled_it(tmp_path):
    config = read(tmp_path, {**LLAMA_1, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == LinearRopeScaling(2.0)
    assert read(tmp_path, hf_config(config, "float32", 1, 2)) == config


def test_hashes_of_llamas_are_those_of_before(tmp_path):
    """Of runs of `eval` and lists of prompts that a version without these features began."""
    names = "dim num_layers num_heads num_kv_heads head_dim intermediate_dim vocab_size max_seq_len rope_theta"
    assert " ".join(read(tmp_path, LLAMA_1).features()) == f"{names} rope_scaling norm_eps tie_embeddings"
    assert tiny_config(sliding_window=9).features()["sliding_window"] == 9


def test_features_that_no_architecture_has_together():
    for changes in ({"qk_norm": True, "attention_bias": True}, {"sliding_window": 4, "model_type": "llama"}):
        with pytest.raises(ValueError, match=r"has attention_bias .*, qk_norm .* and sliding_window"):
            tiny_config(**changes)
    with pytest.raises(ValueError, match="sliding_window must be positive, not 0"):
        ModelConfig(**{**tiny_config().features(), "sliding_window": 0})


QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
         "'mixtral', architecture MixtralForCausalLM; .* of model_type llama, mistral, qwen2, qwen3 only"),
        ({"model_type": "mistral"}, "model_type is 'mistral', architecture LLaMAForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "gpt2", "architectures": None}, "model_type is 'gpt2'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor must be at least 1, not 0.5"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "values of its own for 'full_attention'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"is_causal": False}, "is_causal is False"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types is .* has 'full_attention' in all layers"),
        ({**QWEN3, "attention_bias": True}, "attention_bias is True; k2mini's qwen3 supports False only"),
        ({**QWEN3, "use_sliding_window": True}, "use_sliding_window is True"),
        ({**QWEN3, "use_mrope": True}, "use_mrope is True"),
        ({**QWEN3, "layer_types": ["full_attention"] * 31 + ["sliding_attention"]}, "layer_types is"),
        ({**QWEN3, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        ({"model_type": "mistral", "architectures": None, "layer_types": ["full_attention"] * 32}, "layer_types is"),
        ({"model_type": "mistral", "architectures": None, "sliding_window": "all"}, "sliding_window must be a whole"),
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
