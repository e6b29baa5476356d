"""Instruction tuning against peft, through kills and stages, and what must never go wrong again."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch

from k2mini.build import load_model
from k2mini.config import (
    CheckpointSection,
    CorpusSection,
    FinetuneConfig,
    InstructionSection,
    LoraSection,
    ModelSection,
    PretrainConfig,
    RunSection,
    TrainSection,
)
from k2mini.data.instructions import read_conversations, read_examples
from k2mini.data.packing import Examples
from k2mini.data.prompts import get_template
from k2mini.demo.pipeline import TEMPLATE
from k2mini.demo.sources import BASE
from k2mini.demo.world import instructions, read_facts
from k2mini.inference.decoding import Decoding
from k2mini.inference.generate import generate
from k2mini.nn.lora import adapter_tensors
from k2mini.training.loop import read_metrics
from k2mini.training.run import finetune, pretrain
from k2mini.training.step import accumulate, build_optimizer, clip_gradients, train_step
from k2mini.weights.adapter import save_adapter
from tests.conftest import ROOT, asset
from tests.helpers import adapted, examples, section
from tests.reference import to_peft


@pytest.fixture
def data(tmp_path):
    import random

    path = tmp_path / "data.json"
    path.write_text(json.dumps(instructions(read_facts("geoscience"), 300, random.Random(0))))
    return path


def config(tmp_path, data, name="run", lora=None, model=None, **train):
    settings = {"lr": 2e-3, "global_batch_size": 16, "micro_batch_size": 4, "max_steps": 12, "val_every": 4, **train}
    return FinetuneConfig(
        RunSection(str(tmp_path / name)),
        model or ModelSection(str(BASE)),
        InstructionSection(str(data), val_size=20, template=TEMPLATE, max_seq_len=128),
        TrainSection(**settings),
        lora or LoraSection(),
        CheckpointSection(every=5),
    )


def losses(folder):
    return [row.get("loss", row.get("val_loss")) for row in read_metrics(folder / "metrics.jsonl")]


def test_twenty_steps_equal_pefts():
    targets = ["q_proj", "k_proj", "v_proj"]
    model = adapted(targets=targets, fill=False)
    reference = to_peft(model, targets).train()
    ours = build_optimizer(model.train(), section(lr=1e-2))
    theirs = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    samples = Examples(examples(60), seed=1)
    for step in range(20):
        batch = samples.batch(4 * step, 4)
        loss = accumulate(model, [batch], batch.num_supervised()).item()
        mask = (batch.positions >= 0).long()
        logits = reference(batch.tokens, attention_mask=mask).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        clip_gradients(model, 1.0)
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()


def test_the_adapter_of_the_lowest_validation_loss_is_kept(tmp_path, data, caplog):
    """A learning rate that ruins what it has learned, once the warm-up is over."""
    caplog.set_level(logging.INFO, logger="k2mini")
    run = config(tmp_path, data, lr=0.2, warmup_steps=12, schedule="constant")
    out = finetune(run)
    found = {row["step"]: row["val_loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "val_loss" in row}
    best = min(found, key=found.get)
    assert best != 12
    assert f"step_{best:07}" in caplog.text
    model, tokenizer = load_model(BASE, adapter=out)
    from k2mini.data.instructions import hold_out
    from k2mini.training.validation import validation_loss

    records = read_conversations(data, tokenizer, get_template(TEMPLATE), run.data)
    again = validation_loss(model, Examples(hold_out(records, run.data.val_size, run.run.seed)[1], seed=None), 4)
    assert again == pytest.approx(found[best], rel=1e-5)


def test_stage_two_begins_where_stage_one_ended(tmp_path, data):
    """`init_adapter` takes the weights alone; `resume` goes on with the same run. Neither jumps."""
    first = finetune(config(tmp_path, data, "first"))
    second = config(tmp_path, data, "second", LoraSection(init_adapter=str(first)), max_steps=8)
    finetune(second)
    one, two = losses(tmp_path / "first"), losses(tmp_path / "second")
    assert two[0] < 1.3 * min(one)
    assert two[0] < 0.85 * one[0]
    with pytest.raises(ValueError, match=r"lora.rank is 4, that of lora.init_adapter .* is 8"):
        finetune(config(tmp_path, data, "third", LoraSection(rank=4, init_adapter=str(first))))
    with pytest.raises(ValueError, match=r"lora.rslora is True, that of lora.init_adapter .* is False"):
        finetune(config(tmp_path, data, "fourth", LoraSection(rslora=True, init_adapter=str(first))))


def test_a_compiled_run_goes_on_bit_for_bit(tmp_path, data, monkeypatch):
    """With dropout, and several documents a row. The graphs run as they are: that takes less time."""
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **given: whole(module, backend="eager", **given))
    runs = [config(tmp_path, data, name, max_steps=4, val_every=None, compile=True) for name in ("whole", "killed")]
    undisturbed, killed = (replace(run, checkpoint=CheckpointSection(every=2)) for run in runs)
    finetune(undisturbed)
    with monkeypatch.context() as patched:
        patched.setattr("k2mini.training.loop.train_step", lambda *a: kill() if a[4] == 3 else train_step(*a))
        with pytest.raises(RuntimeError, match="killed"):
            finetune(killed)
    finetune(killed)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def kill():
    raise RuntimeError("killed")


def test_validation_rows_are_not_trained_on(tmp_path, data):
    from k2mini.data.instructions import hold_out

    _, tokenizer = load_model(BASE)
    run = config(tmp_path, data)
    whole = read_examples(data, tokenizer, get_template(TEMPLATE), run.data)
    rest, aside = hold_out([[example] for example in whole], run.data.val_size, run.run.seed)
    assert (len(rest), len(aside)) == (280, 20)
    assert sorted(map(id, rest + aside)) == sorted(map(id, whole))
    assert whole[:20] != aside
    several = [[example, replace(example, unsupervised=1)] for example in whole]  # of one conversation each
    both = hold_out(several, run.data.val_size, run.run.seed)
    assert [part[::2] for part in both] == [rest, aside]
    assert [len(part) for part in both] == [560, 40]


def test_on_error_is_no_part_of_a_runs_identity(tmp_path, data, caplog):
    """It decides what is done with a bad record, not what a step computes: checkpoints without it are resumed."""
    caplog.set_level(logging.INFO, logger="k2mini")
    run = config(tmp_path, data, max_steps=4)
    finetune(run)
    state = json.loads((tmp_path / "run/checkpoints/step_0000004/state.json").read_text())
    assert "on_error" not in state["identity"]["data"]
    shutil.rmtree(tmp_path / "run/adapter")
    finetune(replace(run, data=replace(run.data, on_error="skip")))
    assert "resuming from" in caplog.text
    finetune(run)
    assert f"to train anew, set run.dir to another folder or remove {tmp_path}/run" in caplog.text


def test_messages_train_as_instructions_do(tmp_path, data):
    """Where the template is the same: the same steps, whatever form the records have."""
    records = json.loads(data.read_text())
    turns = [
        [
            ("human", record["instruction"] + ("\n" + record["input"] if record["input"] else "")),
            ("gpt", record["output"]),
        ]
        for record in records
    ]
    data.write_text(json.dumps([{"instruction": asked, "output": answer} for (_, asked), (_, answer) in turns]))
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "".join(json.dumps({"conversations": [{"from": f, "value": v} for f, v in pair]}) + "\n" for pair in turns)
    )
    for name, path in (("one", data), ("two", chats)):
        finetune(config(tmp_path, path, name, max_steps=4))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == two
    assert two[-1] < two[0]


def test_the_models_own_template_is_the_default(tmp_path, caplog):
    """It is said and noted, conversations train in it, and a run does not go on with another text of it."""
    pytest.importorskip("jinja2")
    caplog.set_level(logging.INFO, logger="k2mini")
    base, chats = tmp_path / "base", tmp_path / "chats.json"
    shutil.copytree(BASE, base)
    template = base / "chat_template.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + '\nA:' }}"
        "{% else %}{{ ' ' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
    )
    turns = [("user", "What is granite?"), ("assistant", "A rock."), ("user", "And basalt?"), ("assistant", "Too.")]
    chats.write_text(json.dumps([{"messages": [{"role": role, "content": said} for role, said in turns]}] * 40))
    run = config(tmp_path, chats, model=ModelSection(str(base)), max_steps=8)
    run = replace(run, data=replace(run.data, template=None, val_size=4))
    finetune(run)
    assert f"the template is the model's own, {template}" in caplog.text
    assert json.loads((tmp_path / "run/config.yaml").read_text())["data"]["template"] == "own"
    state = json.loads((tmp_path / "run/checkpoints/step_0000008/state.json").read_text())
    assert state["identity"]["data"]["template"].startswith("own@")
    found = [row["loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert found[-1] < 0.7 * found[0]
    finetune(run)
    assert "is complete; to train anew" in caplog.text
    template.write_text(template.read_text().replace("Q: ", "Question: "))
    for _ in range(2):  # once with the result there
        with pytest.raises(ValueError, match=r"another data\.template \(own@\w+, now own@\w+\)"):
            finetune(run)
        shutil.rmtree(tmp_path / "run/adapter", ignore_errors=True)


def test_without_a_template_of_its_own_alpaca_is_the_default(tmp_path, data):
    run = config(tmp_path, data, max_steps=1)
    finetune(replace(run, data=replace(run.data, template=None)))
    assert json.loads((tmp_path / "run/config.yaml").read_text())["data"]["template"] == "alpaca"
    state = json.loads((tmp_path / "run/checkpoints/step_0000001/state.json").read_text())
    assert state["identity"]["data"]["template"] == "alpaca"


def test_nothing_learned_is_not_saved(tmp_path):
    model = adapted(fill=False)
    with pytest.raises(ValueError, match="every B of the adapter is zero"):
        save_adapter(adapter_tensors(model), LoraSection(rank=4), tmp_path / "out", base="b")
    assert not (tmp_path / "out").exists()


def test_the_default_targets_are_k2s():
    """Its code has three sets of defaults; the README's commands, which ran, name these."""
    assert LoraSection().target_modules == ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"val_size": 300}}, r"data.val_size \(300\) leaves nothing of the 300 records"),
        ({"data": {"template": "llama"}}, "there is no template 'llama'; there are alpaca"),
        ({"data": {"path": "nowhere.json"}}, "there is no data file nowhere.json"),
        ({"lora": {"target_modules": ["query"]}}, "the model has no 'query'; there are q_proj"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, data, changes, message):
    run = config(tmp_path, data)
    for name, values in changes.items():
        run = replace(run, **{name: replace(getattr(run, name), **values)})
    with pytest.raises(ValueError, match=message):
        finetune(run)
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.slow
def test_fifty_of_fifty_answers_end(tmp_path):
    """A model tuned on examples that fit learns to stop."""
    import random

    path = tmp_path / "data.json"
    records = instructions(read_facts("general"), 1024, random.Random(0))
    path.write_text(json.dumps(records))
    out = finetune(config(tmp_path, path, max_steps=96, global_batch_size=32))
    model, tokenizer = load_model(BASE, adapter=out)
    template = get_template(TEMPLATE)
    prompts = [
        tokenizer.encode(template.prompt(r["instruction"], r["input"]), bos=True, eos=False) for r in records[:50]
    ]
    done = generate(model, prompts, Decoding(40), stop_ids=[tokenizer.eos_id])
    assert [completion.finish for completion in done] == ["eos"] * 50


@pytest.mark.slow
def test_an_int8_base_trains_as_well(tmp_path, capsys):
    """7,787 real records; validation loss within 2 % of the float32 base's."""
    arc = asset("data", "instructions", "arc_sft.json")
    found = {}
    for quantize in (None, "int8"):
        model = ModelSection(str(BASE), quantize=quantize)
        run = config(tmp_path, arc, str(quantize), model=model, max_steps=60, val_every=60)
        run = replace(run, data=replace(run.data, val_size=200, max_seq_len=256))
        finetune(run)
        found[quantize] = losses(tmp_path / str(quantize))[-1]
    with capsys.disabled():
        print(f"\nvalidation loss on arc_sft: float32 base {found[None]:.4f}, int8 base {found['int8']:.4f}")
    assert found["int8"] == pytest.approx(found[None], rel=0.02)


def test_all_parameters_on_instructions_as_a_plain_loop_does(tmp_path, data):
    """Without lora: losses and weights of 12 steps, against a few lines of PyTorch."""
    made = config(tmp_path, data, lr=1e-3, weight_decay=0.1, warmup_steps=0, schedule="constant", val_every=12)
    whole = ModelSection(str(BASE), dtype="float64")
    made = replace(made, lora=None, model=whole, data=replace(made.data, val_size=0, packing=False))
    out = finetune(made)
    assert out.name == "model"
    model, tokenizer = load_model(BASE, dtype="float64")
    optimizer = build_optimizer(model.train(), made.train)
    samples = Examples(read_examples(data, tokenizer, get_template(TEMPLATE), made.data), seed=0)
    expected = []
    for step in range(12):
        batch = samples.batch(16 * step, 16)
        logits = model(batch.tokens, batch.positions)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        expected.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-10)
    tuned, _ = load_model(out, dtype="float64")
    for ours, theirs in zip(tuned.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_lora_learns_documents_and_stage_one_goes_on_from_it(tmp_path, data):
    """The first loss is that of training all parameters; the base stays; the adapter is loaded, chained and merged."""
    facts = tmp_path / "facts.txt"
    facts.write_text("\n\n".join(record["output"] for record in json.loads(data.read_text())))
    train = TrainSection(lr=5e-3, global_batch_size=8, micro_batch_size=4, max_steps=12, warmup_steps=1)
    runs = []
    for name, lora in (("adapted", LoraSection(8, target_modules="all", dropout=0.0)), ("whole", None)):
        section = CorpusSection(str(facts), seq_len=64)
        run = PretrainConfig(RunSection(str(tmp_path / name)), ModelSection(str(BASE)), section, train, lora=lora)
        runs.append((pretrain(run), losses(tmp_path / name)))
    (adapter, ours), (whole, theirs) = runs
    assert (adapter.name, whole.name) == ("adapter", "model")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[-1] < ours[0] - 0.5
    tokens = torch.randint(3, 200, (2, 9))
    base, adapted_model, merged = (load_model(BASE, *how)[0](tokens) for how in ((), (adapter,), (adapter,)))
    assert (adapted_model - base).abs().max() > 0.1
    assert torch.equal(adapted_model, merged)
    first = config(tmp_path, data, lora=LoraSection(8, target_modules="all", init_adapter=str(adapter)), max_steps=1)
    plain = config(tmp_path, data, "plain", lora=LoraSection(8, target_modules="all"), max_steps=1)
    finetune(first), finetune(plain)
    assert losses(tmp_path / "run")[0] != losses(tmp_path / "plain")[0]
    with pytest.raises(ValueError, match=r"without lora all weights are trained"):
        replace(first, lora=None, model=ModelSection(str(BASE), quantize="int8"))


def test_one_cards_recipe_in_miniature(tmp_path, run):
    """configs/tiny_one_card_*.yaml, a few steps each: each goes on from the adapter of the run before it."""
    before = None
    for name, command in (("documents", "pretrain"), ("stage1", "finetune"), ("stage2", "finetune")):
        path, folder = ROOT / f"configs/tiny_one_card_{name}.yaml", tmp_path / name
        chained = [] if before is None else [f"lora.init_adapter={before}"]
        short = [f"run.dir={folder}", "train.max_steps=6", "train.warmup_steps=1", "train.val_every=3"]
        status, out, err = run(command, path, *short, "checkpoint.every=3", *chained)
        assert (status, out) == (0, f"{folder}/adapter\n"), err
        rows = read_metrics(folder / "metrics.jsonl")
        validated = [row["val_loss"] for row in rows if "val_loss" in row]
        assert len(validated) == 2
        if before is None:
            assert validated[1] < validated[0]
        else:  # it begins with what was learned, and a fresh one elsewhere
            fresh = [f"run.dir={tmp_path}/fresh_{name}", "train.max_steps=1", "train.warmup_steps=1"]
            fresh += ["train.val_every=null", "lora.init_adapter=null"]
            assert run(command, path, *fresh)[0] == 0
            assert rows[0]["loss"] != losses(tmp_path / f"fresh_{name}")[0]
        before = folder / "adapter"
