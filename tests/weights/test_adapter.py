"""Adapters in PEFT's format, with peft at the other end."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from k2mini.build import load_model
from k2mini.config import CorpusSection, LoraSection, ModelSection, PretrainConfig, RunSection, TrainSection
from k2mini.nn.lora import adapter_tensors, attach, init_adapters, lora_modules
from k2mini.training.run import pretrain
from k2mini.weights.adapter import check_base, load_adapters, read_adapter, read_adapter_config, save_adapter
from k2mini.weights.convert import convert
from k2mini.weights.merge import merge_adapters
from k2mini.weights.model_directory import ModelDirectory, read_manifest
from k2mini.weights.model_files import save_model
from tests.conftest import SHAPES, tiny_config, tiny_llama
from tests.helpers import ALL, TOKENS, adapted, fill_adapters, quantised

SECTION = LoraSection(rank=4, alpha=6.0, dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj"])


@pytest.fixture
def written(tmp_path, request):
    """(base directory, adapter directory, the adapted model)"""
    config = tiny_config(**SHAPES[getattr(request, "param", "multi-head")])
    model = adapted(config)
    plain = tiny_llama(config)
    save_model(plain.state_dict(), plain.config, tmp_path / "base")
    save_adapter(adapter_tensors(model), SECTION, tmp_path / "adapter", base=str(tmp_path / "base"))
    return tmp_path / "base", tmp_path / "adapter", model


every_kind = pytest.mark.parametrize("written", ["multi-head", "mistral", "qwen2", "qwen3"], indirect=True)


@every_kind
def test_peft_loads_what_k2mini_writes(written):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter, model = written
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, rtol=0, atol=1e-5)


@every_kind
def test_k2mini_loads_what_peft_writes(written, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, _, _ = written
    config = LoraConfig(r=3, lora_alpha=5, target_modules=ALL, init_lora_weights=False, task_type="CAUSAL_LM")
    reference = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    reference.save_pretrained(tmp_path / "theirs")
    model, _ = load_model(base, adapter=tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, rtol=0, atol=1e-5)


def test_it_comes_back_as_it_was(written):
    base, adapter, model = written
    loaded, _ = load_model(base, adapter=adapter)
    for name, module in lora_modules(model).items():
        assert torch.equal(module.lora_A, lora_modules(loaded)[name].lora_A)
        assert torch.equal(module.lora_B, lora_modules(loaded)[name].lora_B)
    assert torch.equal(model(TOKENS), loaded(TOKENS))


@every_kind
def test_merged_equals_unmerged_here_and_in_peft(written, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter, model = written
    merge_adapters(base, [adapter], tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged")
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=0, atol=1e-5)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    theirs = reference.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)


@pytest.fixture
def several(written, tmp_path):
    """Two adapters beside the first: of another rank, alpha and modules; and rank-stabilised, over all modules."""
    base, first, _ = written
    folders = [first]
    for name, rank, targets, rslora in (("two", 2, ["v_proj", "up_proj"], False), ("three", 5, ALL, True)):
        section = LoraSection(rank=rank, alpha=3.0, dropout=0.0, target_modules=targets, rslora=rslora)
        model = tiny_llama()
        attach(model, section)
        init_adapters(model, seed=rank)
        fill_adapters(model)
        save_adapter(adapter_tensors(model), section, tmp_path / name, base=str(base))
        folders.append(tmp_path / name)
    return base, folders


@pytest.mark.parametrize("weights", [[], [0.7, -0.3, 2.0]])
def test_several_adapters_are_added_with_their_weights(several, tmp_path, run, weights):
    """The exact sum, in double precision; and peft's, one adapter after the other."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base, folders = several
    out = tmp_path / "out"
    chosen = ["--weights", *weights] if weights else []
    status, _, err = run("merge", "--base", base, "--adapter", *folders, *chosen, "--out", out)
    assert status == 0, err
    assert ("each adapter has weight 1" in err) == (not weights)
    expected = {name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()}
    theirs = {name: tensor.clone() for name, tensor in expected.items()}
    for folder, weight in zip(folders, weights or [1, 1, 1], strict=True):
        section = read_adapter_config(folder)
        for module, (a, b) in read_adapter(folder, section).items():
            expected[f"{module}.weight"] += weight * section.scaling * b.double() @ a.double()
        tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).merge_and_unload()
        before = load_file(base / "model.safetensors")
        for name, tensor in tuned.state_dict().items():
            theirs[name] += weight * (tensor - before[name]).double()
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=2e-7)
        torch.testing.assert_close(tensor.double(), theirs[name], rtol=0, atol=3e-6)


def test_weights_are_pefts_concatenation(several, tmp_path):
    """`add_weighted_adapter` with 'cat', for adapters of the same modules, as it wants them."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    base, (first, _, third) = several
    reference = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), first, "first")
    reference.load_adapter(third, "third")
    reference.add_weighted_adapter(["first", "third"], [0.7, 0.3], "both", combination_type="cat")
    reference.set_adapter("both")
    merge_adapters(base, [first, third], tmp_path / "out", weights=[0.7, 0.3])
    merged, _ = load_model(tmp_path / "out")
    torch.testing.assert_close(merged(TOKENS), reference.eval()(TOKENS).logits, rtol=0, atol=2e-5)


def test_one_adapter_of_weight_one_is_merged_as_ever(written, tmp_path):
    """Bit for bit: W + scaling B A in float32; and one weight scales one adapter."""
    base, adapter, _ = written
    for weight in (1.0, 0.5):
        merge_adapters(base, [adapter], tmp_path / f"{weight}", weights=[weight])
    merge_adapters(base, [adapter], tmp_path / "plain")
    assert (tmp_path / "1.0/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    before, plain, half = (
        load_file(folder / "model.safetensors") for folder in (base, tmp_path / "plain", tmp_path / "0.5")
    )
    for module, (a, b) in read_adapter(adapter, SECTION).items():
        name = f"{module}.weight"
        assert torch.equal(plain[name], before[name] + SECTION.scaling * (b @ a))
        assert torch.equal(half[name], before[name] + 0.5 * SECTION.scaling * (b @ a))


def test_adapters_are_checked_before_anything_is_written(several, tmp_path, run):
    base, folders = several
    other = tiny_llama(seed=1)
    save_model(other.state_dict(), other.config, tmp_path / "other")
    save_adapter(adapter_tensors(adapted()), SECTION, tmp_path / "strange", base=str(tmp_path / "other"))
    out = tmp_path / "out"
    for adapters, weights, said in (
        (folders, [0.7], "--weights 0.7: as many finite numbers are needed as adapters, 3"),
        (folders[:1], [1, 2], "--weights 1 2: as many finite numbers are needed as adapters, 1"),
        (folders[:2], [1, "nan"], "--weights 1 nan: as many finite numbers"),
        ([folders[0], folders[0]], [], "one is named twice; give it twice the weight"),
        ([folders[0], tmp_path / "strange"], [], f"{tmp_path / 'strange'} was trained on another base than {base}"),
        ([folders[0], base], [], "has no adapter_config.json"),
        ([folders[0], tmp_path / "none"], [], f"there is no directory {tmp_path / 'none'}"),
    ):
        chosen = ["--weights", *weights] if weights else []
        status, printed, err = run("merge", "--base", base, "--adapter", *adapters, *chosen, "--out", out)
        assert (status, printed) == (2, "")
        assert said in err.splitlines()[-1]
        assert not out.exists()
    status, _, err = run("merge", "--base", base, "--adapter", *folders, "--out", folders[2])
    assert (status, "is itself an input" in err) == (2, True)


def edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "is not of rank 8"),
        ({"target_modules": ["q_proj"]}, "k_proj is not in the model; they do not belong together"),
        ({"target_modules": ALL}, "is not in the adapter; they do not belong together"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"r": 0}, "lora.rank must be positive"),
        ({"r": None}, "r must be a whole number"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(written, changes, message):
    base, adapter, _ = written
    edit(adapter, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(base, adapter=adapter)


def test_damaged_and_missing_files(written, tmp_path):
    base, adapter, _ = written
    with pytest.raises(ValueError, match=r"has no adapter_config.json"):
        load_model(base, adapter=base)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    for call in (lambda: load_model(base, adapter=adapter), lambda: merge_adapters(base, [adapter], tmp_path / "out")):
        with pytest.raises(ValueError, match="is missing or damaged"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_model_without_adapter_has_none_to_save(tmp_path):
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(adapter_tensors(tiny_llama()), SECTION, tmp_path / "x", base="b")


def test_an_adapter_of_2023_is_read(written):
    """peft 0.3 wrote adapter_model.bin and fewer fields, as in K2's own adapter."""
    base, adapter, model = written
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    torch.save(tensors, adapter / "adapter_model.bin")
    weights.unlink()
    (adapter / "manifest.json").unlink()
    old = {
        "base_model_name_or_path": "daven3/k2",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(old))
    loaded, _ = load_model(base, adapter=adapter)
    assert torch.equal(model(TOKENS), loaded(TOKENS))
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model.bin is truncated"):
        load_model(base, adapter=adapter)


def test_an_empty_adapter_is_refused(written):
    """443 bytes: what alpaca-lora's users found on their disks."""
    base, adapter, _ = written
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is empty: it holds no LoRA weight"):
        load_model(base, adapter=adapter)


def test_keys_that_would_have_no_effect_are_refused(written):
    base, adapter, _ = written
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key.replace("base_model.model.", ""): value for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match="which is no LoRA weight"):
        load_model(base, adapter=adapter)


def test_another_base_is_refused(written, tmp_path):
    _, adapter, _ = written
    other = tiny_llama(seed=1)
    save_model(other.state_dict(), other.config, tmp_path / "other")
    for call in (
        lambda: load_model(tmp_path / "other", adapter=adapter),
        lambda: merge_adapters(tmp_path / "other", [adapter], tmp_path / "merged"),
    ):
        with pytest.raises(ValueError, match="was trained on another base than"):
            call()
    half = tiny_llama(dtype=torch.float16)
    save_model(half.float().state_dict(), half.config, tmp_path / "wide")
    save_model(half.half().state_dict(), half.config, tmp_path / "narrow")
    prints = {ModelDirectory(tmp_path / name).fingerprint() for name in ("wide", "narrow")}
    assert len(prints) == 1  # the same values in another dtype are the same base


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_an_adapter_over_quantised_weights_is_one_of_the_full_ones(tmp_path, tiny_tokenizer, run, how):
    """Whichever of the two it was trained over, it is merged into the full ones and put beside either."""
    text = tmp_path / "documents.jsonl"
    text.write_text(json.dumps({"text": "granite is a rock, basalt is a rock of the mantle. " * 20}))
    names = ("base", "other")
    for seed, name in enumerate(names):
        model = tiny_llama(tiny_config(intermediate_dim=128, vocab_size=tiny_tokenizer.vocab_size), seed)
        save_model(model.state_dict(), model.config, tmp_path / name, tokenizer=tiny_tokenizer)
        convert(tmp_path / name, "hf", tmp_path / f"{name}_{how}", quantize=how)
    (base, other), (stored, strange) = ([tmp_path / f"{n}{end}" for n in names] for end in ("", f"_{how}"))
    train, lora = TrainSection(lr=1e-2, max_steps=2, global_batch_size=2, micro_batch_size=2), LoraSection(rank=2)
    for folder in (base, stored):
        told = (ModelSection(str(folder), quantize=how), CorpusSection(str(text), seq_len=16), train)
        pretrain(PretrainConfig(RunSection(str(tmp_path / f"{folder.name}_run")), *told, lora=lora))
    adapters = [tmp_path / f"{folder.name}_run/adapter" for folder in (base, stored)]
    assert len({(adapter / "adapter_model.safetensors").read_bytes() for adapter in adapters}) == 1
    for adapter in adapters:
        manifest = read_manifest(adapter)
        assert (manifest["base"], manifest["quantize"]) == (ModelDirectory(base).fingerprint(), how)
        over = [
            load_model(base, adapter=adapter, quantize=how)[0](TOKENS),
            load_model(stored, adapter=adapter)[0](TOKENS),
        ]
        assert torch.equal(*over)
        assert load_adapters(load_model(stored)[0], ModelDirectory(stored), {"one": adapter})["one"]
        out = tmp_path / f"{adapter.parent.name}_merged"
        status, _, err = run("merge", "--base", base, "--adapter", adapter, "--out", out)
        assert (status, err.count(f"was trained over {how} weights; merged, its answers differ")) == (0, 1)
        torch.testing.assert_close(load_model(out)[0](TOKENS), load_model(base, adapter=adapter)[0](TOKENS))
        for stranger in (other, strange):
            with pytest.raises(ValueError, match=f"was trained on another base than {stranger}"):
                load_model(stranger, adapter=adapter)
        with pytest.raises(ValueError, match="was trained on another base than"):
            merge_adapters(other, [adapter], tmp_path / "no")
    convert(base, "meta", tmp_path / "meta")
    convert(tmp_path / "meta", "hf", tmp_path / "by_meta", quantize=how)
    assert read_manifest(tmp_path / "by_meta")["quantized_from"] == ModelDirectory(base).fingerprint()


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_quantised_weights_that_were_changed_are_another_base(tmp_path, tiny_tokenizer, how):
    """What convert noted is believed while the weights are those that it wrote, and only then."""
    text, base, stored = tmp_path / "text.txt", tmp_path / "base", tmp_path / "stored"
    text.write_text("granite is a rock. " * 40)
    model = tiny_llama(tiny_config(intermediate_dim=128, vocab_size=tiny_tokenizer.vocab_size))
    save_model(model.state_dict(), model.config, base, tokenizer=tiny_tokenizer)
    convert(base, "hf", stored, quantize=how)
    assert read_manifest(stored)["fingerprint"] == ModelDirectory(stored).fingerprint()
    train = TrainSection(lr=1e-2, max_steps=1, global_batch_size=2, micro_batch_size=2)
    told = (ModelSection(str(stored), quantize=how), CorpusSection(str(text), seq_len=16), train)
    of_both = pretrain(PretrainConfig(RunSection(str(tmp_path / "one")), *told, lora=LoraSection(rank=2)))
    tensors = load_file(stored / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "changed", metadata={"format": "pt"})
    (tmp_path / "changed").replace(stored / "model.safetensors")
    with pytest.raises(ValueError, match="was trained on another base than"):
        check_base(of_both, ModelDirectory(stored))
    of_changed = pretrain(PretrainConfig(RunSection(str(tmp_path / "two")), *told, lora=LoraSection(rank=2)))
    assert read_manifest(of_changed)["base"] == ModelDirectory(stored).fingerprint()
    assert check_base(of_changed, ModelDirectory(base), changed := ModelDirectory(stored)) is changed


def test_rank_stabilised_scaling_equals_pefts(written, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base, _, _ = written
    settings = LoraConfig(
        r=4, lora_alpha=5, target_modules=ALL, init_lora_weights=False, use_rslora=True, task_type="CAUSAL_LM"
    )
    reference = get_peft_model(LlamaForCausalLM.from_pretrained(base), settings).eval()
    reference.save_pretrained(tmp_path / "theirs")
    model, _ = load_model(base, adapter=tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, rtol=0, atol=1e-5)


# What trains whole beside the adapters.


def both(*names):
    """A section with these of embed_tokens and lm_head."""
    flags = {"train_embeddings": "embed_tokens" in names, "train_head": "lm_head" in names}
    return LoraSection(rank=4, alpha=6.0, dropout=0.0, target_modules=ALL, **flags)


def wholly_adapted(section, dtype=torch.float32):
    """A tiny model whose adapters, embedding and head have all been changed, and these as `save_adapter` takes them."""
    model = tiny_llama(dtype=dtype)
    attach(model, section, whole=True)
    init_adapters(model, seed=1)
    fill_adapters(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name in set(trained) & {"model.embed_tokens.weight", "lm_head.weight"}:
            trained[name] += 0.05 * torch.randn(199, 64, generator=torch.Generator().manual_seed(len(name)))
    return model, {name: parameter.detach() for name, parameter in trained.items()}


choices = pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])


@choices
def test_peft_loads_embedding_and_head_as_k2mini_writes_them(tmp_path, names, run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter, plain = tmp_path / "base", tmp_path / "adapter", tiny_llama()
    save_model(plain.state_dict(), plain.config, base)
    model, trained = wholly_adapted(both(*names))
    assert len(trained) == 2 * 7 * 3 + len(names)
    save_adapter(trained, both(*names), adapter, base=str(base))
    assert json.loads((adapter / "adapter_config.json").read_text())["modules_to_save"] == list(names)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, rtol=0, atol=1e-5)
    assert (plain(TOKENS) - model(TOKENS)).abs().max() > 0.1
    before = (base / "model.safetensors").read_bytes()
    assert torch.equal(load_model(base, adapter)[0](TOKENS), model(TOKENS))
    assert (base / "model.safetensors").read_bytes() == before  # it was mapped
    merge_adapters(base, [adapter], tmp_path / "merged")
    merged, theirs = load_model(tmp_path / "merged")[0], reference.merge_and_unload().state_dict()
    torch.testing.assert_close(merged(TOKENS), model(TOKENS), rtol=0, atol=1e-5)
    torch.testing.assert_close(load_model(base, adapter, merge=True)[0](TOKENS), merged(TOKENS), rtol=0, atol=0)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
    status, told, _ = run("info", adapter)
    assert (status, f"(21 modules), and {names[0]} whole" in told) == (0, True)
    assert f"parameters: {sum(tensor.numel() for tensor in trained.values()):,}" in told


@choices
def test_k2mini_loads_embedding_and_head_as_peft_writes_them(tmp_path, names):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, plain = tmp_path / "base", tiny_llama()
    save_model(plain.state_dict(), plain.config, base)
    config = LoraConfig(
        r=3, target_modules=ALL, modules_to_save=list(names), init_lora_weights=False, task_type="CAUSAL_LM"
    )
    reference = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    reference.save_pretrained(tmp_path / "theirs")
    section = read_adapter_config(tmp_path / "theirs")
    assert section.modules_to_save == list(names)
    model, _ = load_model(base, adapter=tmp_path / "theirs")
    torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, rtol=0, atol=1e-5)


def test_embedding_and_head_stay_in_float32_over_bf16_int8_and_nf4(tmp_path):
    """They, and their gradients; what comes out is the model's dtype, and at first what the base gives."""
    section, labels = both("embed_tokens", "lm_head"), TOKENS[:, 1:]
    for dtype, how in ((torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.float32, "nf4"), (torch.float64, None)):
        model, plain = (tiny_llama(tiny_config(intermediate_dim=128), dtype=dtype) for _ in range(2))
        for each in (model, plain) if how else ():
            quantised(each, how)
        attach(model, section, whole=True)
        init_adapters(model, seed=0)
        logits = model(TOKENS)
        assert logits.dtype == model.dtype == dtype
        assert torch.equal(logits, plain(TOKENS))
        assert model.loss(TOKENS[:, :-1], None, labels) == plain.loss(TOKENS[:, :-1], None, labels)
        model.loss(TOKENS[:, :-1], None, labels).backward()
        kept = torch.promote_types(dtype, torch.float32)
        for module in (model.model.embed_tokens, model.lm_head):
            assert module.weight.dtype == module.weight.grad.dtype == kept
            assert module.weight.grad.any()


def test_embedding_and_head_that_can_not_be_are_refused(tmp_path, run):
    base, adapter, plain = tmp_path / "base", tmp_path / "adapter", tiny_llama()
    save_model(plain.state_dict(), plain.config, base)
    section = both("embed_tokens", "lm_head")
    _, trained = wholly_adapted(section)
    save_adapter(trained, section, adapter, base=str(base))
    save_adapter({**adapter_tensors(wholly_adapted(both())[0])}, both(), tmp_path / "other", base=str(base))
    with pytest.raises(ValueError, match=r"adapter has its own embed_tokens and lm_head, where adapters share"):
        load_adapters(load_model(base)[0], ModelDirectory(base), {"one": adapter})
    for more in (["--adapter", adapter, tmp_path / "other"], ["--adapter", adapter, "--weights", 0.5]):
        status, _, err = run("merge", "--base", base, *more, "--out", tmp_path / "out")
        assert status == 2
        assert "has its own embed_tokens and lm_head, which can't be added to others" in err
        assert not (tmp_path / "out").exists()
    tied = tiny_llama(tiny_config(tie_embeddings=True))
    with pytest.raises(
        ValueError, match=r"need a model whose embedding and head are two matrices; .*tie_word_embeddings"
    ):
        attach(tied, section, whole=True)
    save_model(tiny_llama(tied.config).state_dict(), tied.config, tmp_path / "tied")
    (adapter / "manifest.json").unlink()
    for merge in (False, True):
        with pytest.raises(ValueError, match=rf"{adapter}: .*tie_word_embeddings"):
            load_model(tmp_path / "tied", adapter, merge=merge)
    weights = adapter / "adapter_model.safetensors"
    tensors, name = load_file(weights), "base_model.model.lm_head.weight"
    for changed, said in (
        ({name: tensors[name][:, :-1].contiguous()}, "lm_head.weight has another shape than the model's"),
        ({name: torch.full_like(tensors[name], torch.nan)}, f"has no {name}, which .* names, or it is not finite"),
        ({"base_model.model.model.norm.weight": torch.ones(64)}, "norm.weight, which is no LoRA weight"),
    ):
        save_file({**tensors, **changed}, weights)
        for merge in (False, True):
            with pytest.raises(ValueError, match=said):
                load_model(base, adapter, merge=merge)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    with pytest.raises(ValueError, match=f"has no {name}"):
        load_model(base, adapter)
    for value in (["embed_tokens", "norm"], "lm_head", [7], {"lm_head": 1}):
        edit(adapter, modules_to_save=value)
        with pytest.raises(ValueError, match=r"modules_to_save is .*; k2mini has embed_tokens and lm_head"):
            load_model(base, adapter)
    edit(adapter, modules_to_save=None)
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="which is no LoRA weight"):
        load_model(base, adapter)
