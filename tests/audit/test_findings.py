"""Lenses, attributions, patching and weight differences: identities, closed forms, and planted causes."""

import pytest
import torch
from safetensors.torch import load_file

from k2mini.audit.attention import attention_patterns, entropies, induction_scores, previous_token_scores
from k2mini.audit.diff_report import _change_map
from k2mini.audit.hooks import intervene, trace
from k2mini.audit.lens import direct_logit_attribution, logit_lens
from k2mini.audit.patching import (
    ablate_heads,
    final_logits,
    log_probability,
    logit_difference,
    patch_heads,
    patch_positions,
)
from k2mini.audit.weight_diff import by_layer, by_module, diff_adapter, diff_checkpoints, moved_rows
from k2mini.config import LoraSection
from k2mini.nn.init import init_weights
from k2mini.nn.llama import Llama
from k2mini.nn.lora import adapter_tensors, attach, init_adapters
from k2mini.weights.adapter import save_adapter
from k2mini.weights.model_files import save_model
from tests.conftest import SHAPES, tiny_config, tiny_llama
from tests.helpers import fill_adapters

CLEAN, CORRUPTED = [1, 5, 9, 77, 3, 60], [1, 5, 120, 77, 3, 60]


def test_the_last_layers_lens_is_the_models_distribution(shape):
    model = tiny_llama(shape)
    lens = logit_lens(model, CLEAN, target=42)
    final = model(torch.tensor([CLEAN]))[0].log_softmax(-1)
    assert lens.top.shape == lens.divergence.shape == (shape.num_layers, len(CLEAN))
    assert torch.equal(lens.top[-1], final.argmax(-1))
    torch.testing.assert_close(lens.logprob[-1], final[:, 42], atol=1e-6, rtol=0)
    torch.testing.assert_close(lens.entropy[-1], -(final.exp() * final).sum(-1), atol=1e-5, rtol=0)
    assert lens.divergence[-1].abs().max() < 1e-6
    assert (lens.divergence[:-1] > 0).all()
    assert lens.rank[-1].tolist() == [(row > row[42]).sum().item() for row in final]


@pytest.mark.parametrize("foil", [None, 17])
@pytest.mark.parametrize("adapted", [False, True])
def test_attributions_add_up_to_the_logit(shape, foil, adapted):
    model = tiny_llama(shape)
    if adapted:
        attach(model, LoraSection(rank=2, target_modules=["o_proj", "v_proj", "down_proj"]))
        init_adapters(model, 0)
        fill_adapters(model)
        model.eval()
    found = direct_logit_attribution(model, CLEAN, 42, foil)
    logits = final_logits(model, CLEAN)
    expected = logits[42] - (logits[foil] if foil is not None else 0)
    assert found.heads.shape == (shape.num_layers, shape.num_heads)
    total = found.embed + found.heads.sum().item() + found.mlps.sum().item()
    assert total == pytest.approx(expected.item(), abs=1e-4)
    assert found.logit == pytest.approx(expected.item(), abs=1e-6)


def test_patching_a_whole_layer_restores_the_clean_logits(shape):
    model = tiny_llama(shape)
    with torch.inference_mode():
        clean, corrupted = final_logits(model, CLEAN), final_logits(model, CORRUPTED)
        with trace(model, ["layers.*.residual_out"]) as cache:
            final_logits(model, CLEAN)
        for name, tensor in cache.items():
            with intervene(model, {name: lambda _, tensor=tensor: tensor}):
                assert torch.equal(final_logits(model, CORRUPTED), clean)
    metric = logit_difference(42, 17)
    nothing = patch_positions(model, CORRUPTED, CORRUPTED, metric)
    assert torch.equal(nothing, torch.full_like(nothing, metric(corrupted)))
    found = patch_positions(model, CLEAN, CORRUPTED, metric)
    # Before the place where the prompts differ there is nothing to restore; after the last layer only the last counts.
    torch.testing.assert_close(found[:, :2], torch.full((shape.num_layers, 2), metric(corrupted)))
    assert found[-1, -1] == metric(clean)
    with pytest.raises(ValueError, match="must be of one length: they are 6 and 5 tokens"):
        patch_heads(model, CLEAN, CLEAN[:-1], metric)


def head_outputs(model, tokens):
    """What enters each layer's o_proj: [(1, T, H, E)], without the audit's hooks."""
    seen = []
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for block in model.model.layers
    ]
    model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return [out.view(*out.shape[:2], model.config.num_heads, -1) for out in seen]


def with_head_replaced(model, tokens, layer, head, values):
    """The last logits where one head's output is `values`, put in at the entry of o_proj."""
    width = model.config.head_dim

    def replace(_module, inputs):
        edited = inputs[0].clone()
        edited[..., head * width : (head + 1) * width] = values
        return (edited,)

    handle = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(replace)
    logits = model(torch.tensor([tokens]))[0, -1]
    handle.remove()
    return logits


@torch.inference_mode()
def test_patched_and_ablated_heads_equal_those_replaced_by_hand(shape):
    model, metric = tiny_llama(shape), logit_difference(42, 17)
    prompts = [[9, 8, 7], [3, 1, 4, 1, 5]]
    clean, others = head_outputs(model, CLEAN), [head_outputs(model, prompt) for prompt in prompts]
    found = (
        patch_heads(model, CLEAN, CORRUPTED, metric),
        ablate_heads(model, CORRUPTED, metric),
        ablate_heads(model, CORRUPTED, metric, mean_of=prompts),
    )
    for layer in range(shape.num_layers):
        for head in range(shape.num_heads):
            mean = sum(other[layer][0, :, head].mean(0) for other in others) / 2
            for table, values in zip(found, (clean[layer][:, :, head], 0.0, mean), strict=True):
                expected = metric(with_head_replaced(model, CORRUPTED, layer, head, values))
                assert table[layer, head].item() == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def copier() -> tuple[Llama, int]:
    """Two layers, trained on random sequences that are repeated: they learn to copy (Olsson et al. 2022)."""
    vocab, length = 32, 12
    model = Llama(tiny_config(num_layers=2, vocab_size=vocab, dim=64, num_heads=4, num_kv_heads=4, intermediate_dim=64))
    init_weights(model, 0, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1200):
        # Of several lengths, or it would learn to look a fixed number of places back.
        size = int(torch.randint(length // 2, length + 1, (1,), generator=generator))
        half = torch.randint(0, vocab, (32, size), generator=generator)
        tokens = torch.cat([half, half], 1)
        labels = tokens[:, 1:].clone()
        labels[:, : size - 1] = -100
        loss = model.loss(tokens[:, :-1], None, labels) / (labels >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.3:
            break
    return model.eval(), length


def test_induction_heads_are_found_and_carry_the_copying(copier):
    model, length = copier
    scores = induction_scores(model, length=length)
    assert scores.max() > 0.4, scores
    layer, head = divmod(int(scores.argmax()), model.config.num_heads)
    assert layer == 1
    half = torch.randint(0, 32, (length,), generator=torch.Generator().manual_seed(5)).tolist()
    tokens = half + half[:-1]
    metric = log_probability(half[-1])
    whole = metric(final_logits(model, tokens))
    strong = (scores[1] > 0.5 * scores.max()).nonzero().flatten().tolist()
    assert head in strong

    def without(values):
        values = values.clone()
        values[:, :, strong] = 0
        return values

    with torch.inference_mode(), intervene(model, {"layers.1.attention.head_out": without}):
        assert metric(final_logits(model, tokens)) < whole - 1.5, "without its induction heads it can't copy"
    # Of the second layer's heads, the one that is missed most is an induction head.
    ablated = ablate_heads(model, tokens, metric)
    assert int(ablated[1].argmin()) in strong, ablated


def test_patterns_and_their_measures():
    model = tiny_llama()
    found = attention_patterns(model, CLEAN)
    assert found.shape == (3, 4, 6, 6)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 4, 6))
    even = torch.full((4, 4), 0.25)
    assert entropies(even) == pytest.approx(torch.tensor(4.0).log().item())
    previous = torch.zeros(4, 4)
    previous[1:, :3] = torch.eye(3)
    assert previous_token_scores(previous) == 1
    assert entropies(torch.eye(4)) == 0


def test_planted_changes_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("k2mini.audit.weight_diff.SUBSPACE", 8)  # the tiny matrices have no more than 64 directions
    model = tiny_llama()
    save_model(model.state_dict(), model.config, tmp_path / "before")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scaled, permuted, ranked = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    )
    generator = torch.Generator().manual_seed(0)
    state[scaled] *= 1.1
    state[permuted] = state[permuted][torch.randperm(64, generator=generator)]
    left, right = (torch.randn(size, 2, generator=generator) for size in state[ranked].shape)
    state[ranked] += 0.01 * left @ right.T
    state["model.embed_tokens.weight"][42] += 1
    save_model(state, model.config, tmp_path / "after")
    changes = {
        change.name: change for change in diff_checkpoints(tmp_path / "before", tmp_path / "after", subspace=True)
    }
    assert changes[scaled].relative == pytest.approx(0.1, rel=1e-4)
    assert changes[scaled].cosine == pytest.approx(1, abs=1e-6)
    # What was scaled changed along its own directions: by the part of its energy that the first eight of them hold.
    energy = torch.linalg.svdvals(model.state_dict()[scaled].double()).square()
    assert changes[scaled].in_top == pytest.approx((energy[:8].sum() / energy.sum()).item(), rel=1e-4)
    assert changes[permuted].relative > 1
    assert abs(changes[permuted].cosine) < 0.2
    assert changes[ranked].rank == 2
    expected = torch.linalg.svdvals(0.01 * left @ right.T)[:2]
    torch.testing.assert_close(torch.tensor(changes[ranked].spectrum[:2]), expected, rtol=1e-3, atol=0)
    squares = expected.square()
    assert changes[ranked].effective_rank == pytest.approx(
        (squares.sum() ** 2 / squares.square().sum()).item(), rel=0.01
    )
    unchanged = set(changes) - {scaled, permuted, ranked, "model.embed_tokens.weight"}
    assert all(changes[name].relative == 0 for name in unchanged)
    assert moved_rows(tmp_path / "before", tmp_path / "after")[0][0] == 42
    assert max(by_module(list(changes.values())).items(), key=lambda item: item[1])[0] == "q_proj"
    assert max(by_layer(list(changes.values())).items(), key=lambda item: item[1])[0] == 1


def test_biases_are_told_from_their_matrices(tmp_path):
    model = tiny_llama(tiny_config(**SHAPES["qwen2"]))
    save_model(model.state_dict(), model.config, tmp_path / "before")
    model.model.layers[1].self_attn.k_proj.bias.data *= 1.5
    save_model(model.state_dict(), model.config, tmp_path / "after")
    changes = diff_checkpoints(tmp_path / "before", tmp_path / "after")
    told = {kind: value for kind, value in by_module(changes).items() if value}
    assert told == {"k_proj.bias": pytest.approx(0.5 / 3**0.5)}
    drawn = _change_map(changes, [0, 1, 2]).draw.keywords
    texts = dict(zip(drawn["columns"], drawn["texts"][1], strict=True))
    assert (texts["k.bias"], texts["q.bias"], texts["k"]) == ("50", "0", "0")


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_an_adapter_shows_its_rank(tmp_path, monkeypatch, rank):
    monkeypatch.setattr("k2mini.audit.weight_diff.SUBSPACE", 8)
    model = tiny_llama()
    save_model(model.state_dict(), model.config, tmp_path / "base")
    section = LoraSection(rank=rank, alpha=2 * rank, target_modules=["q_proj", "down_proj"])
    attach(model, section)
    init_adapters(model, 0)
    fill_adapters(model)
    save_adapter(adapter_tensors(model), section, tmp_path / "adapter", str(tmp_path / "base"))
    changes = diff_adapter(tmp_path / "base", tmp_path / "adapter")
    assert len(changes) == 6
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for change in changes:
        assert change.rank == rank
        module = "base_model.model." + change.name.removesuffix(".weight")
        delta = 2.0 * stored[f"{module}.lora_B.weight"].double() @ stored[f"{module}.lora_A.weight"].double()
        torch.testing.assert_close(
            torch.tensor(change.spectrum),
            torch.linalg.svdvals(delta)[: len(change.spectrum)].float(),
            rtol=1e-4,
            atol=1e-6,
        )
        top = torch.linalg.svd(model.get_parameter(change.name).double()).U[:, :8]
        expected = ((top.T @ delta).square().sum() / delta.square().sum()).item()
        assert change.in_top == pytest.approx(expected, rel=1e-4)


def test_estimated_spectra_are_near_exact_ones(tmp_path, monkeypatch):
    """As for the matrices of a 7B, which are too large for an exact decomposition."""
    one, other = tiny_llama(seed=0), tiny_llama(seed=1)
    for name, model in (("one", one), ("other", other)):
        save_model(model.state_dict(), model.config, tmp_path / name)
    exact = diff_checkpoints(tmp_path / "one", tmp_path / "other")
    monkeypatch.setattr("k2mini.audit.weight_diff.EXACT", 16)
    estimated = diff_checkpoints(tmp_path / "one", tmp_path / "other")
    for a, b in zip(exact, estimated, strict=True):
        assert b.effective_rank == pytest.approx(a.effective_rank, rel=1e-3)
        if a.spectrum:
            assert b.spectrum[0] == pytest.approx(a.spectrum[0], rel=0.05)
