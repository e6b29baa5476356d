"""Products and attention as they are written out for the compiler, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from k2mini.nn.decode_ops import attend_once, check_compiler, writes_out, written_out


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("out", [64, 66, 7], ids="{} out".format)
@pytest.mark.parametrize("width", [48, 4096, 5632, 11008, 4099], ids="{} in".format)
@pytest.mark.parametrize("rows", [1, 2, 4, 8], ids="{} rows".format)
def test_products(rows, width, out):
    x, weight = normal(rows, 1, width), normal(out, width)
    torch.testing.assert_close(written_out(x, weight), F.linear(x, weight).view(rows, out))


def test_int8_is_widened_to_float32():
    x, weight = normal(4, 1, 96, dtype=torch.bfloat16), (normal(8, 96) * 40).to(torch.int8)
    found = written_out(x, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.linear(x.float(), weight.float()).view(4, 8))


def test_only_a_compiler_sees_them():
    assert not writes_out(normal(1, 48), normal(8, 48))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["multi-head", "grouped"])
def test_attention(heads):
    """Rows of different lengths under a mask; the slots behind it hold zeros."""
    many, few = heads
    q, k, v = normal(3, many, 1, 16), normal(3, few, 20, 16), normal(3, few, 20, 16)
    mask = torch.arange(20) < torch.tensor([1, 9, 20])[:, None, None, None]
    for each in (mask, None):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=each, enable_gqa=True)
        torch.testing.assert_close(attend_once(q, k, v, each), expected)


def test_without_a_compiler_it_says_so():
    from torch._inductor import config

    patched = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with patched, pytest.raises(ValueError, match=r"compiling needs a C\+\+ compiler"):
        check_compiler(torch.device("cpu"))


@pytest.mark.parametrize("missing", ["compiler", "headers", "nothing"])
def test_a_gpu_needs_a_compiler_and_headers(monkeypatch, tmp_path, missing):
    monkeypatch.setattr("shutil.which", lambda name: None if missing == "compiler" else f"/usr/bin/{name}")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    if missing != "headers":
        (tmp_path / "Python.h").touch()
    if missing == "nothing":
        check_compiler(torch.device("cuda", 0))
        return
    with pytest.raises(ValueError, match=r"for a GPU needs gcc or clang .* and .*/Python\.h"):
        check_compiler(torch.device("cuda", 0))
