"""What the processor can do: as Linux says, as a clock says, and what is said of it."""

from pathlib import Path

import pytest
import torch

from k2mini import cpu

FLAGS = {"AVX2": "avx2", "AVX-512": "avx512f", "bf16": "avx512_bf16", "VNNI": "avx512_vnni", "AMX": "amx_tile"}


@pytest.fixture(autouse=True)
def asked_anew():
    cpu.rate.cache_clear()
    yield
    cpu.rate.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """A processor whose products take so long: nanoseconds a multiplication, by dtype. Returns the calls it has had."""

    def set_to(**costs):
        now, calls = [0.0], []

        def product(x):
            calls.append(x.dtype)
            now[0] += len(x) ** 3 * costs[str(x.dtype).removeprefix("torch.")] * 1e-9

        monkeypatch.setattr(cpu, "_product", product)
        monkeypatch.setattr(cpu.time, "perf_counter", lambda: now[0])
        return now, calls

    return set_to


def test_instruction_sets_are_those_that_linux_names():
    info = Path("/proc/cpuinfo")
    if not info.exists() or "flags" not in info.read_text():
        pytest.skip("there is no /proc/cpuinfo with an x86 processor's flags")
    flags = next(line for line in info.read_text().splitlines() if line.startswith("flags")).split()
    assert cpu.instruction_sets() == [label for label, flag in FLAGS.items() if flag in flags]
    assert next(line for line in info.read_text().splitlines() if "model name" in line).split(": ")[1] in cpu.describe()


@pytest.mark.parametrize("cost", [0.005, 0.02, 1.0])
def test_the_rate_is_measured_once_and_in_time(clock, cost):
    """On a processor of 100 GFLOP/s whose bfloat16 is twice as fast, half as fast, 50 times slower (as with AVX2)."""
    now, calls = clock(float32=0.01, bfloat16=cost)
    threads = torch.get_num_threads()
    assert cpu.rate(torch.bfloat16) == pytest.approx(0.01 / cost)
    assert now[0] < 0.05
    asked = len(calls)
    assert cpu.rate(torch.bfloat16) == pytest.approx(0.01 / cost)
    assert (len(calls), torch.get_num_threads()) == (asked, threads)


def test_sixteen_bits_that_do_not_pay_are_said(clock, run, tiny_directory):
    words = ("generate", "--model", tiny_directory, "--prompt", "granite", "--max-new-tokens", "1", "--device", "cpu")
    _, calls = clock(float32=0.01, bfloat16=0.02, float16=0.01)
    assert run(*words)[0] == 0
    assert not calls  # float32 is not compared with itself
    status, _, err = run(*words, "--dtype", "bfloat16")
    assert (status, err.count("run at 0.50 of float32's rate, as measured; float32 takes twice the memory")) == (0, 1)
    status, _, err = run(*words, "--dtype", "float16")
    assert (status, "float32's rate" in err) == (0, False)


def test_it_can_be_measured():
    for dtype in cpu.NARROW:
        assert 0 < cpu.rate(dtype) < 1000
