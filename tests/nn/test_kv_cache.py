import copy

import pytest
import torch

from k2mini.audit.hooks import trace
from k2mini.nn.kv_cache import GROWTH_STEP, KVCache
from k2mini.nn.slots import SlotBatch, Slots
from tests.conftest import tiny_config, tiny_llama


def test_growing_keeps_what_is_held():
    model = tiny_llama(tiny_config(max_seq_len=1024))
    tokens = torch.randint(199, (1, GROWTH_STEP + 44))
    grows, roomy = KVCache(model.config, 1, capacity=1), KVCache(model.config, 1, capacity=600)
    with torch.no_grad():
        for start, end in ((0, GROWTH_STEP - 1), (GROWTH_STEP - 1, GROWTH_STEP + 43), (GROWTH_STEP + 43, None)):
            chunk = tokens[:, start:end]
            assert torch.equal(model(chunk, cache=grows), model(chunk, cache=roomy))
    assert grows.capacity == 2 * GROWTH_STEP - 1
    assert grows.lengths.tolist() == [GROWTH_STEP + 44]


@pytest.mark.parametrize("fixed", [False, True])
def test_slots_are_aligned_and_no_more_than_the_context_needs(fixed):
    for length in (1, 255, 256, 257, 600, 1900, 2048):
        cache = KVCache(tiny_config(max_seq_len=2048), 1, capacity=length, fixed=fixed)
        slots = cache.keys[0].shape[2]
        assert slots % 8 == 0
        assert length < slots == cache.capacity + 1 <= 2056


@torch.no_grad()
def test_masks_of_a_gpu_are_aligned(monkeypatch):
    """And what they add is not seen."""
    monkeypatch.setattr("k2mini.nn.kv_cache.MASKLESS", ["cpu"])
    model, tokens = tiny_llama(), torch.randint(199, (2, 13))
    cache = KVCache(model.config, 2)
    model(tokens[:, :10], cache=cache)
    cache.end(torch.tensor([10, 4]))
    positions = torch.tensor([[10, 11, 12], [4, 5, -1]])
    _, mask = copy.deepcopy(cache).advance(3, positions)
    assert mask.shape == (2, 1, 3, 16)
    logits = model(tokens[:, 10:], positions, cache)
    torch.testing.assert_close(logits[0], model(tokens)[0, 10:], rtol=0, atol=1e-5)
    other = torch.cat([tokens[1:, :4], tokens[1:, 10:12]], dim=1)
    torch.testing.assert_close(logits[1, :2], model(other)[0, 4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("maskless", "width"), [([], 13), (["cpu"], 16)], ids=["as on a CPU", "as on a GPU"])
def test_a_window_masks_only_where_it_ends(maskless, width, monkeypatch):
    monkeypatch.setattr("k2mini.nn.kv_cache.MASKLESS", maskless)
    cache = KVCache(tiny_config(sliding_window=8), 2)
    assert cache.advance(7, None)[1] is None
    assert cache.advance(1, None)[1] is None  # 8 tokens are within the window
    _, mask = cache.advance(5, None)
    assert mask.shape == (1, 1, 5, width)
    assert [row.nonzero().flatten().tolist() for row in mask[0, 0]] == [list(range(p - 7, p + 1)) for p in range(8, 13)]


@torch.no_grad()
def test_a_pattern_of_later_tokens(monkeypatch):
    """Without a mask, the last query attends to all."""
    model, tokens = tiny_llama(), torch.randint(199, (1, 12))
    found = []
    for maskless in ([], ["cpu"]):
        monkeypatch.setattr("k2mini.nn.kv_cache.MASKLESS", maskless)
        cache = KVCache(model.config, 1)
        model(tokens[:, :5], cache=cache)
        with trace(model, ["layers.1.attention.pattern"]) as seen:
            model(tokens[:, 5:], cache=cache)
        found.append(seen["layers.1.attention.pattern"])
    assert found[0].shape == (1, 4, 7, 12)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_select_copies_rows_and_leaves_the_source_alone():
    model = tiny_llama()
    prefix, option = torch.randint(199, (1, 20)), torch.randint(199, (3, 4))
    cache = KVCache(model.config, 1)
    with torch.no_grad():
        model(prefix, cache=cache)
        rows = cache.select(torch.tensor([0, 0, 0]))
        continued = model(option, cache=rows)
        full = model(torch.cat((prefix.expand(3, -1), option), dim=1))[:, 20:]
    torch.testing.assert_close(continued, full, rtol=0, atol=1e-5)
    assert cache.length == 20
    assert cache.lengths.tolist() == [20]
    assert rows.lengths.tolist() == [24] * 3


def test_padding_reaches_no_row():
    """NaN in a padding token's place must not leak: its slot is nobody's."""
    config = tiny_config(num_layers=1)
    cache = KVCache(config, 2)
    positions = torch.tensor([[0, 1, 2], [-1, -1, 0]])
    cache.advance(3, positions)
    key = torch.ones(2, 3, 4, 16)
    key[1, :2] = torch.nan
    keys, _ = cache.layer(0).append(key, key)
    assert torch.isfinite(keys).all()
    assert cache.lengths.tolist() == [3, 1]


def test_idle_slots_of_a_window_attend_to_something():
    """They stand beyond the width; a query that attends to nothing would be NaN."""
    slots = Slots(tiny_config(sliding_window=60), 3, 1000, dtype=torch.float32, device=torch.device("cpu"))
    batch = SlotBatch.of_all(slots, torch.tensor([5, slots.spare, slots.spare]), 256)
    assert batch.layer(0).mask.any(dim=-1).all()
    assert batch.layer(0).mask[0].sum() == 6
