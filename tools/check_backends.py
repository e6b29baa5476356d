"""`k2mini eval` beside other programs on the same questions: answers the same, and how far log-probabilities differ.

    python tools/check_backends.py --model DIR --arc arc_sft.json --geobench FOLDER [--questions 100]
    python tools/check_backends.py … --llama-python PYTHON [--llama-questions 50]   instead of these, llama.cpp

ARC's questions are those of K2's instruction data; questions of the AP study, with a text of NPEE before each, stand in
SciQ's form. lm-evaluation-harness asks them by its own tasks, arc_easy and sciq, over local files. `--backend
transformers` and k2mini's own model get the same text. PYTHON is that of an environment with
`llama-cpp-python[server]`, which `--backend api` asks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when the packages are imported

import torch

from k2mini.build import load_model
from k2mini.data.prompts import get_template
from k2mini.data.tokenizer import Tokenizer
from k2mini.evaluation.api_model import ApiModel
from k2mini.evaluation.benchmarks import Question, load_geobench, load_subjective
from k2mini.evaluation.endpoint import Endpoint
from k2mini.evaluation.evaluate import evaluate
from k2mini.evaluation.instances import EvalConfig
from k2mini.evaluation.transformers_model import TransformersModel
from k2mini.weights.convert import convert

CONFIG = EvalConfig("text", get_template("none"), answer_prefix="\nAnswer:", normalize="none")
Scores = list[list[float]]


def arc_rows(path: Path, number: int) -> list[dict[str, Any]]:
    """ARC's records in the fields of AI2's own files."""
    rows = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        found, key = re.findall(r"^([A-Z1-9])\. (.*)$", record["input"], re.MULTILINE), record["output"].strip()
        labels, texts = [label for label, _ in found], [text.strip() for _, text in found]
        stem = record["instruction"].strip().removesuffix("Choose from:").strip()
        if key in labels and all(texts):
            rows.append({"question": stem, "choices": {"label": labels, "text": texts}, "answerKey": key})
    return rows[:number]


def sciq_rows(folder: Path, number: int) -> list[dict[str, Any]]:
    """Questions with four options or more of the AP study, in SciQ's fields."""
    supports = load_subjective(folder / "geobench_npee.json", "noun") or []
    rows = []
    for place, question in enumerate(load_geobench(folder / "geobench_apstudy.json")):
        texts = dict(zip(question.labels, question.texts, strict=True))
        right = texts.pop(question.answer, "").strip()
        others = [text.strip() for text in texts.values() if text.strip()][:3]
        if right and len(others) == 3:
            names = {f"distractor{number + 1}": text for number, text in enumerate(others)}
            support = " ".join(supports[place % len(supports)][1].split()[:25])
            rows.append({"support": support, "question": question.stem.strip(), **names, "correct_answer": right})
    return rows[:number]


def questions_of(task: str, rows: Sequence[dict[str, Any]]) -> list[Question]:
    """The same questions for k2mini, worded as the harness's task has them."""
    questions = []
    for place, row in enumerate(rows):
        stem = f"Question: {row['question']}"
        if task == "sciq":
            stem = f"{row['support'].lstrip()}\n{stem}"
            texts, answer = [row[f"distractor{n}"] for n in (1, 2, 3)] + [row["correct_answer"]], "D"
        else:
            texts, labels = row["choices"]["text"], row["choices"]["label"]
            answer = chr(ord("A") + labels.index(row["answerKey"]))
        letters = tuple(chr(ord("A") + n) for n in range(len(texts)))
        # The space before an option is the option's, as in the harness.
        questions.append(Question(task, place, stem, letters, tuple(f" {text}" for text in texts), answer))
    return questions


def harness(backend: Any, task: str, rows: Sequence[dict[str, Any]], folder: Path) -> Scores:
    """lm-evaluation-harness's log-probabilities, by its own task of that name over these rows."""
    import lm_eval
    import yaml
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as run

    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path,) = Path(lm_eval.__file__).parent.glob(f"tasks/*/{task}.yaml")
    own = yaml.safe_load(path.read_text())
    own |= {"dataset_path": "json", "dataset_name": None, "should_decontaminate": False, "tag": None}
    own["dataset_kwargs"] = {"data_files": {"test": str(folder / f"{task}.jsonl")}}
    for split in ("training_split", "validation_split"):
        own.pop(split, None)
    found = run(backend, {task: ConfigurableTask(config=own)}, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]


def harness_model(model: Path, tokenizer: Tokenizer, folder: Path, dtype: str) -> Any:
    """The harness's model, whose tokenizer gives the ids of ours."""
    from lm_eval.models.huggingface import HFLM

    (folder / "hf").mkdir()
    for file in model.iterdir():
        (folder / "hf" / file.name).symlink_to(file.absolute())
    if not (config := folder / "hf" / "tokenizer_config.json").exists():
        config.write_text(json.dumps(tokenizer.hf_config()))
    how = {"add_bos_token": tokenizer.bos_id is not None, "batch_size": 8, "dtype": dtype, "device": "cpu"}
    return HFLM(str(folder / "hf"), **how)


@contextmanager
def llama_server(python: Path, model: Path, folder: Path) -> Iterator[str]:
    """llama-cpp-python's server over the model as GGUF, and keys and values, in float32; its address."""
    convert(model, "gguf", file := folder / "model.gguf", dtype=torch.float32)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = f"--n_ctx 1024 --logits_all true --interrupt_requests false --type_k 0 --type_v 0 --port {port}"  # 0: float32
    command = [python, "-m", "llama_cpp.server", "--model", file, "--model_alias", "model", *how.split()]
    command += ["--host", "127.0.0.1", "--n_threads", torch.get_num_threads()]
    with (folder / "llama.log").open("w") as log:
        server = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)
        try:
            url, end = f"http://127.0.0.1:{port}/v1", time.monotonic() + 120
            while time.monotonic() < end:
                with suppress(OSError):
                    urllib.request.urlopen(f"{url}/models", timeout=5)
                    break
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            server.wait()


def say(label: str, questions: Sequence[Question], ours: Scores, theirs: Scores) -> None:
    """One line: on how many questions the likeliest option is the same, and the largest difference."""
    pairs = list(zip(ours, theirs, strict=True))
    same = sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs)
    worst = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
    right = sum(q.labels[a.index(max(a))] == q.answer for q, a in zip(questions, ours, strict=True))
    print(
        f"{label:58} {same} of {len(pairs)} answers the same, {right} right; log-probabilities differ by {worst:.1e} "
        "nats at most",
        flush=True,
    )


def scores(model: Any, tokenizer: Any, questions: Sequence[Question]) -> Scores:
    """Each option's log-probability by k2mini's scorer."""
    return [[float(x or 0) for x in result.logprobs] for result in evaluate(model, tokenizer, questions, CONFIG)]


def main() -> None:
    """Compare all that is installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--arc", type=Path, required=True)
    parser.add_argument("--geobench", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--llama-questions", type=int, default=50)
    parser.add_argument("--dtype", default="float32", help="float64 leaves no rounding (llama.cpp: float32 alone)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    assert tokenizer is not None
    number = options.questions
    rows = {"arc_easy": arc_rows(options.arc, number), "sciq": sciq_rows(options.geobench, number)}
    questions = {task: questions_of(task, own) for task, own in rows.items()}
    if options.llama_python:
        questions = {"arc_easy": questions["arc_easy"][: options.llama_questions]}
    ours = {task: scores(model, tokenizer, own) for task, own in questions.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.llama_python:
            with llama_server(options.llama_python, options.model, folder) as url:
                peer = ApiModel(Endpoint(url, "model"))
                found = scores(peer, peer.require_tokenizer(), questions["arc_easy"])
            label = "arc_easy: k2mini, --backend api of llama-cpp-python"
            say(label, questions["arc_easy"], ours["arc_easy"], found)
            return
        backend = harness_model(options.model, tokenizer, folder, options.dtype)
        other = TransformersModel(options.model, options.dtype)
        for task, own in questions.items():
            found = scores(other, other.require_tokenizer(), own)
            say(f"{task}: k2mini, --backend transformers", own, ours[task], found)
            found = harness(backend, task, rows[task], folder)
            say(f"{task}: k2mini, lm-evaluation-harness", own, ours[task], found)


if __name__ == "__main__":
    main()
