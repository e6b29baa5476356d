"""One launch of two ranks (and, slow, of four) against a process that is alone."""

import json
import signal
from pathlib import Path

import pytest

from k2mini.build import training_model
from k2mini.config import CheckpointSection, LoraSection, ModelSection, ParallelSection
from k2mini.distributed import World
from k2mini.weights.model_files import save_model
from tests.conftest import SHAPES, tiny_config, tiny_llama
from tests.distributed import worker
from tests.faults.server import Request

ROOT = Path(__file__).parents[2]


def launch(forks, size, *words):
    """How each rank ended."""
    request = Request([[*map(str, words)]], str(ROOT), limit=300, call="tests.distributed.worker:command")
    return [child.wait() for child in forks.start_ranks(size, request)]


def launched(forks, size, *words):
    """Ranks that all end well."""
    for end in launch(forks, size, *words):
        assert end.status == 0, end.err[-3000:]


@pytest.fixture(scope="module")
def tiny_directory(tiny_directory, tiny_tokenizer):
    """With models of other architectures beside it, and one that NF4 goes with, its odd rows eight at a time."""
    wide = tiny_config(intermediate_dim=344, vocab_size=tiny_tokenizer.vocab_size, max_seq_len=1024)
    save_model(tiny_llama(wide).state_dict(), wide, tiny_directory.parent / "wide", tokenizer=tiny_tokenizer)
    for name in ("mistral", "qwen2", "qwen3"):
        config = tiny_config(**SHAPES[name], vocab_size=tiny_tokenizer.vocab_size, max_seq_len=1024)
        save_model(
            tiny_llama(config).state_dict(), config, tiny_directory.parent / f"kin_{name}", tokenizer=tiny_tokenizer
        )
    return tiny_directory


@pytest.fixture(scope="module")
def alone(tiny_directory, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    worker.main(tiny_directory, out)
    return out, json.loads((out / "results_1.json").read_text())


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tiny_directory, tmp_path_factory, forks):
    out = tmp_path_factory.mktemp("ranks")
    launched(forks, request.param, "main", tiny_directory, out)
    return request.param, out, json.loads((out / f"results_{request.param}.json").read_text())


def close(found, expected, rel):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=rel, abs=rel)


def test_losses_and_norms_equal_those_of_one_process(alone, ranks):
    """30 steps, some of them past an epoch's end, with validation on an odd number of rows."""
    _, one = alone
    _size, _, many = ranks
    assert len([row for row in one["plain"] if len(row) == 2]) == worker.STEPS
    for name in ("plain", "recomputed", "accumulated", "lora", "lora_shared"):
        close(many[name], one[name], 1e-12)
    for name in ("int8", "int8_shared"):
        close(many[name], one["int8"], 1e-6)  # its adapters are float32
    close(many["lora"], many["lora_shared"], 1e-12)
    close(many["zero2"], one["recomputed"], 1e-12)
    close(many["replicated"], one["recomputed"], 1e-12)
    close(one["accumulated"], one["recomputed"], 1e-12)
    close(many["float32"], one["float32"], 1e-4)
    assert many["recomputed"] == many["zero2"]
    # In bf16 it learns as well, from float32 weights.
    assert many["bfloat16"][-3][0] == pytest.approx(one["plain"][9][0], rel=0.02)


def test_nf4_over_ranks_is_nf4_in_one_process(alone, ranks):
    """In float64, whichever rank has which rows, quantised when they are read or before."""
    _, one = alone
    _size, _, many = ranks
    for name in ("plain", "shared", "stored"):
        close(many["nf4"][name], one["nf4"]["plain"], 1e-10)
    assert one["nf4"]["stored"] == one["nf4"]["plain"]


def test_ranks_that_disagree_are_told_in_what(ranks):
    """All of them, at once and in the same words, before anything is trained."""
    size, _, many = ranks
    assert len(many["disagreements"]) == size
    for told, left in many["disagreements"]:
        assert told == many["disagreements"][0][0]
        assert len(told) == 8
        keys = ["run.seed", "model.path", "data.seq_len", "train.lr", "train.max_steps", "train.max_grad_norm"]
        keys += ["parallel.timeout_minutes", "the hash of model.path"]
        for sentence, key in zip(told, keys, strict=True):
            assert sentence.startswith(f"{key} is ")
            assert f"on rank {size - 1}; start all ranks with the same configuration and files" in sentence
        assert not {"checkpoints", "metrics.jsonl", "model"} & set(left)


def test_a_save_that_fails_on_one_rank_fails_on_all(ranks):
    """At a later step, the same on all of them; the checkpoint before it is there."""
    size, _, many = ranks
    ends, steps = many["refused"]
    assert len(ends) == size
    for told, left in ends:
        assert told.endswith("step_0000020 could not be saved ([Errno 28] No space left on device); "
                             "the checkpoints before it are untouched")  # fmt: skip
        assert left == ["step_0000010"]
    assert 20 < steps <= 30


def test_a_benchmark_while_training(alone, ranks):
    """All ranks score and answer what one process does, and training goes on as if nothing had been."""
    _, one = alone
    _size, _, many = ranks
    close(many["evaluated"], one["evaluated"], 1e-12)
    assert many["answered"] == one["answered"]
    assert [json.loads(line)["prompt"] for line in one["answered"].splitlines()] == ["0", "1"]
    losses = {name: [row for row in one[name] if len(row) == 2] for name in ("evaluated", "recomputed")}
    assert losses["evaluated"] == losses["recomputed"]
    assert len(one["evaluated"]) == len(one["recomputed"]) + 2
    assert many["bfloat16"][-1] == pytest.approx(one["evaluated"][-1], rel=0.01)


def test_gradients_do_not_depend_on_how_the_batch_is_cut(alone, ranks):
    """1 x 8, 8 x 1 and ranks x accumulation, with unequal numbers of supervised tokens."""
    expected = alone[1]["gradients"]
    for found in (alone[1]["gradients_accumulated"], ranks[2]["gradients"], ranks[2]["gradients_accumulated"]):
        assert found.keys() == expected.keys()
        for name, numbers in expected.items():
            assert found[name] == pytest.approx(numbers, abs=1e-12, rel=1e-12), name


def test_biases_norms_and_windows_over_ranks(alone, ranks):
    assert len(alone[1]["kin"]) == 3
    for kind, expected in alone[1]["kin"].items():
        found = ranks[2]["kin"][kind]
        close(found["losses"], expected["losses"], 1e-12)
        close(found["lora"], expected["lora"], 1e-6)  # its adapters are float32
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, numbers in expected["gradients"].items():
            assert found["gradients"][name] == pytest.approx(numbers, abs=1e-12, rel=1e-12), name


def test_each_rank_keeps_its_share(alone, ranks):
    size, _, many = ranks
    (whole,) = alone[1]["kept"]
    assert sum(many["kept"]) == whole
    assert max(many["kept"]) <= 1.05 * whole / size


def test_a_checkpoint_of_many_ranks_goes_on_in_one_process(ranks, tiny_directory, tmp_path):
    """The same samples in the same order, so the same losses."""
    _, out, many = ranks
    checkpoint = CheckpointSection(resume=str(out / "plain/checkpoints/step_0000010"))
    rows = worker.run(tiny_directory, World(), tmp_path / "resumed", keep=checkpoint)
    close(rows, [*[row for row in many["plain"] if len(row) > 1][10:], many["plain"][-1]], 1e-12)


def test_embedding_and_head_beside_adapters_over_ranks(alone, ranks, tiny_directory, tmp_path):
    """Summed as the adapters' are, or by FSDP; and one process goes on with them."""
    _, one = alone
    _, out, many = ranks
    for name in ("whole", "whole_shared"):
        close(many[name], one["whole"], 1e-12)
    close(many["whole_int8"], one["whole_int8"], 1e-6)
    assert many["whole_bfloat16"][-1][0] == pytest.approx(one["whole"][-1][0], rel=0.02)
    assert one["whole"][-1][0] < one["lora"][5][0] < one["whole"][0][0]  # more trains, so more is learned
    lora = LoraSection(rank=2, dropout=0.0, train_embeddings=True, train_head=True)
    for kind in ("", "_shared"):
        keep = CheckpointSection(resume=str(out / f"whole{kind}/checkpoints/step_0000003"), every=3)
        settings = {"lora": lora, "keep": keep, "max_steps": 6, "weight_decay": 0.1}
        rows = worker.run(tiny_directory, World(), tmp_path / f"resumed{kind}", **settings)
        close(rows, many[f"whole{kind}"][3:], 1e-12)


@pytest.mark.parametrize("shared", ["", "_shared"])
def test_adapters_of_many_ranks_go_on_in_one_process(ranks, tiny_directory, tmp_path, shared):
    """Whether each rank kept the frozen base whole, which is the default, or all ranks shared it."""
    _, out, many = ranks
    keep = CheckpointSection(resume=str(out / f"lora{shared}/checkpoints/step_0000005"), every=5)
    lora = LoraSection(rank=2, dropout=0.0)
    rows = worker.run(tiny_directory, World(), tmp_path / "resumed", lora=lora, keep=keep, max_steps=10)
    close(rows, many["lora"][5:], 1e-12)


def test_resuming_asks_for_the_samples_that_follow(ranks, tiny_directory, tmp_path):
    _, out, _ = ranks
    training = worker.section(World())
    model, _ = training_model(ModelSection(str(tiny_directory), "float64"), training, ParallelSection(), World())
    samples = worker.Recorder()
    worker.train(
        model,
        worker.Task(samples, identity={"data": "x"}),
        worker.RunSection(str(tmp_path / "run"), seed=3),
        training,
        CheckpointSection(resume=str(out / "plain/checkpoints/step_0000020")),
    )
    assert samples.asked == set(range(20 * 8, 30 * 8))


@pytest.mark.parametrize("size", [1, 2])
def test_offload_changes_no_bit(size, tiny_directory, tmp_path, forks):
    """Neither losses, norms and scores nor checkpoints; gone on with from one, and after a kill without warning."""
    first = launch(forks, size, "main_offloaded", tiny_directory, tmp_path)
    assert first[0].status == -signal.SIGKILL, first[0].err[-3000:]
    assert all(end.status for end in first)
    assert (tmp_path / f"killed_{size}").exists()
    launched(forks, size, "main_offloaded", tiny_directory, tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    for kind in ("all", "bfloat16", "int8"):
        kept, moved, on = (found[f"{kind}_{name}"] for name in ("kept", "moved", "on"))
        assert len(kept[0]) == 9
        assert moved == kept
        assert on[0] == moved[0][-len(on[0]) :]
        assert on[1] == moved[1]
    assert found["killed"] == found["whole"]


def test_a_cpu_is_not_offloaded_to_itself(tmp_path, run):
    status, _, err = run(
        "pretrain", ROOT / "configs/tiny_pretrain.yaml", f"run.dir={tmp_path}/run", "parallel.offload=cpu"
    )
    assert status == 2
    assert "parallel.offload moves to the host's memory what a GPU lacks room for; on a CPU, set it to null" in err
    assert not (tmp_path / "run").exists()


def test_bf16_alone_keeps_float32_weights(tiny_directory, forks):
    launched(forks, 1, "bf16_alone", tiny_directory)


def test_ranks_wait_for_what_the_first_does_alone(forks):
    """Longer than `parallel.timeout_minutes`, after which a rank gives up waiting within a step."""
    launched(forks, 2, "patient")


def test_portions_that_do_not_come_out_even_are_refused():
    with pytest.raises(ValueError, match=r"global_batch_size \(8\) must be a multiple of train.micro_batch_size \(2\) "
                       "times the 3 ranks"):  # fmt: skip
        worker.local_batches(worker.Recorder(), 0, worker.section(World(), micro_batch_size=2), World(0, 3))
