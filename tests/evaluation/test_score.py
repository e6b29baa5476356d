"""The scorer against a naive one: a full forward an option, no cache, no batch, nothing shared."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from k2mini.build import load_model
from k2mini.data.chats import encode_conversation, open_template
from k2mini.data.prompts import get_template, shared_prefix
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import World
from k2mini.evaluation.benchmarks import Question, load_geobench
from k2mini.evaluation.evaluate import evaluate
from k2mini.evaluation.instances import EvalConfig, PromptBuilder
from k2mini.evaluation.score import Request, score, split_jointly, tokens_to_run
from k2mini.evaluation.subjective import _prepare
from k2mini.weights.model_directory import ModelDirectory
from tests.conftest import ROOT, asset, tiny_config, tiny_llama
from tests.helpers import HostWaits


def test_white_space_that_ends_a_context_belongs_to_the_option(llama_tokenizer):
    context, options = split_jointly(llama_tokenizer, "The answer is: ", ["A", "B"])
    assert context == llama_tokenizer.encode("The answer is:", bos=True, eos=False)
    assert options == [[319], [350]]
    context, options = split_jointly(llama_tokenizer, "### Response:\n", ["A", "B"])
    assert context == llama_tokenizer.encode("### Response:\n", bos=True, eos=False)
    assert options == [[29909], [29933]]


def test_joint_tokenisation_with_a_tokenizer_json(smollm2_json, geobench):
    """GeoBench's questions, with letters and with texts: as one text, and nothing but the answer behind the context."""
    tokenizer = Tokenizer(smollm2_json / "tokenizer.json")
    questions = load_geobench(geobench["npee"]) + load_geobench(geobench["ap"])
    for config in (EvalConfig("letter"), EvalConfig("text", answer_prefix="The answer is: ")):
        for task in ("npee/choice", "npee/tf", "ap"):
            builder = PromptBuilder([q for q in questions if q.task == task], config, tokenizer, 10**9)
            for question in builder_questions(questions, task)[:200]:
                instance = builder.build(question)
                for place, ids in zip(instance.places, instance.ids, strict=True):
                    text = config.prompt(question) + config.options(question)[place]
                    assert [*instance.request.prefix, *ids] == tokenizer.encode(text, bos=True, eos=False)
                    assert tokenizer.decode(ids).strip() in config.options(question)[place]
    with pytest.raises(ValueError, match="scoring 'k2' reads LLaMA's ids of the letters"):
        PromptBuilder(questions[:1], EvalConfig("k2"), tokenizer, 10**9)


def test_nothing_is_left_of_a_context_without_bos(smollm2_json):
    """EOS stands before the option then, as in lm-evaluation-harness; templates with special tokens are so encoded."""
    tokenizer = Tokenizer(smollm2_json / "tokenizer.json")
    for context in ("", "t"):
        prefix, (ids,) = split_jointly(tokenizer, context, ["he"])
        assert [2, *tokenizer.encode(context + "he", bos=False, eos=False)] == prefix + ids
    context = "<|im_start|>user\nA rock?<|im_end|>\n<|im_start|>assistant\n"
    prefix, options = split_jointly(tokenizer, context, ["A", "B"], bos=False, special=True)
    assert prefix.count(1) == 2
    assert tokenizer.decode(prefix) == "user\nA rock?\nassistant\n"
    assert [tokenizer.decode(ids) for ids in options] == ["A", "B"]
    assert 1 not in split_jointly(tokenizer, context, ["A", "B"])[0]


EVAL_CONFIGS = [
    EvalConfig("letter"),
    EvalConfig("text"),
    EvalConfig("letter", answer_prefix="The answer is: "),
    EvalConfig("text", answer_prefix="The answer is:\n"),
    EvalConfig("letter", get_template("k2")),
    EvalConfig("letter", get_template("k2_wa"), num_fewshot=2),
    EvalConfig("text", get_template("alpaca_short"), num_fewshot=1, score_end=True),
    EvalConfig("letter", get_template("none"), answer_prefix="Answer:"),
]


@pytest.mark.parametrize(
    "config", EVAL_CONFIGS, ids=lambda a: f"{a.scoring}-{a.template}-{a.num_fewshot}-{a.answer_prefix!r}"
)
def test_what_is_scored_is_the_joint_tokenisation(llama_tokenizer, geobench, config):
    """Every question of both files, every way to ask."""
    questions = load_geobench(geobench["npee"]) + load_geobench(geobench["ap"])
    for task in ("npee/choice", "npee/tf", "ap"):
        builder = PromptBuilder([q for q in questions if q.task == task], config, llama_tokenizer, 10**9)
        for question in builder_questions(questions, task):
            instance = builder.build(question)
            if instance.request is None:
                continue
            context = "".join(shot + "\n\n\n" for shot in builder._examples(question)) + config.prompt(question)
            for place, ids in zip(instance.places, instance.ids, strict=True):
                end = config.scoring == "text" and not question.is_true_false and config.score_end
                text = context + config.options(question)[place]
                assert list(instance.request.prefix) + ids == llama_tokenizer.encode(text, bos=True, eos=end)
                assert ids


def builder_questions(questions, task):
    return [question for question in questions if question.task == task]


def naive(model, request):
    """Sums of log-probabilities, an option at a time."""
    sums = []
    for option in request.options:
        tokens = torch.tensor([[*request.prefix, *option]])
        logprobs = model(tokens)[0].log_softmax(-1)
        start = len(request.prefix)
        sums.append(sum(logprobs[start + i - 1, token].item() for i, token in enumerate(option)))
    return sums


def random_requests():
    generator = torch.Generator().manual_seed(0)

    def ids(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(3, 190, (size,), generator=generator).tolist())

    common = ids(40, 41)
    return [
        Request((*common, *ids(1, 30)), tuple(ids(1, 6 if i % 3 else 2) for _ in range(2 + i % 4)), group=i % 2)
        for i in range(23)
    ]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_size", [1, 8, 32])
def test_equals_naive_scores(shape, batch_size, share):
    model, requests = tiny_llama(shape), random_requests()
    found = dict(score(model, requests, batch_size=batch_size, share=share))
    with torch.inference_mode():
        for place, request in enumerate(requests):
            assert found[place] == pytest.approx(naive(model, request), abs=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_progress_counts_the_tokens_that_run(monkeypatch, share):
    """One request at a time little is padded: the model sees these tokens, and each group's shared prefix once."""
    model, requests = tiny_llama(), random_requests()
    ran = 0
    forward = type(model.model).forward

    def counting(self, tokens, positions=None, cache=None):
        nonlocal ran
        ran += tokens.numel() if positions is None else int((positions >= 0).sum())
        return forward(self, tokens, positions, cache)

    monkeypatch.setattr(type(model.model), "forward", counting)
    assert sorted(place for place, _ in score(model, requests, batch_size=1, share=share)) == list(range(23))
    groups = [[r.prefix for r in requests if r.group == group] for group in (0, 1)]
    shared = sum(shared_prefix(prefixes) for prefixes in groups) if share else 0
    assert sum(tokens_to_run(requests, share=share)) == ran - shared
    assert min(tokens_to_run(requests, share=share)) > 0


def test_a_batch_is_read_once():
    model, requests = tiny_llama(), random_requests()
    with HostWaits() as waits:
        found = list(score(model, requests, batch_size=64, share=False))
    assert len(found) == len(requests) > 20
    assert waits.found == ["tolist"] * 2  # one batch of each group


@pytest.mark.parametrize("share", [True, False])
def test_ranks_and_what_is_wanted_leave_batches_as_they_are(share):
    """Each batch is scored by one rank, to the last bit as one process does; what has a score already may be left out.

    The ranks get about as many tokens as each other.
    """
    model, requests = tiny_llama(), random_requests()
    whole = list(score(model, requests, batch_size=3, share=share))
    parts = [list(score(model, requests, batch_size=3, share=share, world=World(rank, 3))) for rank in range(3)]
    assert sorted(found for part in parts for found in part) == sorted(whole)
    tokens = tokens_to_run(requests, share=share)
    loads = [sum(tokens[place] for place, _ in part) for part in parts]
    assert max(loads) < 1.5 * min(loads)
    wanted = {whole[4][0], whole[-1][0]}
    some = list(score(model, requests, batch_size=3, share=share, wanted=wanted))
    assert [found for found in some if found[0] in wanted] == [found for found in whole if found[0] in wanted]
    assert len(some) <= 6


def test_predictions_do_not_depend_on_batches_or_sharing(tiny_directory):
    model, tokenizer = load_model(tiny_directory)
    words = ["granite", "basalt", "quartz", "crust", "mantle", "plates", "volcano"]
    questions = [
        Question("rocks", i, f"{a} is made of the", ("A", "B", "C"), (b, f"{b} {a}", "a rock"), "A")
        for i, (a, b) in enumerate((a, b) for a in words for b in words)
    ]
    for config in (
        EvalConfig("letter", get_template("alpaca_short")),
        EvalConfig("text", get_template("k2"), num_fewshot=2),
        EvalConfig("text", score_end=True),
    ):
        results = [
            evaluate(model, tokenizer, questions, replace(config, batch_size=size), share=share)
            for size in (1, 8, 32)
            for share in (True, False)
        ]
        for other in results[1:]:
            assert [r.prediction for r in other] == [r.prediction for r in results[0]]
            for one, two in zip(other, results[0], strict=True):
                assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


@pytest.mark.parametrize("scoring", ["letter", "text"])
@pytest.mark.parametrize(("shots", "prefix"), [(0, ""), (2, "The answer is: ")])
def test_a_chat_templates_scores_are_a_naive_references(chat_directory, scoring, shots, prefix):
    """One user's turn holds the examples and the question; text and ids are transformers', the sums one forward's."""
    transformers = pytest.importorskip("transformers")
    published = transformers.AutoTokenizer.from_pretrained(chat_directory)
    model, tokenizer = load_model(chat_directory)
    template, questions = open_template(None, chat_directory, tokenizer), rocks()
    config = EvalConfig(scoring, template, prefix, normalize="none", num_fewshot=shots)
    builder = PromptBuilder(questions, config, tokenizer, 512)

    def asked(question):
        listed = "\n".join(f"{label}. {text}" for label, text in zip(question.labels, question.texts, strict=True))
        return question.stem if scoring == "text" else f"{question.stem}\nChoose from:\n{listed}"

    def ids(text):
        return published(text, add_special_tokens=False)["input_ids"]

    for question, result in zip(questions, evaluate(model, tokenizer, questions, config), strict=True):
        drawn = [q for q in builder._pool if q.identity != question.identity][:shots]
        answers = [q.texts["AB".index(q.answer)] if scoring == "text" else q.answer for q in drawn]
        before = [f"{asked(q)}\n{prefix}{a}\n\n\n" for q, a in zip(drawn, answers, strict=True)]
        message = {"role": "user", "content": "".join(before) + asked(question)}
        context = published.apply_chat_template([message], add_generation_prompt=True, tokenize=False) + prefix
        joint = [ids(context + option) for option in (question.texts if scoring == "text" else question.labels)]
        pairs = [list(zip(ids(context), row, strict=False)) for row in joint]
        shared = min(next((i for i, (a, b) in enumerate(pair) if a != b), len(pair)) for pair in pairs)
        for row, logprob in zip(joint, result.logprobs, strict=True):
            with torch.inference_mode():
                logprobs = model(torch.tensor([row]))[0].log_softmax(-1)
            naive = sum(logprobs[place - 1, row[place]].item() for place in range(shared, len(row)))
            assert logprob == pytest.approx(naive, abs=1e-4)


@pytest.mark.parametrize("name", ["vicuna", "llama2", "mistral", "own"])
def test_a_chat_templates_answers_are_scored_as_they_are_trained(chat_directory, name):
    """With the space that some write before an answer, and the token that ends it, which need not be EOS."""
    folder = chat_directory if name == "own" else ROOT / "k2mini" / "demo" / "base"
    tokenizer = ModelDirectory(folder).require_tokenizer()
    template, question = open_template(name, folder, tokenizer), rocks()[0]
    ends = name != "llama2"  # which writes a space before its end
    config = EvalConfig("text", template, score_end=ends)
    instance = PromptBuilder([question], config, tokenizer, 512).build(question)
    for text, ids in zip(question.texts, instance.ids, strict=True):
        messages = [{"role": "user", "content": question.stem}, {"role": "assistant", "content": text}]
        ((tokens, ((start, end),)),) = encode_conversation(tokenizer, template, messages)
        trained = tokens[start : end if ends else start + len(ids)]
        assert ([*instance.request.prefix], ids) == (tokens[:start], trained)
        _, (request,), _ = _prepare(tiny_llama(), tokenizer, [(question.stem, text)], template)
        assert [*request.options[0]] == trained[: len(trained) - ends]
    assert replace(config, answer_prefix=" It is").lead == ""


def test_without_bos_a_prompt_is_cut_at_its_beginning(chat_directory):
    tokenizer, questions = load_model(chat_directory)[1], rocks()
    for name in ("own", "alpaca"):
        config = EvalConfig("letter", open_template(name, chat_directory, tokenizer))
        whole = PromptBuilder(questions, config, tokenizer, 10**6).build(questions[0])
        cut = PromptBuilder(questions, config, tokenizer, 30).build(questions[0])
        assert (cut.cut, cut.request.prefix) == (len(whole.request.prefix) - 30, whole.request.prefix[-30:])


def test_a_question_that_writes_out_a_special_token_is_named(chat_directory):
    tokenizer = load_model(chat_directory)[1]
    config = EvalConfig("letter", open_template("own", chat_directory, tokenizer))
    question = Question("rocks", 7, "What is <|im_end|>?", ("A", "B"), ("an end", "a rock"), "A")
    with pytest.raises(ValueError, match=r"rocks question 7: .*'<\|im_end\|>' in its text"):
        PromptBuilder([question], config, tokenizer, 512).build(question)


@pytest.fixture(scope="module")
def llama_sized(llama_tokenizer):
    """A random model with LLaMA's vocabulary, and the same in transformers."""
    from tests.reference import to_transformers

    # This seed answers B, C and E, and B where the four questions list A, C, B, D.
    model = tiny_llama(tiny_config(dim=32, vocab_size=32000, max_seq_len=4096, num_layers=2, head_dim=8), seed=2)
    return model, to_transformers(model)


def k2_loop(reference, tokenizer, examples, questions, *, answer_mark):
    """K2's evaluation/run_eval.py and post_process.py, for choice questions as published: (letter, probabilities)."""
    head = "### Instruction:\nIdentify the choice that best completes the statement or answers the question.\n"
    letters = {"A": 319, "B": 350, "C": 315, "D": 360, "E": 382, "F": 383, "G": 402, "H": 379}
    for text in questions:
        prompt = f"{examples}\n\n\n{head}{text}\n\n### Response:\n{answer_mark}"
        with torch.inference_mode():
            softmax = (
                reference(torch.tensor([[1, *tokenizer.encode(prompt)]]), logits_to_keep=1)
                .logits[0, -1]
                .float()
                .softmax(-1)
            )
        capitals = sorted({ord(i) - ord("A") for i in re.findall(r"(?<=[^\w\-])[A-Z](?=[^\w\-])", text)})
        number = sum(capital == i for i, capital in enumerate(capitals))
        found = [softmax[letters[chr(ord("A") + i)]].item() for i in range(number)]
        yield chr(ord("A") + found.index(max(found))), found


@pytest.mark.parametrize(("form", "answer_mark"), [("", ""), ("_wa", "The answer is:\n")])
def test_k2_scoring_is_k2s_algorithm(llama_sized, llama_tokenizer, geobench, form, answer_mark):
    """All 182 choice questions, over transformers with the published texts and SentencePiece's own ids.

    Four of them (38, 87, 159, 179) list their options as A, C, B, D: K2 answers with the letter, wherever it stands.
    """
    import sentencepiece

    model, reference = llama_sized
    file = asset("data", "geobench", f"multiple_choice_samples{form}.txt")
    questions = [q for q in load_geobench(geobench["npee"]) if q.task == "npee/choice"]
    config = EvalConfig("k2", get_template(f"k2{form}"), fewshot_file=str(file))
    results = evaluate(model, llama_tokenizer, questions, config)
    published = json.loads(geobench["npee"].read_text())["choice"]["question"]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(llama_tokenizer.path))
    theirs = k2_loop(reference, tokenizer, file.read_text().rstrip("\n"), published, answer_mark=answer_mark)
    moved = []
    for question, result, (letter, found) in zip(questions, results, theirs, strict=True):
        assert (result.prediction, question.index) == (letter, question.index)
        for number, probability in enumerate(found):
            place = question.labels.index(chr(ord("A") + number))
            assert result.logprobs[place] == pytest.approx(math.log(probability), abs=1e-4)
            assert result.token_ids[place] == [(319, 350, 315, 360, 382, 383, 402, 379)[number]]
            moved += [question.index] * (place != number)
    assert {38, 87, 159, 179} <= set(moved)
    assert {"B", "C"} & {results[index].prediction for index in moved}, "this model can't tell letter from place"


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_a_label_is_the_option_that_bears_it_wherever_it_stands(tiny_directory, scoring):
    """Options in another order, with their labels or with labels in order anew: each score stays with its option."""
    model, tokenizer = load_model(tiny_directory)
    texts = {"A": "granite quartz", "B": "crust", "C": "a volcano erodes slowly", "D": "basalt"}
    order = ("C", "A", "D", "B")
    shuffled = Question("rocks", 0, "Which is a rock?", order, tuple(texts[label] for label in order), "B")
    config = EvalConfig(scoring, get_template("alpaca_short"), normalize="none")
    (result,) = evaluate(model, tokenizer, [shuffled], config)
    prompt = config.prompt(shuffled)
    options = [texts[label] if scoring == "text" else label for label in order]
    prefix, ids = split_jointly(tokenizer, prompt, options)
    with torch.inference_mode():
        expected = naive(model, Request(tuple(prefix), tuple(map(tuple, ids))))
    assert result.logprobs == pytest.approx(expected, abs=1e-4)
    assert result.token_ids == ids
    assert result.prediction == order[expected.index(max(expected))]
    assert result.prediction != "ABCD"[expected.index(max(expected))], "this model can't tell letter from place"


def test_k2_scoring_wants_llamas_tokenizer(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"reads LLaMA's ids of the letters, which .* does not have"):
        PromptBuilder([], EvalConfig("k2", get_template("k2")), tiny_tokenizer, 100)


def rocks(number=6, length=1):
    return [
        Question("rocks", i, "granite " * length + str(i), ("A", "B"), (f"quartz {i}", "crust"), "AB"[i % 2])
        for i in range(number)
    ]


def test_examples_are_dropped_first_and_then_the_question_is_cut(tiny_tokenizer):
    questions = rocks(length=30)
    full = PromptBuilder(questions, EvalConfig(num_fewshot=3), tiny_tokenizer, 10**6).build(questions[0])
    length = len(full.request.prefix)
    assert (full.dropped, full.cut) == (0, 0)
    fewer = PromptBuilder(questions, EvalConfig(num_fewshot=3), tiny_tokenizer, length - 1).build(questions[0])
    assert (fewer.dropped, fewer.cut) == (1, 0)
    alone = PromptBuilder(questions, EvalConfig(), tiny_tokenizer, 10**6).build(questions[0])
    size = len(alone.request.prefix) - 5
    cut = PromptBuilder(questions, EvalConfig(num_fewshot=3), tiny_tokenizer, size).build(questions[0])
    assert cut.dropped == 3
    assert cut.cut > 0
    # The last token of an option is scored and never read, so it takes no place.
    assert len(cut.request.prefix) + max(map(len, cut.request.options)) - 1 == size
    assert cut.request.prefix[0] == tiny_tokenizer.bos_id
    assert cut.request.prefix[1:] == alone.request.prefix[len(alone.request.prefix) - len(cut.request.prefix) + 1 :]


def test_examples_are_never_the_question_or_a_copy_of_it(tiny_tokenizer):
    questions = [*rocks(5), *[Question("rocks", 5 + i, *q[2:]) for i, q in enumerate(map(fields, rocks(5)))]]
    builder = PromptBuilder(questions, EvalConfig(num_fewshot=4), tiny_tokenizer, 10**6)
    for question in questions:
        examples = builder._examples(question)
        assert len(set(examples)) == 4
        assert all(question.stem not in example.split("\n") for example in examples)
    with pytest.raises(ValueError, match=r"--shots 5: rocks has 5 distinct questions to draw from"):
        PromptBuilder(questions, EvalConfig(num_fewshot=5), tiny_tokenizer, 100)


def fields(question):
    return (question.task, question.index, question.stem, question.labels, question.texts, question.answer)


def test_what_can_not_be_scored_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="an option is empty"):
        split_jointly(tiny_tokenizer, "granite", ["a", ""])
    model = tiny_llama(tiny_config(max_seq_len=16))
    with pytest.raises(ValueError, match="tokens more than the model's 16"):
        list(score(model, [Request(tuple(range(3, 30)), ((5,), (6,)))]))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scoring": "best"}, "scoring must be one of letter, text, k2"),
        ({"normalize": "word"}, "normalize must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"num_fewshot": -1}, "must be 0 or more"),
        ({"num_fewshot": 2, "fewshot_file": "x"}, "can't be given together"),
        ({"fewshot_file": "/nowhere"}, "there is no file of examples"),
    ],
)
def test_ways_to_ask_that_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        EvalConfig(**values)
