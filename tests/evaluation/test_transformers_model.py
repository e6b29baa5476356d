"""`--backend transformers`: its scores against plain loops over transformers, and against k2mini's own of a LLaMA."""

import json
import shutil

import pytest
import torch

from k2mini.distributed import World
from k2mini.evaluation.score import Request, score
from k2mini.evaluation.transformers_model import TransformersModel
from tests.conftest import ROOT, asset
from tests.evaluation.conftest import results
from tests.evaluation.test_score import naive, random_requests

transformers = pytest.importorskip("transformers")

WORDS = "granite basalt quartz rock mineral is made of the a and that which plates crust mantle volcano erodes"
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SMALL |= {"max_position_embeddings": 128, "vocab_size": 199}
OPT = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96}
KINDS = {
    "gpt2": lambda size=199, length=128: transformers.GPT2Config(
        vocab_size=size, n_positions=length, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
    "opt": lambda size=199, length=128: transformers.OPTConfig(
        vocab_size=size, max_position_embeddings=length, bos_token_id=2, eos_token_id=2, **OPT
    ),
    "mpt": lambda: transformers.MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=199, max_seq_len=128),
    "mistral": lambda: transformers.MistralConfig(num_key_value_heads=2, sliding_window=8, **SMALL),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=199, hidden_size=64, num_hidden_layers=2, max_position_embeddings=128
    ),
    "bert": lambda: transformers.BertConfig(**SMALL),
}


def save(folder, config):
    """A random model of transformers, as it writes one. Returns the model."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """GPT-2 and OPT as on the hub: a tokenizer of vocab.json and merges.txt, and of OPT, BOS before each text."""
    tokenizers, root = pytest.importorskip("tokenizers"), tmp_path_factory.mktemp("byte-level")
    for kind, special in (("gpt2", ["<|endoftext|>"]), ("opt", ["<s>", "<pad>", "</s>", "<unk>"])):
        (root / kind).mkdir()
        made = tokenizers.ByteLevelBPETokenizer()
        made.train_from_iterator([f"{a} {b}." for a in WORDS.split() for b in WORDS.split()], 360, 2, False, special)
        made.save_model(str(root / kind))
        save(root / kind, KINDS[kind](made.get_vocab_size() + 7, 1024))
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    fields = {**names, "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    (root / "opt" / "tokenizer_config.json").write_text(json.dumps(fields))
    return root


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mpt", "mistral", "mamba"])
def test_equals_naive_scores(tmp_path, kind):
    """Prefixes shared and computed once, options of one token and of several; Mamba keeps no keys and values."""
    reference = save(tmp_path, KINDS[kind]())
    requests = [*random_requests(), Request((7,), ((5, 6, 7), (8,)), group=9)]
    model = TransformersModel(tmp_path)
    found = dict(score(model, requests, batch_size=4))
    assert model._caches == (kind != "mamba")
    assert len(found) == len(requests)
    with torch.no_grad():
        for place, request in enumerate(requests):
            assert found[place] == pytest.approx(naive(lambda ids: reference(ids).logits, request), abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_a_part_of_the_questions_runs_in_the_batches_of_all(tmp_path, kind):
    """To the last bit: what ranks find, and what a run that goes on finds, is what one process does."""
    save(tmp_path, KINDS[kind]())
    model, requests = TransformersModel(tmp_path), random_requests()
    whole = dict(score(model, requests, batch_size=4))
    for size in (2, 3):
        parts = [dict(score(model, requests, batch_size=4, world=World(rank, size))) for rank in range(size)]
        assert all(parts)
        assert sum(map(len, parts)) == len(requests)
        assert {place: found for part in parts for place, found in part.items()} == whole
    for place in range(0, len(requests), 3):
        found = dict(score(model, requests, batch_size=4, wanted={place}))
        assert found == {own: whole[own] for own in found}
        assert place in found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_lm_evaluation_harness_gives_the_same(byte_level, tmp_path, monkeypatch, kind):
    """100 questions of ARC and 100 in SciQ's form, by its own tasks."""
    arc, geobench = asset("data", "instructions", "arc_sft.json"), asset("data", "geobench")
    pytest.importorskip("lm_eval")
    monkeypatch.syspath_prepend(ROOT / "tools")
    import check_backends

    model = TransformersModel(byte_level / kind, "float64")
    backend = check_backends.harness_model(byte_level / kind, model.require_tokenizer(), tmp_path, "float64")
    for task, rows in (
        ("arc_easy", check_backends.arc_rows(arc, 100)),
        ("sciq", check_backends.sciq_rows(geobench, 100)),
    ):
        ours = check_backends.scores(model, model.require_tokenizer(), check_backends.questions_of(task, rows))
        theirs = check_backends.harness(backend, task, rows, tmp_path)
        assert len(ours) == 100
        for one, two in zip(ours, theirs, strict=True):
            assert one == pytest.approx(two, rel=0, abs=1e-4)
            assert one.index(max(one)) == two.index(max(two))


def test_a_llamas_scores_and_answers_are_k2minis(tiny_directory, rocks, tmp_path, run, geobench):
    """Letters and texts, with examples; the open task's answers and likelihood."""
    for scoring in ("letter", "text", "pmi"):
        for backend in ("k2mini", "transformers"):
            task = ("--scoring", scoring, "--shots", 2, "--out", tmp_path / f"{backend} {scoring}", "--limit", 3)
            files = ("--benchmark", rocks, geobench["npee"], "--tasks", "rocks", "npee/noun", "--max-new-tokens", 6)
            status, _, err = run("eval", "--model", tiny_directory, "--backend", backend, *files, *task)
            assert status == 0, err
        ours, theirs = (results(tmp_path / f"{backend} {scoring}") for backend in ("k2mini", "transformers"))
        for one, two in zip(ours, theirs, strict=True):
            assert two["logprobs"] == pytest.approx(one["logprobs"], abs=1e-4)
            assert {**two, "logprobs": 0, "sha256": 0} == {**one, "logprobs": 0, "sha256": 0}
        a, b = (tmp_path / f"{backend} {scoring}" for backend in ("k2mini", "transformers"))
        assert (a / "answers_npee_noun.json").read_text() == (b / "answers_npee_noun.json").read_text()
        (a,), (b,) = (json.loads((each / "report.json").read_text())["subjective"] for each in (a, b))
        assert b["likelihood"] == pytest.approx(a["likelihood"], abs=1e-4)


def test_perplexity(tiny_directory, byte_level, tmp_path, run):
    """A LLaMA's is k2mini's, window by window; GPT-2's is exp of the loss that transformers gives."""
    file = tmp_path / "text.txt"
    file.write_text("granite is made of quartz. " * 20)
    windows = ("--perplexity", file, "--window", 64, "--stride", 16, "--json")
    both = [run("eval", "--model", tiny_directory, "--backend", name, *windows) for name in ("k2mini", "transformers")]
    ours, theirs = (json.loads(out)["perplexity"] for _, out, _ in both)
    assert theirs == {**ours, "perplexity": pytest.approx(ours["perplexity"]), "bits_per_byte": theirs["bits_per_byte"]}
    _, out, _ = run("eval", "--model", byte_level / "gpt2", "--backend", "transformers", "--perplexity", file, "--json")
    ids = [0, *transformers.AutoTokenizer.from_pretrained(byte_level / "gpt2")(file.read_text()).input_ids]
    reference = transformers.AutoModelForCausalLM.from_pretrained(byte_level / "gpt2").eval()
    with torch.no_grad():
        loss = reference(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert json.loads(out)["perplexity"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_every_task_with_a_tokenizer_of_two_files(byte_level, geobench, tmp_path, run, kind):
    """The ids are those of transformers; a finished run is not made again, and is not another backend's."""
    folder, out = byte_level / kind, tmp_path / "out"
    tokenizer = TransformersModel(folder).require_tokenizer()
    text = "Granite is made of quartz.\n\nThe answer é: A"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert tokenizer.encode(text, bos=True, eos=False) == theirs
    assert (tokenizer.bos_id, tokenizer.decode(theirs)) == ({"gpt2": None, "opt": 2}[kind], text)
    command = ["eval", "--model", folder, "--backend", "transformers", "--benchmark", *geobench.values(), "--limit", 2]
    command += ["--tasks", "npee/choice", "npee/tf", "ap", "npee/noun", "npee/qa", "npee/discussion", "npee/completion"]
    for scoring in ("letter", "text"):
        status, _, err = run(*command, "--scoring", scoring, "--max-new-tokens", 4, "--out", out / scoring)
        assert status == 0, err
        report = json.loads((out / scoring / "report.json").read_text())
        assert [(row["task"], row["n"]) for row in report["tasks"]] == [("npee/choice", 2), ("npee/tf", 2), ("ap", 2)]
        assert report["versions"]["transformers"] == transformers.__version__
        assert [row["n"] + row["left_out"] for row in report["subjective"]] == [2] * 4
        assert all(len(set(result["logprobs"])) > 1 for result in results(out / scoring))
    before = (out / "text" / "results.jsonl").read_bytes()
    assert run(*command, "--scoring", "text", "--max-new-tokens", 4, "--out", out / "text")[0] == 0
    assert (out / "text" / "results.jsonl").read_bytes() == before


def test_a_run_of_one_backend_is_not_gone_on_with_by_another(tiny_directory, rocks, tmp_path, run):
    command = ("eval", "--model", tiny_directory, "--benchmark", rocks, "--limit", 2, "--out", tmp_path / "out")
    assert run(*command)[0] == 0
    status, _, err = run(*command, "--backend", "transformers")
    assert (status, "holds results" in err, "name another --out" in err) == (2, True, True)


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def with_code(folder):
    """A model whose repository brings its code, which would leave a file."""
    change(folder, model_type="rocky", auto_map={"AutoConfig": "rocky.Config", "AutoModelForCausalLM": "rocky.Model"})
    (folder / "rocky.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


def without_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_infinity(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] = torch.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (with_code, "model_type 'rocky' is none that transformers"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "has an adapter beside its base"),
        (with_code, "the repository's own code, which auto_map names, is never run"),
        (lambda folder: change(folder, model_type="rocky"), "model_type 'rocky' is none"),
        (lambda folder: change(folder, model_type="t5"), "transformers has no causal language model of type t5"),
        (
            lambda folder: (folder / "vocab.json").unlink(),
            "has no tokenizer (tokenizer.json, tokenizer.model, or",
        ),
        (lambda folder: change(folder, vocab_size=50), "the model 50; this tokenizer belongs to another model"),
        (without_a_tensor, "lacks transformer.h.1.mlp.c_fc.weight, which transformers would draw at random"),
        (with_infinity, "the logits are not finite"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: change(folder, n_embd="many"), "transformers can't read it"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x09"), "is truncated or damaged"),
    ],
)
def test_what_can_not_be_scored_is_refused(byte_level, rocks, tmp_path, run, damage, said):
    folder = shutil.copytree(byte_level / "gpt2", tmp_path / "model")
    damage(folder)
    command = ("eval", "--model", folder, "--backend", "transformers", "--benchmark", rocks, "--out", tmp_path / "out")
    status, out, err = run(*command)
    assert (status, out, said in err, "Traceback" in err) == (2, "", True, False), err
    assert not (folder / "ran").exists()


def test_a_model_that_sees_what_comes_after_is_refused(tmp_path):
    save(tmp_path, KINDS["bert"]())
    with pytest.raises(ValueError, match="is not causal: a token's logits depend on those that follow"):
        list(score(TransformersModel(tmp_path), random_requests()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--backend", "transformers", "--adapter", "a"), "--adapter does not go with --backend transformers"),
        (("--backend", "transformers", "--quantize", "int8"), "--quantize does not go with --backend transformers"),
        (("--backend", "transformers", "--url", "http://x/v1"), "--url does not go with --backend transformers"),
        (("--backend", "transformers", "--shard"), "--shard does not go with --backend transformers"),
        (("--url", "http://x/v1"), "--url does not go with --backend k2mini"),
        (("--backend", "api"), "--backend api needs --url, such as http://localhost:8000/v1"),
        (("--backend", "api", "--url", "http://x/v1", "--dtype", "float32"), "--dtype does not go with --backend api"),
    ],
)
def test_options_of_another_backend_are_refused(tiny_directory, rocks, run, options, said):
    status, _, err = run("eval", "--model", tiny_directory, "--benchmark", rocks, *options)
    assert (status, said in err) == (2, True), err


def test_what_other_programs_store_beside_weights_has_a_fingerprint(byte_level, tmp_path):
    """Single numbers and masks, as GPT-2's files of 2019 have them."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(byte_level / "gpt2", tmp_path / "model")
    mask = torch.ones(1, 1, 4, 4).tril().bool()
    extra = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4), "transformer.h.0.attn.bias": mask}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors", {"format": "pt"})
    model = TransformersModel(folder)
    assert model.fingerprint() != TransformersModel(byte_level / "gpt2").fingerprint()
    requests = random_requests()[:4]
    assert dict(score(model, requests)) == dict(score(TransformersModel(byte_level / "gpt2"), requests))
