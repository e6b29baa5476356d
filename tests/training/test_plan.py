"""Plans against closed forms; against real ranks it is tools/bench_plan.py's business."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from k2mini.architectures import QUANTIZED
from k2mini.cli import main
from k2mini.config import (
    CorpusSection,
    FinetuneConfig,
    InstructionSection,
    LoraSection,
    ModelSection,
    ParallelSection,
    PretrainConfig,
    RunSection,
    TrainSection,
)
from k2mini.config_file import load_config
from k2mini.model_config import PRESETS, tensor_shapes
from k2mini.nn.quant import int8_matrices
from k2mini.sizes import parse_size, readable
from k2mini.training.fit import largest_micro_batch, smallest_change, what_takes_less
from k2mini.training.memory_tracker import MemoryTracker
from k2mini.training.pace import fastest
from k2mini.training.plan import BUDGET, describe
from k2mini.training.plan import plan_run as make_plan
from k2mini.weights.model_files import save_model
from tests.conftest import ROOT, SHAPES, tiny_config, tiny_llama

SHAPE = {"num_layers": 3, "dim": 128, "intermediate_dim": 344, "head_dim": 32, "vocab_size": 2000}
PLANS = {}


def plan_run(config, ranks, *, exact=True):
    """A plan, made once of each configuration: several tests compare others with the same few."""
    key = repr((config, ranks, exact))
    if key not in PLANS:
        PLANS[key] = make_plan(config, ranks, exact=exact)
    return PLANS[key]


@pytest.fixture
def planned_once(monkeypatch):
    """The command makes each plan once, too."""
    monkeypatch.setattr("k2mini.training.plan.plan_run", plan_run)


def model(folder, **changes):
    config = tiny_config(**{**SHAPE, **changes})
    save_model(tiny_llama(config).state_dict(), config, folder)
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return model(tmp_path_factory.mktemp("plan") / "model")


def pretraining(directory, **train):
    settings = {"lr": 1e-3, "max_steps": 1, "global_batch_size": 16, "micro_batch_size": 4, **train}
    return PretrainConfig(
        RunSection("x"),
        ModelSection(str(directory)),
        CorpusSection("x", seq_len=128, document_mask=False),
        TrainSection(**settings),
    )


def test_peaks_of_streams_add_up(directory):
    """What was freed on one stream is not another's: 4 + 6 bytes, although never more than 8 exist at a time."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with MemoryTracker(model, optimizer) as tracker:
        before = tracker.peak
        with torch.cpu.stream(torch.cpu.Stream()):
            torch.empty(4, dtype=torch.uint8)  # freed at once
            torch.empty(3, dtype=torch.uint8)
        with torch.cpu.stream(torch.cpu.Stream()):
            kept = torch.empty(6, dtype=torch.uint8)
    assert tracker.peak - before == 4 + len(kept)


def test_a_second_micro_batch_meets_gradients(directory):
    """From the second on the gradients of those before it are there, and stay."""
    one, two, three = (plan_run(pretraining(directory, micro_batch_size=16 // n), 1) for n in (1, 2, 4))
    assert two.kinds["gradients"] == three.kinds["gradients"] == 4 * two.parameters
    smaller = pretraining(directory, micro_batch_size=8, global_batch_size=8)
    assert two.peak > plan_run(smaller, 1).peak
    assert one.kinds["gradients"] < two.kinds["gradients"]


def tuning(directory):
    return FinetuneConfig(
        RunSection("x"),
        ModelSection(str(directory)),
        InstructionSection("x", max_seq_len=128),
        TrainSection(lr=1e-3, max_steps=1, global_batch_size=16, micro_batch_size=4),
        LoraSection(rank=4),
    )


def test_what_is_given_is_counted_exactly(directory):
    config = pretraining(directory)
    one, four = plan_run(config, 1), plan_run(config, 4)
    parameters = tiny_config(**SHAPE).num_parameters()
    assert one.parameters == one.trained == parameters
    assert one.kinds["parameters"] == 4 * parameters
    assert one.kinds["optimiser"] == 8 * parameters
    assert four.kinds["parameters"] == parameters
    assert one.checkpoint == four.checkpoint == 12 * parameters
    assert one.received == 0
    # Four ranks, one micro-batch: gathered twice (head and norm once), reduced once, three quarters from others.
    assert four.received == (3 * parameters - 2000 * 128 - 128) * 4 * 3 // 4
    assert sum(one.kinds.values()) == one.peak
    assert one.step_tokens == 16 * 128


def test_what_saves_memory_saves_it(directory):
    config = pretraining(directory)
    kept, recomputed = plan_run(config, 1), plan_run(pretraining(directory, activation_checkpointing=1), 1)
    assert recomputed.peak < 0.9 * kept.peak
    sharded = plan_run(config, 4)
    assert sharded.peak < kept.peak
    bf16 = replace(config, model=replace(config.model, dtype="bfloat16"))
    assert plan_run(bf16, 4).peak < sharded.peak
    zero2 = plan_run(replace(config, parallel=ParallelSection(reshard_after_forward=False)), 4)
    assert zero2.peak > sharded.peak
    assert zero2.received < sharded.received


def test_what_is_received(directory):
    """By ZeRO-2, by replicas and by an int8 base; the last, beside matrices of a byte a weight, has scales."""
    parameters = tiny_config(**SHAPE).num_parameters()
    config = pretraining(directory)
    zero2 = replace(config, parallel=ParallelSection(reshard_after_forward=False))
    assert plan_run(zero2, 4).received == 2 * parameters * 4 * 3 // 4
    # Two groups of two ranks, which then sum half of the gradients each: of two replicas' every byte is received once.
    replicated = replace(config, parallel=ParallelSection(replicate=2, reshard_after_forward=False))
    assert plan_run(replicated, 4).received == 2 * parameters * 4 // 2 + parameters * 4 // 2
    tuned = replace(tuning(directory), parallel=ParallelSection(replicate=1))
    plain, int8 = (plan_run(replace(tuned, model=replace(tuned.model, quantize=q)), 4) for q in (None, "int8"))
    assert int8.parameters == plain.parameters
    assert 0.3 < int8.received / plain.received < 0.6


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_straight_line_foretells_more_blocks(tmp_path, ranks):
    """9, of which the line through 4 and 8 is not told."""
    config = pretraining(model(tmp_path / "model", num_layers=9))
    foretold, exact = plan_run(config, ranks, exact=False), plan_run(config, ranks)
    assert foretold.peak == pytest.approx(exact.peak, rel=0.02)
    assert (foretold.received, foretold.parameters) == (exact.received, exact.parameters)


def test_lora(directory):
    found = plan_run(tuning(directory), 1)
    assert found.trained == 3 * 3 * 2 * 4 * 128
    assert found.kinds["optimiser"] == 8 * found.trained
    assert found.peak < plan_run(pretraining(directory), 1).peak


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_lora_with_embedding_and_head(directory, quantize):
    """Counted as trained, in float32 whatever the base is kept in; received whole by each rank."""
    config = tuning(directory)
    config = replace(config, model=replace(config.model, dtype="bfloat16", quantize=quantize))
    whole = replace(config, lora=replace(config.lora, train_embeddings=True, train_head=True))
    before, found, two = plan_run(config, 1), plan_run(whole, 1), plan_run(whole, 2)
    assert found.trained == before.trained + 2 * 2000 * 128
    assert found.parameters == before.parameters
    assert found.kinds["optimiser"] == 8 * found.trained
    assert found.checkpoint == 12 * found.trained
    assert found.kinds["parameters"] == before.kinds["parameters"] + 2 * 2 * 2000 * 128  # 4 bytes each, not 2
    assert two.received == 4 * found.trained
    assert plan_run(replace(whole, parallel=ParallelSection(replicate=1)), 2).trained == found.trained


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_other_architectures(tmp_path, name):
    """Biases and norms are counted like all weights, int8 or not; a window's mask is there where a row is longer."""
    config = tiny_config(**SHAPES[name])
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "model")
    found = plan_run(pretraining(tmp_path / "model"), 1)
    assert found.parameters == found.trained == config.num_parameters()
    assert found.kinds["parameters"] == 4 * config.num_parameters()
    tuned = tuning(tmp_path / "model")
    int8 = plan_run(replace(tuned, model=replace(tuned.model, quantize="int8")), 1)
    shapes = tensor_shapes(config)
    matrices = [shapes[each] for each in int8_matrices(shapes)]
    smaller = sum(3 * rows * columns - 4 * rows for rows, columns in matrices)
    assert plan_run(tuned, 1).kinds["parameters"] - int8.kinds["parameters"] == smaller


@pytest.mark.parametrize("preset", ["llama-3-8b", "mistral-7b", "qwen2.5-7b"])
def test_presets_need_no_files(preset, capsys):
    """Keys and values of 8, 8 and 4 heads of 128, in 32, 32 and 28 layers, of 2 bytes each."""
    config = [str(ROOT / "configs/instruct_stage2_7b.yaml"), f"model.path={preset}", "model.quantize=null"]
    with pytest.raises(SystemExit):
        main(["plan", *config, "--inference", "--gpu-memory", "24GiB", "--json"])
    found, shape = json.loads(capsys.readouterr().out), PRESETS[preset]
    assert found["weights"] == 2 * shape.num_parameters()
    assert found["token"] == {"qwen2.5-7b": 56, "mistral-7b": 128, "llama-3-8b": 128}[preset] * 1024


@pytest.fixture
def quick_plans(monkeypatch):
    """Plans by a formula of micro-batch, recomputation and ranks, for searches that make many."""

    def plan(config, world_size, *, exact):
        train = config.train
        if train.global_batch_size // world_size % train.micro_batch_size:
            raise ValueError("uneven")
        a_row = 2 if train.activation_checkpointing else 5
        return SimpleNamespace(peak=(80 // world_size + train.micro_batch_size * a_row) * 2**20)

    monkeypatch.setattr("k2mini.training.fit.plan_run", plan)


def test_the_smallest_change_that_fits(directory, quick_plans):
    """Halving a micro-batch, which costs least, before computing twice; each alone, then together; then more ranks."""
    config = pretraining(directory)
    for room, expected in (
        (95, "train.micro_batch_size=2 (90.0 MiB)"),
        (85, "train.micro_batch_size=1 (85.0 MiB)"),
        (82, "train.micro_batch_size=1 train.activation_checkpointing=1 (82.0 MiB)"),
        (60, "--world-size 2 (60.0 MiB)"),
        (
            48,
            "train.micro_batch_size=1 train.activation_checkpointing=1 model.dtype=bfloat16 --world-size 2 (42.0 MiB)",
        ),
        (1, None),
    ):
        assert smallest_change(config, 1, room * 2**20) == expected
    single = pretraining(directory, micro_batch_size=1)
    assert smallest_change(single, 1, 82 * 2**20) == "train.activation_checkpointing=1 (82.0 MiB)"


def test_the_largest_micro_batch(directory, quick_plans):
    """Of those that share out a rank's samples evenly."""
    config = pretraining(directory, global_batch_size=24)
    assert largest_micro_batch(config, 1, (80 + 5 * 7) * 2**20) == 6
    assert largest_micro_batch(config, 1, 1e9) == 24
    assert largest_micro_batch(config, 2, 1e9) == 12
    assert largest_micro_batch(config, 1, 84 * 2**20) is None


def test_what_takes_less_is_named_once_and_if_not_taken(directory):
    pretrained, tuned = pretraining(directory), tuning(directory)
    assert what_takes_less(pretrained, 1) == (
        "train.micro_batch_size=2, train.activation_checkpointing=1, model.dtype=bfloat16 take less, the "
        "cheapest first; k2mini plan says what a run takes"
    )
    bf16 = replace(tuned.model, dtype="bfloat16")
    saving = replace(tuned, model=bf16, train=replace(tuned.train, micro_batch_size=1, activation_checkpointing=1))
    assert what_takes_less(saving, 1).startswith("model.quantize=int8 takes less")
    int8 = replace(saving, model=replace(bf16, quantize="int8"))
    assert what_takes_less(int8, 1) == "k2mini plan says what a run takes"
    assert what_takes_less(int8, 2).startswith("parallel.replicate=1 takes less")
    zero2 = replace(int8, parallel=ParallelSection(replicate=1, reshard_after_forward=False))
    assert what_takes_less(zero2, 2).startswith("parallel.reshard_after_forward=true takes less")


def test_a_frozen_base_is_whole_on_every_rank(directory):
    """So that a rank receives nothing but the adapters' gradients, once a step; shared where that is asked for."""
    config = tuning(directory)
    one, four = plan_run(config, 1), plan_run(replace(config, train=replace(config.train, global_batch_size=64)), 4)
    assert (four.peak, one.received) == (one.peak, 0)
    assert four.received == 2 * 3 * four.trained * 4 // 4
    shared = plan_run(replace(config, parallel=ParallelSection(replicate=1)), 4)
    assert shared.peak < four.peak
    assert shared.received > four.received


def test_from_the_command_line(tmp_path, run, planned_once):
    run_dir = f"run.dir={tmp_path}/run"  # where the demo's files go
    config = (ROOT / "configs/tiny_pretrain.yaml", run_dir)
    status, out, err = run("plan", *config, "--world-size", 2, "--gpu-memory", "1GiB", "--json", "--check")
    assert status == 0, err
    assert json.loads(out)["fits"]
    peak = json.loads(run("plan", *config, "--world-size", 1, "--gpu-memory", "1GiB", "--json")[1])["peak"]
    status, out, _ = run("plan", *config, "--world-size", 1, "--gpu-memory", f"{peak // 2**20}MiB")
    assert status == 0
    assert "of them trained, on 1 rank\n" in out
    assert "\ncommunication   none\n" in out
    assert "it does not fit" in out
    assert "the smallest change that fits: train.micro_batch_size=2 (" in out
    assert "NCCL" not in out
    status, out, _ = run("plan", *config, "--world-size", 2, "--gpu-memory", "1GiB", "--fit")
    assert "\nnot counted     CUDA's context (some 0.5 GiB) and NCCL's buffers (some 1.5 GiB)\n" in out
    assert out.endswith("\nthe largest micro-batch that fits: train.micro_batch_size=4\n")


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_check_tells_by_the_exit_status_whether_the_run_fits(tmp_path, run, monkeypatch, planned_once, form):
    # What else would fit is looked for in half a minute where nothing does, and has a test of its own.
    monkeypatch.setattr("k2mini.training.fit.smallest_change", lambda *_: None)
    config = (ROOT / "configs/tiny_stage1.yaml", f"run.dir={tmp_path}/run", "--world-size", 2, *form)
    for check, small in (((), 0), (("--check",), 1)):
        for memory, expected in (("1GiB", 0), ("1MiB", small)):
            status, out, err = run("plan", *config, "--gpu-memory", memory, *check)
            assert (status, err) == (expected, "")
            assert form or ("at most " in out and ("it fits" in out) == (memory == "1GiB"))
    assert run("plan", *config, "--gpu-memory", "0GiB", "--check")[0] == 2


def test_a_base_that_another_run_has_yet_to_make(tmp_path):
    config = load_config(FinetuneConfig, ROOT / "configs/instruct_stage1_7b.yaml", ["model.path=runs/further/model"])
    with pytest.raises(ValueError, match=r"no directory runs/further/model.* plan from a preset .*model.path=llama-7b"):
        plan_run(config, 1)


def test_no_ranks(directory):
    with pytest.raises(ValueError, match="--world-size must be at least 1"):
        plan_run(pretraining(directory), 0)
    with pytest.raises(ValueError, match="times the 3 ranks"):
        plan_run(pretraining(directory), 3)


def test_sizes():
    assert parse_size("40GiB", "--gpu-memory") == 40 * 2**30
    assert parse_size("1.5gb", "--gpu-memory") == 1_500_000_000
    for text in ("40", "GiB", "-1GiB", "40TB"):
        with pytest.raises(ValueError, match="must be a size such as 40GiB"):
            parse_size(text, "--gpu-memory")


@pytest.mark.parametrize("how", ["null", "int8"])
def test_context_that_fits(how, capsys):
    """90 % of 24 GiB less the weights, over 512 KiB a token."""
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    weights, tokens = 2 * 6_738_415_616, 18_531
    if how == "int8":
        weights, tokens = blocks + 2 * (6_738_415_616 - blocks) + 4 * 32 * (5 * 4096 + 2 * 11008), 30_873
    config = [str(ROOT / "configs/instruct_stage2_7b.yaml"), "model.path=llama-7b", f"model.quantize={how}"]
    with pytest.raises(SystemExit) as end:
        main(["plan", *config, "--inference", "--gpu-memory", "24GiB", "--json"])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"weights": weights, "token": 512 * 1024, "tokens": tokens, "fits": True}
    with pytest.raises(SystemExit) as end:
        main(["plan", *config, "--inference", "--gpu-memory", "6GiB", "--check"])
    assert end.value.code == 1
    assert "context         0 tokens in 90 % of 6GiB" in capsys.readouterr().out


# What is new: NF4, offload, cards by their names, speed and cost.


def seven_billion(*, rank=16, ranks=1, offload=None, **train):
    settings = {"lr": 1e-4, "max_steps": 1, "global_batch_size": 8 * ranks, "micro_batch_size": 4, **train}
    return FinetuneConfig(
        RunSection("x"),
        ModelSection("llama-7b", dtype="bfloat16", quantize="nf4"),
        InstructionSection("x", max_seq_len=512),
        TrainSection(**settings, activation_checkpointing=1),
        LoraSection(rank=rank, target_modules="all"),
        parallel=ParallelSection(offload=offload),
    )


def test_nf4_leaves_room_on_one_card():
    """Of 6.5 billion weights half a byte each and their scales; embedding, head and norms in bfloat16."""
    config = seven_billion()
    found = plan_run(config, 1, exact=False)
    assert found.peak <= 6.5 * 2**30
    assert found.trained == 32 * 16 * (4 * 8192 + 3 * (4096 + 11008))
    assert found.parameters == 6_738_415_616 + found.trained


@pytest.mark.slow
def test_seven_billion_offloaded_on_eight_ranks():
    config = replace(pretraining("llama-7b", global_batch_size=16, micro_batch_size=1), parallel=ParallelSection())
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    offloaded = replace(config, parallel=ParallelSection(offload="cpu"))
    kept, moved = (plan_run(each, 8, exact=False) for each in (config, offloaded))
    share = 4 * kept.parameters // 8
    assert kept.host == 0
    assert moved.host > 4 * share  # weights, gradients and two moments, and what rounding up takes
    assert kept.peak - moved.peak > 3.5 * share
    assert moved.received == kept.received


def test_what_is_offloaded_is_the_hosts(directory):
    """Weights, gradients, moments: nothing of them stays, of one rank's plan or of four ranks'."""

    def tensors(plan):  # cuBLAS's workspaces are larger than this model
        return plan.peak - plan.kinds["fragmentation"]

    config = pretraining(directory, activation_checkpointing=1)
    offloaded = replace(config, parallel=ParallelSection(offload="cpu"))
    for ranks in (1, 4):
        kept, moved = plan_run(config, ranks), plan_run(offloaded, ranks)
        share = 4 * kept.parameters / ranks
        assert not {"parameters", "optimiser"} & moved.kinds.keys()
        assert 4 * share <= moved.host <= 6 * share
        # A matrix on its way and, where one process needs no FSDP, what gathering and reducing take.
        assert tensors(moved) < tensors(kept) - (2 if ranks == 1 else 3) * share
    tuned = tuning(directory)
    moved = plan_run(replace(tuned, parallel=ParallelSection(offload="cpu")), 1)
    assert moved.host > 4 * moved.parameters  # the frozen base, too
    assert tensors(moved) < tensors(plan_run(tuned, 1))


def test_a_card_by_its_name(tmp_path, run, planned_once):
    """Six FLOP for each parameter and token, at a share of the data sheet's peak; and what that costs."""
    config = (ROOT / "configs/tiny_pretrain.yaml", f"run.dir={tmp_path}/run", "--world-size", 2)
    status, out, err = run("plan", *config, "--gpu", "A100-80g", "--price", 1.5, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["tokens_per_second"] == pytest.approx(2 * 0.30 * 312e12 / (6 * found["parameters"]), rel=1e-9)
    assert found["run_tokens"] == 200 * 8 * 128
    assert found["days"] == pytest.approx(200 * 1024 / found["tokens_per_second"] / 86400)
    assert found["cost"] == pytest.approx(found["days"] * 24 * 2 * 1.5)
    out = run("plan", *config, "--gpu", "a100-80g", "--utilisation", 0.2)[1]
    assert "are within 90 % of a100-80g\n" in out
    assert "(a guess: 20 % of 312 TFLOP/s a GPU; --measured RUN replaces it)" in out
    (tmp_path / "short").mkdir()
    rows = [{"step": n, "tokens_per_second": rate} for n, rate in enumerate((1, 1, 1, 40, 60, 50), 1)]
    (tmp_path / "short/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        "speed           50 tokens/s (measured in "
        in run("plan", *config, "--gpu", "1GiB", "--measured", tmp_path / "short")[1]
    )
    assert run("plan", *config, "--gpu", "1GiB")[1].endswith("% of 1GiB\n")  # no peak, so no guess
    status, _, err = run("plan", *config, "--gpu", "a100-41g")
    assert status == 2
    assert "--gpu is none of b200, h200, h100-80g, a100-80g" in err
    assert run("plan", *config, "--gpu", "1GiB", "--utilisation", 2)[0] == 2


def test_the_plan_stands_before_the_search_which_does_not_contradict_itself(tmp_path, run, monkeypatch, capfd):
    """One rank where none is said; the plan is printed first, and what is proposed at last is not denied before."""
    config, early = (ROOT / "configs/tiny_pretrain.yaml", f"run.dir={tmp_path}/run"), []
    monkeypatch.setattr("k2mini.training.fit.smallest_change", lambda *_: early.append(capfd.readouterr().out))
    monkeypatch.setattr("k2mini.training.fit.largest_micro_batch", lambda *_: None)
    for best, denied in ((("parallel.offload=cpu", 1.0), False), ((None, 0.0), True)):
        monkeypatch.setattr("k2mini.training.pace.fastest", lambda *_, best=best: best)
        status, out, err = run("plan", *config, "--gpu", "1MiB", "--fit")
        assert (status, err) == (0, "")
        assert "of them trained, on 1 rank\n" in early.pop()
        assert ("the smallest change that fits: none found" in out) == denied
    found = json.loads(run("plan", *config, "--gpu", "1MiB", "--fit", "--json")[1])
    assert early == [""]
    assert (found["fits"], found["fastest"]) == (False, None)
    assert run("plan", *config, "--gpu", "1MiB", "--world-size", 1, "--inference")[0] == 2


def test_the_length_of_a_run_is_not_guessed(tmp_path, run):
    epochs = ("train.max_steps=null", "train.epochs=2")
    config = (ROOT / "configs/tiny_stage1.yaml", f"run.dir={tmp_path}/run", *epochs, "--world-size", 1)
    out = run("plan", *config, "--gpu", "h100-80g")[1]
    assert "the run         of unknown length: its data is not prepared" in out


def test_the_fastest_settings_that_fit(directory, monkeypatch):
    """Nothing recomputed where there is room; then int8, NF4 and offload, as each of them is what fits."""

    def plan(config, world_size, *, exact):
        base = {None: 80, "int8": 40, "nf4": 20}[config.model.quantize] if config.parallel.offload is None else 5
        rows = config.train.micro_batch_size * (1 if config.train.activation_checkpointing else 5)
        return SimpleNamespace(peak=base + rows)

    monkeypatch.setattr("k2mini.training.fit.plan_run", plan)
    config, known = tuning(directory), plan_run(tuning(directory), 1)
    for room, expected in (
        (200, {"model.quantize=null", "train.activation_checkpointing=0", "train.micro_batch_size=16"}),
        (97, {"model.quantize=null", "train.activation_checkpointing=0", "train.micro_batch_size=2"}),
        (21, {"train.activation_checkpointing=1", "parallel.offload=cpu", "train.micro_batch_size=16"}),
        (6, {"parallel.offload=cpu"}),
    ):
        overrides, rate = fastest(config, known, 1, room, 150e12, 0.3)
        assert expected <= set(overrides.split()), (room, overrides)
        assert rate > 0
        assert rate == pytest.approx(fastest(config, known, 1, room, 300e12, 0.15)[1])
    assert fastest(config, known, 1, 1, 150e12, 0.3) == (None, 0.0)


def test_offload_and_four_bits_are_changes_too(directory, monkeypatch):
    """Offload is the slowest: where nothing else does alone; int8 may become NF4, but for a base that is stored so."""

    def plan(config, world_size, *, exact):
        base = {None: 80, "int8": 40, "nf4": 20}[config.model.quantize] if config.parallel.offload is None else 5
        return SimpleNamespace(peak=(base + config.train.micro_batch_size) * 2**20)

    monkeypatch.setattr("k2mini.training.fit.plan_run", plan)
    tuned = tuning(directory)
    int8 = replace(tuned, model=replace(tuned.model, quantize="int8"))
    for config, room, expected in (
        (tuned, 30, "model.quantize=nf4 (24.0 MiB)"),
        (int8, 30, "model.quantize=nf4 (24.0 MiB)"),
        (int8, 10, "parallel.offload=cpu (9.0 MiB)"),
        (
            int8,
            6,
            "train.micro_batch_size=1 train.activation_checkpointing=1 model.dtype=bfloat16 model.quantize=nf4 "
            "parallel.offload=cpu (6.0 MiB)",
        ),
    ):
        assert smallest_change(config, 1, room * 2**20) == expected
    monkeypatch.setattr("k2mini.training.fit.planned_base", lambda _path: (None, "int8"))
    assert smallest_change(int8, 1, 30 * 2**20) == "parallel.offload=cpu (9.0 MiB)"


def test_settings_that_are_no_faster_are_planned_once(directory, monkeypatch):
    """Where nothing fits, one plan of each; where something does, none of what can't be faster."""
    planned = []

    def plan(config, world_size, *, exact):
        planned.append(config.train.micro_batch_size)
        return SimpleNamespace(peak=config.train.micro_batch_size)

    monkeypatch.setattr("k2mini.training.fit.plan_run", plan)
    config, known = tuning(directory), plan_run(tuning(directory), 1)
    assert fastest(config, known, 1, 0, 150e12, 0.3) == (None, 0.0)
    assert planned == [1] * 12
    planned.clear()
    assert "train.micro_batch_size=16" in fastest(config, known, 1, 16, 150e12, 0.3)[0]
    assert len(planned) <= 4


def test_a_stored_base_is_planned_as_it_trains(tmp_path, directory, run):
    """What training refuses is refused; answering takes it as it is stored."""
    stored = tmp_path / "int8"
    shutil.copytree(directory, stored)
    fields = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps({**fields, "quantization_config": QUANTIZED["int8"]}))
    config = tuning(stored)
    for tried in (config, replace(config, model=replace(config.model, quantize="nf4")), pretraining(stored)):
        with pytest.raises(ValueError, match=r"int8 is quantised; train adapters over it .*quantize=int8"):
            plan_run(tried, 1)
    assert plan_run(replace(config, model=replace(config.model, quantize="int8")), 1).trained
    options = (f"run.dir={tmp_path}/run", "--inference", "--gpu-memory", "1GiB", "--json")
    file = ROOT / "configs/tiny_stage1.yaml"
    found = [
        json.loads(run("plan", file, f"model.path={path}", *more, *options)[1])
        for path, more in ((stored, ()), (directory, ("model.quantize=int8",)))
    ]
    assert found[0] == found[1]
    assert run("plan", file, f"model.path={stored}", "model.quantize=nf4", *options)[0] == 2


def test_the_bytes_of_a_node(directory):
    config = replace(pretraining(directory), parallel=ParallelSection(offload="cpu"))
    for ranks in (1, 4):
        found = plan_run(config, ranks)
        text = describe(found, config, ranks)
        assert f"host's memory   {readable(found.host)} a rank" in text
        assert (f", {readable(4 * found.host)} on a node that has all 4 (" in text) == (ranks == 4)


def test_what_has_no_rate_has_no_price(tmp_path, run, planned_once):
    config = (ROOT / "configs/tiny_pretrain.yaml", f"run.dir={tmp_path}/run")
    for options, message in (
        (("--world-size", 1, "--gpu", "1GiB", "--price", 1), "--price and --utilisation need a rate"),
        (("--world-size", 1, "--gpu-memory", "1GiB", "--utilisation", 0.3), "--price and --utilisation need a rate"),
        (("--world-size", 1, "--gpu", "h100-80g", "--utilisation", 0), "must be above 0"),
        (("--inference", "--gpu", "h100-80g", "--price", 1), "--price is of training's time"),
    ):
        status, _, err = run("plan", *config, *options)
        assert (status, message in err) == (2, True), (options, err)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["documents", "stage1", "stage2"])
def test_one_card_of_24_gigabytes(name):
    path = ROOT / f"configs/one_card_{name}_7b.yaml"
    kind = PretrainConfig if name == "documents" else FinetuneConfig
    found = plan_run(load_config(kind, path, ["model.path=llama-7b"]), 1, exact=False)
    assert found.peak <= BUDGET * 22 * 2**30  # of an A10G and an L4 as CUDA reports them
