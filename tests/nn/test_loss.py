"""The chunked loss against the plain one."""

import pytest
import torch
import torch.nn.functional as F

from k2mini.config import IGNORE_INDEX
from k2mini.nn import loss
from k2mini.nn.loss import CHUNK_ROWS, token_loss


def rows(count, dtype=torch.float64):
    dim, vocab = 6, 11
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(2, count, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (2, count), generator=generator)
    labels[torch.rand(2, count, generator=generator) < 0.3] = IGNORE_INDEX
    return hidden, weight, labels


def plain(hidden, weight, labels):
    logits = F.linear(hidden, weight).flatten(0, 1)
    return F.cross_entropy(
        logits.float() if logits.dtype == torch.bfloat16 else logits, labels.flatten(), reduction="sum"
    )


@pytest.mark.parametrize("count", [1, 5, CHUNK_ROWS, 2 * CHUNK_ROWS + 3])
def test_loss_and_gradients_equal_the_plain_ones(count):
    hidden, weight, labels = rows(count)
    expected = plain(hidden, weight, labels)
    expected_grads = torch.autograd.grad(expected / 7, (hidden, weight))
    total = token_loss(hidden, weight, labels)
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-13)
    grads = torch.autograd.grad(total / 7, (hidden, weight))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(token_loss(hidden, weight, labels), expected, rtol=1e-13, atol=1e-13)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = rows(5)
    weight.requires_grad_(False)
    token_loss(hidden, weight, labels).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_nothing_supervised_is_a_loss_of_zero_with_gradients_of_zero():
    hidden, weight, labels = rows(5)
    total = token_loss(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    total.backward()
    assert total == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_memory_that_is_not_filled_is_overwritten():
    hidden, weight, labels = rows(CHUNK_ROWS + 3)
    torch.use_deterministic_algorithms(True)  # fills it with NaN
    try:
        grads = torch.autograd.grad(token_loss(hidden, weight, labels), (hidden, weight))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(grads, torch.autograd.grad(plain(hidden, weight, labels), (hidden, weight)))


def test_bf16_is_summed_in_fp32():
    hidden, weight, labels = rows(40, dtype=torch.bfloat16)
    total = token_loss(hidden, weight, labels)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, plain(hidden, weight, labels), rtol=1e-3, atol=0)
    total.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_what_a_gpu_sums_in_fp32_is_not_rounded_between(monkeypatch):
    """`out_dtype`, which has no kernel here, stood in for: logits and the weight's gradient are of exact products."""

    def mm(a, b, *, out_dtype):
        return a.to(out_dtype) @ b.to(out_dtype)

    def addmm(total, a, b, *, out_dtype, out):
        assert out is total
        return total.add_(mm(a, b, out_dtype=out_dtype))

    hidden, weight, labels = rows(CHUNK_ROWS + 40, dtype=torch.bfloat16)
    counts = labels != IGNORE_INDEX
    kept, targets = hidden.detach()[counts].double(), labels[counts]
    logits = kept @ weight.detach().double().T
    expected = F.cross_entropy(logits, targets, reduction="sum")
    pull = (logits.softmax(dim=-1) - F.one_hot(targets, len(weight))).bfloat16().double()
    monkeypatch.setattr(loss, "_keeps_sums", lambda _x: True)
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    total = token_loss(hidden, weight, labels)
    total.backward()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.grad.double(), pull.T @ kept, rtol=4e-3, atol=1e-3)  # rounded to bf16 once
    with torch.no_grad():
        torch.testing.assert_close(token_loss(hidden, weight, labels).double(), expected, rtol=1e-6, atol=0)
