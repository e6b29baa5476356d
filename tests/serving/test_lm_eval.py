"""lm-evaluation-harness, which scores with `echo` and `logprobs`: the answers of `k2mini eval`, to 1e-4."""

import json
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when the packages are imported

import pytest
import torch

from k2mini.build import load_model
from k2mini.data.prompts import get_template
from k2mini.evaluation.benchmarks import load_geobench
from k2mini.evaluation.evaluate import run_benchmark
from k2mini.evaluation.instances import EvalConfig
from k2mini.nn.layers import log_softmax
from k2mini.weights.model_files import save_model
from tests.conftest import tiny_config, tiny_llama
from tests.serving.conftest import Server

# Its prompts end without white space, which the harness would take for the answer's.
CONFIG = EvalConfig(template=get_template("alpaca_legacy"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory, llama_tokenizer):
    """A tiny random model with LLaMA's own tokenizer."""
    config = tiny_config(vocab_size=llama_tokenizer.vocab_size, max_seq_len=1024, tie_embeddings=True)
    out = tmp_path_factory.mktemp("npee") / "tiny"
    save_model(tiny_llama(config).state_dict(), config, out, tokenizer=llama_tokenizer)
    return out


@pytest.fixture(scope="module")
def server(directory):
    running = Server(directory)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def task(geobench, tmp_path_factory):
    """NPEE's first choice questions, and a task of the harness that asks them as `k2mini eval` does."""
    questions = [question for question in load_geobench(geobench["npee"]) if question.task == "npee/choice"][:12]
    lines = [
        {"context": CONFIG.prompt(one), "options": list(one.labels), "key": one.labels.index(one.answer)}
        for one in questions
    ]
    path = tmp_path_factory.mktemp("task") / "npee.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = {
        "task": "npee",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{key}}",
        "target_delimiter": "",
    }
    return questions, asked


def scored(server, asked, **model):
    """The harness' log-probabilities of each option, with whether it is the likeliest, question by question."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model="tiny", max_length=1024, **model)
    found = evaluate(lm, {"npee": ConfigurableTask(config={**asked})}, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["npee"], key=lambda sample: sample["doc_id"])
    return [[answer[0] for answer in sample["resps"]] for sample in samples]


def test_the_answers_are_those_of_eval(server, directory, task):
    questions, asked = task
    model, tokenizer = load_model(directory)
    _, results = run_benchmark(model, tokenizer, questions, CONFIG, name="tiny")
    settings = {"tokenizer": str(directory), "tokenizer_backend": "huggingface", "add_bos_token": True}
    found = scored(server, asked, batch_size=4, **settings)
    assert len(found) == len(results) == 12
    for answers, result in zip(found, results, strict=True):
        logprobs = [logprob for logprob, _ in answers]
        assert logprobs == pytest.approx(result.logprobs, abs=1e-4)
        assert result.labels[logprobs.index(max(logprobs))] == result.prediction


def test_without_a_tokenizer_it_asks_the_server(server, directory, task):
    """Then no BOS is before the prompt; greedy is what the model would say, and nothing else."""
    questions, asked = task
    model, tokenizer = load_model(directory)
    for answers, question in zip(scored(server, asked), questions, strict=True):
        context = CONFIG.prompt(question)
        for (logprob, greedy), label in zip(answers, question.labels, strict=True):
            ids = tokenizer.encode(context + label, bos=False, eos=False)
            last = log_softmax(model(torch.tensor([ids]))[0, -2])
            assert float(logprob) == pytest.approx(last[ids[-1]].item(), abs=1e-4)
            assert (greedy in (True, "True")) == (last.argmax() == ids[-1])
