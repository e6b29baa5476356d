"""Checkpoints that are damaged, planted, or can't be written; which are kept."""

import pickle
import resource
import shutil
import threading
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from k2mini.config import CheckpointSection
from k2mini.distributed import World
from k2mini.files import sha256
from k2mini.training import save
from k2mini.training.checkpoint import (
    best_checkpoint,
    checkpoints,
    load_checkpoint,
    prune,
    read_state,
)
from k2mini.training.metadata import SafeReader, StoredModel, _Unpickler
from k2mini.training.save import Saver
from k2mini.training.step import build_optimizer
from k2mini.weights.model_directory import manifest_text
from tests.conftest import tiny_llama
from tests.helpers import section


def stepped(seed=0):
    model = tiny_llama(seed=seed)
    optimizer = build_optimizer(model, section())
    tokens = torch.randint(199, (2, 9), generator=torch.Generator().manual_seed(seed))
    model.loss(tokens, None, tokens).backward()
    optimizer.step()
    return model, optimizer


def saved(folder, step=1, **state):
    model, optimizer = stepped()
    with Saver(folder, CheckpointSection(keep_last=9), World()) as saver:
        return model, saver.save(step, model, optimizer, {"identity": {}, "tokens": 0, **state}, wait=True)


def test_round_trip(tmp_path):
    model, path = saved(tmp_path, 7, val_loss=2.5)
    other, optimizer = stepped(seed=1)
    load_checkpoint(path, other, optimizer, World())
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert {float(state["step"]) for state in optimizer.state.values()} == {7.0}
    stored = StoredModel(path)
    assert set(stored.names()) == set(model.state_dict())
    assert torch.equal(stored.tensor("model.norm.weight"), model.model.norm.weight)
    state = read_state(path)
    assert (state["step"], state["val_loss"]) == (7, 2.5)
    assert set(state["files"]) == {"__0_0.distcp", ".metadata"}


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_damage_is_named(tmp_path, name):
    _, path = saved(tmp_path)
    model, optimizer = stepped()
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not what was saved \(its SHA-256 differs\); resume from another"):
        load_checkpoint(path, model, optimizer, World())
    (path / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        load_checkpoint(path, model, optimizer, World())


def test_code_planted_in_the_metadata_does_not_run(tmp_path):
    """Even where whoever planted it mended the hash."""
    _, path = saved(tmp_path)
    witness = tmp_path / "ran"

    class Planted:
        def __reduce__(self):
            return Path.touch, (witness,)

    (path / ".metadata").write_bytes(pickle.dumps(Planted()))
    state = {key: value for key, value in read_state(path).items() if key != "sha256"}
    state["files"][".metadata"] = sha256(path / ".metadata")
    (path / "state.json").write_text(manifest_text(state))
    model, optimizer = stepped()
    with pytest.raises(ValueError, match=r"\.metadata is not a checkpoint's metadata .*nothing in it was run"):
        load_checkpoint(path, model, optimizer, World())
    assert not witness.exists()
    for harmful in (b"", b"x", pickle.dumps({"a": 1}), pickle.dumps(torch.ones)):
        (path / ".metadata").write_bytes(harmful)
        with pytest.raises(ValueError, match="is not a checkpoint's metadata"):
            SafeReader(path).read_metadata()


def test_metadata_of_early_python_3_11_is_read_and_getattr_reaches_nothing_else():
    """There, a member of an enum is pickled as a call of getattr."""

    class Call:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            return getattr, self.arguments

    for member in _MEM_FORMAT_ENCODING:
        assert _Unpickler(BytesIO(pickle.dumps(Call(_MEM_FORMAT_ENCODING, member.name)))).load() is member
    for arguments in ((_MEM_FORMAT_ENCODING, "__class__"), (torch.Size, "__class__")):
        with pytest.raises(pickle.UnpicklingError, match="it names __class__ of"):
            _Unpickler(BytesIO(pickle.dumps(Call(*arguments)))).load()


def test_a_full_disk_leaves_the_last_good_one(tmp_path):
    """A real refusal of the system to write: files may not grow beyond 50 kB."""
    _, path = saved(tmp_path)
    before = sha256(path / "__0_0.distcp")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step_0000002 could not be saved \(.*; the checkpoints before it are unt"):
            saved(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_0000001"]
    assert sha256(path / "__0_0.distcp") == before
    load_checkpoint(path, *stepped(), World())


def test_a_folder_that_can_not_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"step_0000001 could not be saved \(.*Not a directory"):
        saved(tmp_path / "file")


@pytest.fixture
def held(monkeypatch):
    """Writing begins when this event is set; the list gets the names of the checkpoints that there are then."""
    event, found, write = threading.Event(), [], save.save

    def wait(*arguments, storage_writer, **options):
        assert event.wait(60)
        found.append([path.name for path in checkpoints(Path(storage_writer.path).parent)])
        return write(*arguments, storage_writer=storage_writer, **options)

    monkeypatch.setattr(save, "save", wait)
    return event, found


def test_training_goes_on_while_what_was_is_written(tmp_path, held):
    """Bit for bit what a save that is waited for writes, also from memory that an earlier copy was in."""
    (event, found), state = held, {"identity": {}, "tokens": 0}
    event.set()
    model, optimizer = stepped()
    with Saver(tmp_path / "waited", CheckpointSection(async_save=False, keep_last=1), World()) as saver:
        saver.save(1, model, optimizer, state, wait=False)
        expected = saver.save(2, model, optimizer, state, wait=False)
        assert checkpoints(tmp_path / "waited") == [expected]
    event.clear()
    with Saver(tmp_path / "run", CheckpointSection(keep_last=1), World()) as saver:
        first = saver.save(1, model, optimizer, state, wait=False)
        assert not checkpoints(tmp_path / "run")
        threading.Timer(0.2, event.set).start()
        second = saver.save(2, model, optimizer, state, wait=False)  # waits for the first
        saver.wait()
        event.clear()
        third = saver.save(3, model, optimizer, state, wait=False)
        for parameter in model.parameters():
            parameter.data.fill_(7)
            optimizer.state[parameter]["exp_avg"].fill_(7)
        assert checkpoints(tmp_path / "run") == [second]
        assert not saver.failed
        event.set()
        saver.wait()
        assert checkpoints(tmp_path / "run") == [third]
    assert found[2:] == [[], [first.name], [second.name]]  # the last complete one stays while another is written
    assert (third / "__0_0.distcp").read_bytes() == (expected / "__0_0.distcp").read_bytes()
    assert sorted(tmp_path.glob("run/.*")) == []


def test_no_memory_for_the_copy_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Pinning memory failed with error-code: 2")

    monkeypatch.setattr(save.DefaultStager, "stage", refuse)
    said = r"step_0000001 could not be copied to the host's memory \(Pin.*\); checkpoint.async_save=false needs no copy"
    with pytest.raises(ValueError, match=said):
        saved(tmp_path)


def test_another_model_is_refused(tmp_path):
    _, path = saved(tmp_path)
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"belongs to another model or other trained parameters \(.*lm_head"):
        load_checkpoint(path, model, build_optimizer(model, section()), World())


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, loss in enumerate([3.0, 1.5, 2.0, None, 1.5, 1.9], start=1):
        saved(tmp_path, step, val_loss=loss)
    (tmp_path / ".step_0000009.tmp").mkdir()
    assert best_checkpoint(tmp_path).name == "step_0000005"
    prune(tmp_path, CheckpointSection(keep_last=1, keep_best=True), World())
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000005", "step_0000006"]
    assert len(list(tmp_path.iterdir())) == 2
    prune(tmp_path, CheckpointSection(keep_last=1, keep_best=False), World())
    assert [path.name for path in checkpoints(tmp_path)] == ["step_0000006"]
    shutil.rmtree(tmp_path / "step_0000006")
    assert best_checkpoint(tmp_path) is None
