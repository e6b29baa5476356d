"""Documents by LoRA and instructions by all parameters, against peft and transformers in plain loops; and in chains."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

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
from k2mini.demo.phrases import TEMPLATE
from k2mini.demo.sources import BASE
from k2mini.demo.world import documents as world_documents
from k2mini.demo.world import instructions as world_instructions
from k2mini.demo.world import read_facts
from k2mini.distributed import ALONE
from k2mini.training.loop import read_metrics
from k2mini.training.run import finetune, pretrain
from k2mini.training.samples import documents, instructions
from k2mini.training.step import local_batches
from k2mini.weights.merge import merge_adapters
from k2mini.weights.model_directory import ModelDirectory
from tests.helpers import ALL

DOUBLE = ModelSection(str(BASE), "float64")


@pytest.fixture
def data(tmp_path):
    facts = read_facts("geoscience")
    lines = [json.dumps({"text": text}) for text in world_documents(facts[:90], 3, random.Random(0))]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    for name in ("general", "expert"):
        records = world_instructions(read_facts("geoscience" if name == "expert" else "general"), 200, random.Random(1))
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    return tmp_path


def corpus_run(data, lora, *, name="documents", mask=True, model=DOUBLE, **changes):
    train = {"lr": 5e-3, "global_batch_size": 8, "micro_batch_size": 4, "max_steps": 20, "warmup_steps": 4, **changes}
    corpus = CorpusSection(str(data / "corpus.jsonl"), seq_len=64, document_mask=mask)
    keep = CheckpointSection(every=50)
    return PretrainConfig(RunSection(str(data / name)), model, corpus, TrainSection(**train), keep, lora=lora)


def tuning_run(data, lora, *, name="tuned", model=DOUBLE, file="general", **changes):
    train = {"lr": 2e-3, "global_batch_size": 16, "micro_batch_size": 4, "max_steps": 10, "warmup_steps": 2, **changes}
    records = InstructionSection(str(data / f"{file}.json"), template=TEMPLATE, max_seq_len=128)
    return FinetuneConfig(RunSection(str(data / name)), model, records, TrainSection(**train), lora)


def losses(config):
    return [row["loss"] for row in read_metrics(Path(config.run.dir) / "metrics.jsonl") if "loss" in row]


def transformers_model():
    """The demo's base in double precision."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float64).train()


def plain_loop(model, config, read):
    """Losses of the run's steps on its batches, written out; transformers is told of documents by a 4-D mask."""
    samples, train = read(config, ModelDirectory(config.model.path), ALONE)[0], config.train
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.lr, weight_decay=0.0)
    found = []
    for step in range(train.max_steps):
        batches = local_batches(samples, step * train.global_batch_size, train, ALONE)
        count = sum(int((batch.labels >= 0).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            told = {}
            if batch.positions is not None:
                number = (batch.positions == 0).cumsum(1).masked_fill(batch.positions < 0, -1)  # of the document
                seen = (number[:, :, None] == number[:, None]) & torch.ones(*[batch.tokens.shape[1]] * 2).tril().bool()
                mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
                told = {"attention_mask": mask[:, None], "position_ids": batch.positions.clamp(min=0)}
            logits = model(batch.tokens, **told).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        warmed, left = (step + 1) / train.warmup_steps, max(1, train.max_steps - train.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = train.lr * min(warmed, 1 - max(0, step - train.warmup_steps) / left)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


@pytest.mark.parametrize(("mask", "whole"), [(False, []), (True, []), (True, ["embed_tokens", "lm_head"])])
def test_twenty_steps_of_documents_by_lora_equal_pefts(data, mask, whole):
    """Packed blocks, all modules, rank 4, from the same adapter: losses, and every weight of the adapter afterwards."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    settings = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, target_modules=ALL, modules_to_save=whole, task_type="CAUSAL_LM"
    )
    model = get_peft_model(transformers_model(), settings)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    model.save_pretrained(data / "start")
    flags = {"train_embeddings": "embed_tokens" in whole, "train_head": "lm_head" in whole}
    lora = LoraSection(rank=4, alpha=8.0, dropout=0.0, target_modules="all", init_adapter=str(data / "start"), **flags)
    config = corpus_run(data, lora, mask=mask)
    out = pretrain(config)
    expected = plain_loop(model, config, documents)
    assert losses(config) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.8 * expected[0]
    theirs, ours = get_peft_model_state_dict(model), load_file(out / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert len(ours) == 2 * 7 * 4 + len(whole)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor.detach(), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("steps", [1, 6])
def test_full_tuning_on_instructions_equals_transformers(data, steps):
    """All parameters, packed rows: the weights after a step and after several, and each step's loss."""
    config = tuning_run(data, None, lr=2e-4, max_steps=steps, warmup_steps=min(2, steps))
    out = finetune(config)
    model = transformers_model()
    expected = plain_loop(model, config, instructions)
    assert losses(config) == pytest.approx(expected, rel=1e-5)
    start, tuned = load_file(BASE / "model.safetensors"), load_file(out / "model.safetensors")
    assert tuned.keys() == start.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tuned[name].double(), tensor, rtol=0, atol=1e-5, msg=name)
        assert not torch.equal(tuned[name].double(), start[name].double())


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_of_documents_goes_into_both_stages_or_is_merged_before_them(data, whole):
    """Both ways begin stage one at the same loss, that of the documents' model, and learn on from there."""
    shape = {"rank": 4, "dropout": 0.0, "target_modules": "all", "train_embeddings": whole, "train_head": whole}
    single = ModelSection(str(BASE))
    read = pretrain(corpus_run(data, LoraSection(**shape), model=single))

    first = finetune(tuning_run(data, LoraSection(**shape, init_adapter=str(read)), name="one", model=single))
    second = LoraSection(**shape, init_adapter=str(first))
    chained = finetune(tuning_run(data, second, name="two", model=single, file="expert"))

    wide = data / "wide"  # the packaged base is in float16, to which merging would round
    load_and_save(BASE, wide)
    merge_adapters(wide, [read], data / "merged")
    merged = ModelSection(str(data / "merged"))
    own = finetune(tuning_run(data, LoraSection(dropout=0.0), name="merged_one", model=merged))
    last = LoraSection(dropout=0.0, init_adapter=str(own))
    apart = finetune(tuning_run(data, last, name="merged_two", model=merged, file="expert"))

    found = {name: losses(tuning_run(data, None, name=name)) for name in ("one", "two", "merged_one", "merged_two")}
    plain = tuning_run(data, LoraSection(dropout=0.0), name="plain", model=single, max_steps=1, warmup_steps=1)
    finetune(plain)
    assert found["one"][0] == pytest.approx(found["merged_one"][0], rel=1e-5)
    assert abs(found["one"][0] - losses(plain)[0]) > 0.01  # the documents are in it
    for one, two in (("one", "two"), ("merged_one", "merged_two")):
        assert min(found[one][-3:]) < found[one][0]
        assert min(found[two][-3:]) < found[two][0]
    tokens = torch.randint(1200, (2, 30), generator=torch.Generator().manual_seed(0))
    for model, adapter in ((BASE, chained), (data / "merged", apart)):
        merge_adapters(wide if model == BASE else model, [adapter], data / f"all_{adapter.parent.name}")
        whole_model, _ = load_model(data / f"all_{adapter.parent.name}")
        torch.testing.assert_close(load_model(model, adapter)[0](tokens), whole_model(tokens), rtol=0, atol=1e-4)


def load_and_save(base, out):
    """The model in float32."""
    from k2mini.weights.model_files import save_model

    model, tokenizer = load_model(base)
    save_model(model.state_dict(), model.config, out, tokenizer=tokenizer)
