"""The model against transformers, against a naive reference, and against itself with a cache or padding."""

import pytest
import torch

from k2mini.build import load_model
from k2mini.config import IGNORE_INDEX
from k2mini.model_config import PRESETS
from k2mini.nn.init import init_weights
from k2mini.nn.kv_cache import KVCache
from k2mini.nn.llama import Llama, document_bounds
from tests.conftest import tiny_config, tiny_llama
from tests.helpers import loss_and_gradients
from tests.reference import naive_logits, to_transformers


def tokens_like(config, *size, seed=0):
    return torch.randint(config.vocab_size, size, generator=torch.Generator().manual_seed(seed))


def test_logits_and_hidden_states_equal_transformers(shape):
    model = tiny_llama(shape)
    tokens = tokens_like(shape, 2, 150)
    hidden = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    with torch.no_grad():
        logits = model(tokens)
        reference = to_transformers(model)(tokens, output_hidden_states=True)
    assert logits.std() > 0.5  # the tolerance below means something
    torch.testing.assert_close(logits, reference.logits, rtol=0, atol=1e-5)
    # transformers gives the embeddings first, and the last layer's output after the final norm.
    for ours, theirs in zip(hidden[:-1], reference.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.model.norm(hidden[-1]), reference.hidden_states[-1], rtol=0, atol=1e-5)


def test_gradients_equal_transformers(shape):
    model = tiny_llama(shape)
    reference = to_transformers(model)
    tokens = tokens_like(shape, 2, 40)
    labels = tokens[:, 1:]
    (model.loss(tokens[:, :-1], None, labels) / labels.numel()).backward()
    reference(tokens, labels=tokens).loss.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-5, msg=name)


def test_fp64_equals_the_naive_reference(shape):
    model = tiny_llama(shape, dtype=torch.float64)
    tokens = tokens_like(shape, 120)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None])[0], naive_logits(model, tokens), rtol=0, atol=1e-10)


def test_real_model_equals_transformers(real_model):
    from transformers import LlamaForCausalLM

    model, tokenizer = load_model(real_model)
    reference = LlamaForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    text = "Granite is an intrusive igneous rock. It is made of quartz, feldspar and mica, which cooled slowly. " * 4
    tokens = torch.tensor([tokenizer.encode(text, bos=True, eos=False)])
    with torch.inference_mode():
        ours, theirs = model(tokens), reference(tokens).logits
    assert theirs.abs().max() > 10
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    prompt = tokens[:, :12]
    with torch.inference_mode():
        greedy = reference.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    from k2mini.inference.decoding import Decoding
    from k2mini.inference.generate import generate

    (completion,) = generate(model, prompt.tolist(), Decoding(24), stop_ids=[tokenizer.eos_id])
    assert completion.tokens == greedy[0, 12:].tolist()


def test_cached_decoding_equals_recomputation(shape):
    model = tiny_llama(shape, dtype=torch.float64)
    tokens = tokens_like(shape, 2, 60)
    cache = KVCache(shape, 2, dtype=torch.float64, capacity=8)
    with torch.no_grad():
        full = model(tokens)
        # A prefill, a chunk that continues it, and one token at a time.
        pieces = [model(tokens[:, :20], cache=cache), model(tokens[:, 20:45], cache=cache)]
        pieces += [model(tokens[:, i : i + 1], cache=cache) for i in range(45, 60)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=1e-10)


def greedy_tokens(model, logits, cache):
    """(B, 8): the likeliest continuation of every row in the cache."""
    tokens = []
    for _ in range(8):
        tokens.append(logits.argmax(dim=-1))
        logits = model(tokens[-1][:, None], cache=cache)[:, -1]
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_their_own_logits(shape, side):
    model = tiny_llama(shape)
    lengths = [5, 40, 23]
    rows = [tokens_like(shape, length, seed=length) for length in lengths]
    tokens = torch.zeros(3, 40, dtype=torch.int64)
    positions = torch.full((3, 40), -1)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(40 - len(row), 40)
        tokens[i, place] = row
        positions[i, place] = torch.arange(len(row))
    cache = KVCache(shape, 3)
    with torch.no_grad():
        uncached, cached = model(tokens, positions), model(tokens, positions, cache)
        greedy = greedy_tokens(model, cached[torch.arange(3), positions.argmax(dim=1)], cache.select(torch.arange(3)))
        following = tokens_like(shape, 3, 7, seed=9)
        decoded = [model(following[:, i : i + 1], cache=cache) for i in range(7)]
        for i, row in enumerate(rows):
            alone = model(torch.cat((row, following[i]))[None])[0]
            own = positions[i] >= 0
            torch.testing.assert_close(uncached[i, own], alone[: len(row)], rtol=0, atol=1e-5)
            torch.testing.assert_close(cached[i, own], alone[: len(row)], rtol=0, atol=1e-5)
            torch.testing.assert_close(torch.cat(decoded, 1)[i], alone[len(row) :], rtol=0, atol=1e-5)
            own_cache = KVCache(shape, 1)
            last = model(row[None], cache=own_cache)[:, -1]
            assert greedy[i].tolist() == greedy_tokens(model, last, own_cache)[0].tolist()
    assert torch.isfinite(uncached).all()
    assert torch.isfinite(cached).all()


def test_documents_in_one_row_do_not_see_each_other(shape):
    model = tiny_llama(shape, dtype=torch.float64)
    documents = [tokens_like(shape, length, seed=length) for length in (13, 1, 22)]
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    with torch.no_grad():
        packed = model(torch.cat(documents)[None], positions[None])[0]
        alone = torch.cat([model(document[None])[0] for document in documents])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("preset", "parameters"), [
    ("llama-7b", 6_738_415_616), ("llama-13b", 13_015_864_320), ("llama-3-8b", 8_030_261_248),
    ("mistral-7b", 7_241_732_096), ("qwen2.5-7b", 7_615_616_512),
])  # fmt: skip
def test_presets_have_the_papers_size(preset, parameters):
    with torch.device("meta"):
        model = Llama(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert PRESETS[preset].num_parameters() == parameters


def test_a_fresh_models_biases_are_zero_and_its_norms_one():
    model = Llama(tiny_config(attention_bias=True))
    init_weights(model, 0)
    found = {name: set(p.tolist()) for name, p in model.named_parameters() if p.ndim == 1}
    assert all(values == {0.0 if name.endswith("bias") else 1.0} for name, values in found.items())


def test_num_parameters_counts_every_shape(shape):
    assert shape.num_parameters() == sum(p.numel() for p in Llama(shape).parameters())


def test_documents_one_by_one_equal_documents_under_a_mask(shape):
    """Rows that begin within a document, end in padding, or are nothing else."""
    model = tiny_llama(shape, dtype=torch.float64)
    positions = torch.tensor(
        [[0, 1, 2, 3, 0, 1, 0, 0, 1, 2], [2, 3, 0, 1, 2, 3, 4, -1, -1, -1], [0, 1, 2, -1, -1, -1, -1, -1, -1, -1]]
    )
    assert document_bounds(positions).diff().tolist() == [4, 2, 1, 3, 2, 5, 3, 3, 7]
    tokens, labels = tokens_like(shape, 3, 10), tokens_like(shape, 3, 10, seed=1)
    labels[positions < 0] = IGNORE_INDEX
    results = []
    for by_document in (False, True):
        model.model.by_document = by_document
        results.append(loss_and_gradients(model, tokens, positions, labels))
    for masked, alone in zip(*results, strict=True):
        torch.testing.assert_close(alone, masked, rtol=0, atol=1e-12)


def test_bf16_norm_multiplies_after_the_cast():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from k2mini.nn.llama import RMSNorm

    ours, theirs = RMSNorm(64, 1e-6).bfloat16(), LlamaRMSNorm(64, 1e-6).bfloat16()
    weight, x = torch.randn(64).bfloat16(), torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"dim": 0}, "dim must be positive, not 0"),
        ({"norm_eps": -1.0}, "norm_eps"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_misfitting_inputs_are_refused():
    model = tiny_llama()
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="positions"):
        model(tokens, torch.arange(4)[None])
    with pytest.raises(ValueError, match="cache of 3 rows"):
        model(tokens, cache=KVCache(model.config, 3))
    with pytest.raises(ValueError, match="44 more than the model's context of 256"):
        model(torch.zeros(1, 300, dtype=torch.int64), cache=KVCache(model.config, 1))
