"""Packed rows as a GPU takes them: by the bounds of documents. `varlen_attn` has no kernel here and is stood in for."""

import logging

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F

from k2mini.config import IGNORE_INDEX
from k2mini.data.batches import Blocks
from k2mini.data.corpus import Documents
from k2mini.data.packing import packed_rows
from k2mini.nn.llama import document_bounds
from k2mini.nn.packed import sent_bounds, takes_varlen
from tests.conftest import tiny_config, tiny_llama
from tests.helpers import adapted, examples, loss_and_gradients

POSITIONS = torch.tensor(
    [[0, 1, 2, 3, 0, 1, 0, 0, 1, 2], [2, 3, 0, 1, 2, 3, 4, -1, -1, -1], [0, 1, 2, -1, -1, -1, -1, -1, -1, -1]]
)
GPU = torch.device("cuda", 0)


def one_by_one(q, k, v, begins, ends, longest_q, longest_k, *, window_size, enable_gqa):
    """What `varlen_attn` is documented to do with causal windows of keys to the left, each document alone."""
    assert begins is ends
    assert begins.dtype == torch.int32
    assert window_size[1] == 0
    assert longest_q == longest_k >= begins.diff().max()
    out = torch.full_like(q, torch.nan)
    for start, stop in zip(begins.tolist(), begins[1:].tolist(), strict=False):
        parts = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        mask = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        mask = mask.triu(-window_size[0]) if window_size[0] >= 0 else mask
        out[start:stop] = F.scaled_dot_product_attention(*parts, mask, enable_gqa=enable_gqa).transpose(0, 1)
    return out


def at_once(q, k, v, begins, _ends, _longest_q, _longest_k, *, window_size, enable_gqa):
    """The same in operators that a compiler can follow."""
    document = (torch.arange(len(q))[:, None] >= begins[1:]).sum(dim=1)
    mask = (document[:, None] == document).tril()
    parts = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=enable_gqa)[0].transpose(0, 1)


def bounds_of(positions, head_dim=16):
    return sent_bounds(document_bounds(positions), torch.device("cpu"), torch.bfloat16, head_dim)


def test_bounds_of_documents():
    """Rows that begin within a document, end in padding, or are nothing else."""
    bounds = bounds_of(POSITIONS)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 4, 6, 7, 10, 12, 17, 20, 23, 30]


def test_bounds_of_batches():
    """Of packed examples, each a token shorter than it is, with padding to a multiple of 8; of blocks of a corpus."""
    given = examples(4)
    lengths = [len(example.tokens) - 1 for example in given]
    batch = packed_rows([given[:3], given[3:]])
    row = -(-max(sum(lengths[:3]), lengths[3]) // 8) * 8
    ends = [lengths[0], sum(lengths[:2]), sum(lengths[:3]), row, row + lengths[3], 2 * row]
    assert bounds_of(batch.positions).tolist() == sorted({0, *ends})
    blocks = Blocks(Documents([[1, 5, 5], [1, 5, 5, 5, 5], [1, 5]] * 2), 8, document_mask=True, seed=None)
    assert bounds_of(blocks.batch(0, 2).positions).tolist() == [0, 3, 8, 10, 13, 16]


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_documents_by_their_bounds_equal_documents_under_a_mask(shape, checkpointing, monkeypatch):
    model = adapted(shape, dtype=torch.float64) if checkpointing else tiny_llama(shape, dtype=torch.float64)
    model.model.recompute_every = checkpointing
    tokens, labels = torch.randint(199, (2, *POSITIONS.shape), generator=torch.Generator().manual_seed(0))
    labels[POSITIONS < 0] = IGNORE_INDEX
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", one_by_one)
    results = []
    for mask in (None, bounds_of(POSITIONS)):
        results.append(loss_and_gradients(model, tokens, POSITIONS, labels, mask=mask))
    for masked, bounded in zip(*results, strict=True):
        torch.testing.assert_close(bounded, masked, rtol=0, atol=1e-12)


def test_one_graph_for_any_number_of_documents(monkeypatch):
    model, graphs = tiny_llama(tiny_config(num_layers=2)), []
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", at_once)

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    tokens = torch.randint(199, (2, 16))
    for length in (3, 16, 5, 2):
        positions = (torch.arange(16) % length).expand(2, 16)
        compiled = model.loss(tokens, positions, tokens, mask=bounds_of(positions))
        compiled.backward()
        expected = tiny_llama(tiny_config(num_layers=2)).loss(tokens, positions, tokens)
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=0)
    assert len(graphs) == 1


def test_compiled_blocks_attend_to_documents_on_a_cpu_as_others_do(shape):
    """To the bit where nothing is compiled but the graph is taken; in one graph, whatever the documents' lengths."""
    compiled, plain, graphs = tiny_llama(shape), tiny_llama(shape), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    for layer in compiled.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    tokens = torch.randint(199, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
    for positions in (POSITIONS, POSITIONS.flip(0), (torch.arange(10) % 5).expand(3, 10)):
        results = []
        for model in (compiled, plain):
            model.model.by_document = True
            results.append(loss_and_gradients(model, tokens, positions, tokens))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "why"),
    [
        (torch.bfloat16, 128, (8, 0), None),
        (torch.float16, 64, (9, 0), None),
        (torch.float32, 128, (9, 0), "heads of 128 in torch.float32"),
        (torch.bfloat16, 20, (9, 0), "heads of 20"),
        (torch.bfloat16, 128, (7, 5), "compute capability 8.0"),
    ],
)
def test_where_there_is_no_kernel_the_log_says_so_once(dtype, head_dim, capability, why, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    takes_varlen.cache_clear()
    with caplog.at_level(logging.INFO):
        assert [takes_varlen(GPU, dtype, head_dim) for _ in range(2)] == [why is None] * 2
    takes_varlen.cache_clear()
    assert [why in record.message for record in caplog.records] == [True] * (why is not None)
