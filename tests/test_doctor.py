"""`k2mini doctor`: on a sound machine nothing fails; each fault is named by the check whose business it is."""

import errno
import json
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from k2mini import doctor
from k2mini.commands import doctor as command
from k2mini.doctor import CHECKS, GPU_ONLY
from k2mini.inference import replay, scheduler
from k2mini.nn import llama, loss, quant, slots
from k2mini.training import save, step

FAULTS = {}


@pytest.fixture
def uncompiled():
    """Compiled code takes too long for one fault after another."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def examined(run):
    """Run `doctor`; returns its status and its findings by name."""

    def call(device="cpu"):
        status, out, _ = run("doctor", "--device", device, "--json")
        found = json.loads(out)
        assert found["device"] == device
        return status, {check["name"]: check for check in found["checks"]}

    return call


def fault(fails, words, device="cpu"):
    """A way to break the machine, the checks that must fail for it, and words of what the first of them says."""

    def keep(break_it):
        FAULTS[break_it.__name__] = (break_it, fails.split(), words, device)
        return break_it

    return keep


def wraps(patch, owner, name, change):
    """Give `change` the result of a function, and take its own instead."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: change(original(*a, **k), *a))


@fault("versions", "torch 2.1.0, at least 2.9 is needed")
def an_old_package(patch, _):
    right = command.version
    patch.setattr(command, "version", lambda name: "2.1.0" if name == "torch" else right(name))


@fault("versions", "sentencepiece not installed")
def a_missing_package(patch, _):
    right = command.version
    patch.setattr(command, "version", lambda name: right("no-such" if name == "sentencepiece" else name))


@fault("imports", "k2mini.doctor")
def a_package_that_can_not_be_imported(patch, _):
    patch.setitem(sys.modules, "k2mini.doctor", None)


@fault("device", "Torch not compiled with CUDA enabled", device="cuda")
def no_gpu(patch, _):
    pass


@fault("device", "Torch not compiled with CUDA enabled", device="auto")
def a_gpu_that_pytorch_does_not_see(patch, folder):
    (folder / "nvidia-smi").touch(0o755)
    patch.setenv("PATH", str(folder), prepend=":")


@fault("device", "no code for this GPU", device="auto")
def a_gpu_that_is_too_old(patch, _):
    error = RuntimeError("CUDA error: no kernel image is available for execution on the device")
    patch.setattr(torch, "ones", raising(error))


@fault("compiler", "a C++ compiler")
def no_compiler(patch, _):
    patch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", raising(RuntimeError("none")))


@fault("demo", "is not what was packaged")
def a_damaged_base(patch, folder):
    shutil.copytree(doctor.BASE, folder / "base")
    flip(folder / "base" / "model.safetensors")
    patch.setattr(doctor, "BASE", folder / "base")


@fault("parity", "logits in float32: off by 1.0e-02")
def wrong_logits(patch, _):
    def change(logits, model, tokens, positions=None, cache=None):
        return logits if positions is None or logits.dtype != torch.float32 else logits * 1.01

    wraps(patch, llama.Llama, "forward", change)


@fault("parity fsdp", "the gradient of model.embed_tokens.weight in bfloat16: off by nan")
def a_gradient_that_overflows(patch, _):
    def change(grads, _, grad):
        return (grads[0] if grads[0].dtype != torch.bfloat16 else grads[0] * torch.inf, *grads[1:])

    wraps(patch, loss._ProjectedLoss, "backward", change)


@fault("cache compile", "decoded tokens: off by")
def a_cache_off_by_one(patch, _):
    wraps(patch, slots.SlotBatch, "advance", lambda kept, batch, *_: (kept[0] + (len(batch.chunks) == 0), kept[1]))


@fault("int8", "an int8 product of 1 rows: off by 2.0e-02")
def wrong_scales(patch, _):
    for name in ("dequantize", "product_of_digits"):  # the second is taken where a CPU multiplies int8
        wraps(patch, quant, name, lambda values, *_: values * 1.02)


@fault("compile", "a compiled training step: off by")
def compiled_code_that_errs(patch, _):
    def compile(block, **_):
        block.register_forward_hook(lambda *a: a[-1].roll(1, dims=-1))

    patch.setattr(llama.Block, "compile", compile)


@fault("compile", "RuntimeError: the backend's own words")
def compilation_that_fails(patch, _):
    patch.setattr(torch, "compile", lambda *_, **__: raising(RuntimeError("the backend's own words\nand more")))


@fault("fsdp", "sharded training steps in float32: off by")
def sharding_that_loses_gradients(patch, _):
    def halved(model, most):
        for parameter in model.parameters():
            if isinstance(parameter, DTensor):
                parameter.grad *= 0.5
        return right(model, most)

    right = step.clip_gradients
    patch.setattr(step, "clip_gradients", halved)


@fault("checkpoint", "No such file or directory")
def no_temporary_folder(patch, folder):
    patch.setattr(doctor, "TemporaryDirectory", partial(doctor.TemporaryDirectory, dir=folder / "nowhere"))


@fault("checkpoint", "could not be saved ([Errno 28] No space left on device)")
def a_full_disk(patch, _):
    patch.setattr(save, "save", raising(OSError(errno.ENOSPC, "No space left on device")))


@fault("checkpoint", "is not what was saved (its SHA-256 differs)")
def a_flipped_byte(patch, _):
    def change(path, *_, **__):
        flip(path / "__0_0.distcp")
        return path

    wraps(patch, save.Saver, "save", change)


@fault("checkpoint", "training steps from a checkpoint: off by")
def moments_that_are_not_resumed(patch, _):
    wraps(patch, doctor, "load_checkpoint", lambda _, path, model, optimizer, world: optimizer.state.clear())


@fault("compile graph", "decoded tokens: off by")
def a_graph_that_stands_still(patch, _):
    """As far as a CPU can have one: what is replayed leaves the token that was fed as it was."""

    class Replayed:
        def __init__(self, advance):
            self.advance, self.calls = advance, 0

        def __call__(self):
            self.calls += 1
            if self.calls < 3:
                self.advance()

    patch.delitem(GPU_ONLY, "graph")
    patch.setattr(scheduler, "can_replay", lambda model: "_hooks" not in model.__dict__)
    patch.setattr(replay, "Replayed", Replayed)


@fault("plan", "a training step took 93.1 GiB, the plan says")
def a_plan_that_promises_too_much(patch, _):
    patch.delitem(GPU_ONLY, "plan")
    patch.setattr(doctor, "PLANNED", doctor.TINY)
    for name, value in (("reset_peak_memory_stats", None), ("memory_reserved", 0), ("max_memory_reserved", 10**11)):
        patch.setattr(torch.cuda, name, lambda *_, value=value: value)


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("uncompiled")
def test_a_fault_is_named(name, examined, monkeypatch, tmp_path):
    break_it, fails, words, device = FAULTS[name]
    if device != "cpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    break_it(monkeypatch, tmp_path)
    status, found = examined(device)
    assert [check for check in found if found[check]["status"] == "failed"] == fails
    assert status == 1
    assert words in found[fails[0]]["detail"]
    assert found[fails[0]]["remedy"]
    if fails[0] in ("imports", "device"):  # nothing can be said of the others
        assert {found[check]["status"] for check in CHECKS if check in found} <= {"skipped"}
    else:
        skipped = {check: found[check]["detail"] for check in found if found[check]["status"] == "skipped"}
        without_compiler = {"compile": "compiler did not pass"} if fails == ["compiler"] else {}
        assert skipped == {**GPU_ONLY, **without_compiler}


@pytest.mark.usefixtures("uncompiled")
def test_nothing_is_wrong_with_this_machine(run):
    """Every line says what was found."""
    status, out, err = run("doctor", "--device", "cpu")
    assert (status, err) == (0, "")
    lines = [line.split(maxsplit=4) for line in out.splitlines()]
    assert [line[1] for line in lines] == ["versions", "device", *CHECKS]
    assert Counter(line[0] for line in lines) == {"passed": len(CHECKS) - len(GPU_ONLY) + 2, "skipped": len(GPU_ONLY)}
    assert all(len(line) == 5 for line in lines)


@pytest.mark.slow
def test_it_compiles(monkeypatch, tmp_path):
    """Nothing is in the compiler's cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert doctor.examine("compile", torch.device("cpu")).startswith("off by")
    assert list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("uncompiled")
def test_a_failed_line_is_followed_by_what_to_do(run, monkeypatch, tmp_path):
    no_temporary_folder(monkeypatch, tmp_path)
    status, out, _ = run("doctor", "--device", "cpu")
    (line,) = [number for number, line in enumerate(out.splitlines()) if line.startswith("failed   checkpoint")]
    assert out.splitlines()[line + 1].startswith("         what to do: set TMPDIR")
    assert status == 1


def test_debug_shows_where(monkeypatch):
    from k2mini.cli import main

    monkeypatch.setattr(command, "versions", raising(ZeroDivisionError("here")))
    with pytest.raises(ZeroDivisionError):
        main(["doctor", "--device", "cpu", "--debug"])
