"""`.bin` and `.pth` of others: read as they are, or refused by name; never read as something else."""

import pickle
import zipfile

import pytest
import torch

from k2mini.weights.torch_file import read_bin


@pytest.fixture
def saved(tmp_path):
    """A state dict with all that real ones have: shared, transposed, empty and sliced tensors, a parameter."""
    tensors = {"a": torch.randn(30, 40), "b": torch.randn(7).half(), "empty": torch.empty(0, 3)}
    tensors |= {"tied": tensors["a"], "slice": torch.randn(5, 6)[1:3].t(), "p": torch.nn.Parameter(torch.randn(3))}
    torch.save(tensors, tmp_path / "model.bin")
    return tmp_path / "model.bin", tensors


def rewrite(path, change=lambda name, content: content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, change(name, content))


def test_what_torch_saved_is_read_back(saved):
    path, tensors = saved
    for _ in range(2):
        assert all(torch.equal(value, tensors[name]) for name, value in read_bin(path).items())
        rewrite(path)  # entries without PyTorch's alignment


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_entries_are_refused(saved, method):
    """Mapped, they would be the numbers that the compressed bytes happen to be."""
    rewrite(saved[0], method=method)
    with pytest.raises(ValueError, match=r"model.bin is (compressed, which|truncated, damaged)"):
        read_bin(saved[0])


@pytest.mark.parametrize("change", [lambda content: content[:-8], lambda content: content + b"12345678"])
def test_storages_of_another_size_than_their_entry_are_refused(saved, change):
    rewrite(saved[0], lambda name, content: change(content) if name.endswith("data/0") else content)
    with pytest.raises(ValueError, match=r"model.bin is damaged: its tensors are not what its entries hold"):
        read_bin(saved[0])


def test_entries_that_overlap_are_refused(saved):
    """The second tensor's entry is made to begin where the first one's does, in the archive's directory at its end."""
    torch.save({"a": torch.zeros(40), "b": torch.ones(40)}, saved[0])
    content = bytearray(saved[0].read_bytes())
    offsets = []
    for name in (b"model/data/0", b"model/data/1"):
        place = content.rindex(name) - 4  # the offset of the local header is the last field before the name
        offsets.append(bytes(content[place : place + 4]))
    content[place : place + 4] = offsets[0]
    saved[0].write_bytes(content)
    with pytest.raises(ValueError, match=r"model.bin is (truncated, )?damaged"):
        read_bin(saved[0])


@pytest.mark.parametrize(
    "content",
    [[1], {1: torch.ones(2)}, {"a": 1}, {"a": torch.ones(2).to_sparse()}, {"a": torch.ones(2, device="meta")}],
)
def test_other_content_is_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x.bin is not a state dict \(a mapping of names to tensors\)"):
        read_bin(tmp_path / "x.bin")


def test_unreadable_is_not_damaged(saved, monkeypatch):
    path, _ = saved
    (path.parent / "folder.bin").mkdir()
    for name, kind in (("folder.bin", IsADirectoryError), ("none.bin", FileNotFoundError)):
        with pytest.raises(kind, match=name):
            read_bin(path.parent / name)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.bin is truncated"):
        read_bin(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"model.bin is truncated, damaged or in PyTorch's format of before 1.6"):
        read_bin(path)
    for full in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")):

        def fail(*_, error=full, **__):
            raise error

        monkeypatch.setattr(torch, "load", fail)
        with pytest.raises(type(full)):
            read_bin(path)
