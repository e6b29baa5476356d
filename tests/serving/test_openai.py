"""What the server answers, asked by the real `openai` client, against what the library gives for the same tokens."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from k2mini.build import load_model
from k2mini.data.chats import open_template
from k2mini.data.prompts import TEMPLATES, encode_prompt
from k2mini.data.tokenizer import Tokenizer
from k2mini.inference.decoding import Decoding
from k2mini.inference.generate import generate
from k2mini.inference.sampling import Sampling
from k2mini.nn.layers import log_softmax
from k2mini.serving.choices import token_text
from k2mini.weights.model_files import save_model
from tests.conftest import tiny_config, tiny_llama
from tests.helpers import copy_model
from tests.json_tokenizer import write_json_tokenizer
from tests.serving.conftest import Server

openai = pytest.importorskip("openai")

PROMPT = "granite is made of"


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def exact(tmp_path_factory, tiny_tokenizer):
    """The client of a model whose answers are the same to the bit whatever runs beside them: heads of 64."""
    config = tiny_config(head_dim=64, intermediate_dim=128, vocab_size=tiny_tokenizer.vocab_size)
    directory = tmp_path_factory.mktemp("exact") / "tiny"
    save_model(tiny_llama(config).state_dict(), config, directory, tokenizer=tiny_tokenizer)
    running = Server(directory)
    yield running.client
    running.stop()


@pytest.fixture(scope="module")
def models(tiny_directory, adapter_directory):
    """The same models without a server."""
    return {"tiny": load_model(tiny_directory)[0], "rocks": load_model(tiny_directory, adapter_directory)[0]}


def expected(server, model, prompt, number=12, **settings):
    """What `generate` gives, with the settings of `Sampling` and a seed."""
    seed = settings.pop("seed", 0)
    decoding = Decoding(number, Sampling(**settings), seed)
    ids = server.tokenizer.encode(prompt, bos=True, eos=False) if isinstance(prompt, str) else prompt
    stop = [server.tokenizer.eos_id]
    (completion,) = generate(model, [ids], decoding, stop_ids=stop, vocab_size=server.tokenizer.vocab_size)
    stream = server.tokenizer.stream()
    return "".join(map(stream.push, completion.tokens)) + stream.flush()


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "rocks"]
    assert client.models.retrieve("rocks").id == "rocks"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


@pytest.mark.parametrize("model", ["tiny", "rocks"])
def test_a_completion_is_what_generate_gives(server, client, models, model):
    found = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    (choice,) = found.choices
    assert choice.text == expected(server, models[model], PROMPT)
    prompt = len(server.tokenizer.encode(PROMPT, bos=True, eos=False))
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 12, prompt + 12)
    assert (choice.finish_reason, found.model, found.object) == ("length", model, "text_completion")


def test_several_answers_differ_by_their_seed(server, client, models):
    found = client.completions.create(model="tiny", prompt=[PROMPT, "basalt"], max_tokens=8, n=3, seed=5)
    texts = [choice.text for choice in sorted(found.choices, key=lambda choice: choice.index)]
    wanted = [
        expected(server, models["tiny"], prompt, 8, temperature=1.0, seed=5 + number)
        for prompt in (PROMPT, "basalt")
        for number in range(3)
    ]
    assert texts == wanted
    assert len(set(texts)) > 3
    without = [client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8).choices[0].text for _ in range(4)]
    assert len(set(without)) > 1  # each draws anew


def test_the_best_of_several_answers(exact):
    """Those of the highest mean log-probability, each token's and EOS' own, best first; all are paid for."""
    asked = {"model": "tiny", "prompt": [PROMPT, "basalt"], "max_tokens": 8, "seed": 5, "logit_bias": {"2": 4}}
    every = exact.completions.create(**asked, n=6, logprobs=0)
    wanted = []
    for start in (0, 6):
        scores = [choice.logprobs.token_logprobs for choice in every.choices[start : start + 6]]
        order = sorted(range(6), key=lambda place: -sum(scores[place]) / len(scores[place]))
        assert order[:2] != [0, 1]
        wanted += [every.choices[start + place] for place in order[:2]]
    assert {choice.finish_reason for choice in wanted} == {"stop", "length"}
    found = exact.completions.create(**asked, n=2, best_of=6, logprobs=0)
    assert [choice.logprobs for choice in found.choices] == [choice.logprobs for choice in wanted]
    without = exact.completions.create(**asked, n=2, best_of=6)
    for answers in (found, without):
        assert [choice.index for choice in answers.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answers.choices] == [choice.text for choice in wanted]
        assert answers.usage == every.usage
    assert without.choices[0].logprobs is None


def test_sampling_settings_arrive(server, client, models):
    settings = {"temperature": 0.8, "top_p": 0.9}
    more = {"top_k": 20, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, seed=3, **settings, extra_body=more)
    assert found.choices[0].text == expected(server, models["tiny"], PROMPT, seed=3, **settings, **more)
    token = server.tokenizer.encode_more("quartz")[0]
    found = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=3,
        temperature=0,
        logit_bias={str(token): 100},
        extra_body={"return_token_ids": True},
    )
    assert found.choices[0].token_ids == [token] * 3


def test_chat_is_asked_as_in_the_terminal(server, client, models):
    tokenizer, template = server.tokenizer, TEMPLATES["alpaca_short"]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "granite"}]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=9, temperature=0)
    first = encode_prompt(tokenizer, template, "granite", system="Be short.")
    answer = found.choices[0].message
    assert (answer.role, answer.content) == ("assistant", expected(server, models["tiny"], first, 9))
    messages += [{"role": "assistant", "content": "a rock"}, {"role": "user", "content": "basalt"}]
    found = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, temperature=0, extra_body={"return_token_ids": True}
    )
    turns = [*first, *tokenizer.encode_more("a rock"), tokenizer.eos_id, *encode_prompt(tokenizer, template, "basalt")]
    assert found.choices[0].prompt_token_ids == turns
    assert found.choices[0].message.content == expected(server, models["tiny"], turns, 9)
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "gra"}, {"type": "text", "text": "nite"}],
            "input": "rocks",
        }
    ]
    found = client.chat.completions.create(
        model="tiny", messages=parts, max_tokens=2, extra_body={"template": "vigogne", "return_token_ids": True}
    )
    wanted = encode_prompt(tokenizer, TEMPLATES["vigogne"], "granite", "rocks")
    assert found.choices[0].prompt_token_ids == wanted


@pytest.fixture(scope="module")
def own(chat_directory):
    """A server of a model that has a tokenizer.json and a chat template."""
    tokenizer = load_model(chat_directory)[1]
    templates = {name: open_template(name, chat_directory, tokenizer) for name in ("own", "chatml", "alpaca_short")}
    running = Server(chat_directory, templates=templates)
    yield running
    running.stop()


def test_a_chat_in_the_models_own_template(own, chat_directory):
    """Ids are those of transformers' `apply_chat_template`; a turn's answer may be asked about in the next."""
    transformers = pytest.importorskip("transformers")
    published = transformers.AutoTokenizer.from_pretrained(chat_directory)
    messages, model = [{"role": "system", "content": "Be short."}], load_model(chat_directory)[0]
    for question in ("granite", "And <b>basalt</b>?", "é 岩"):
        messages.append({"role": "user", "content": question})
        ids = published.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        asked = {"template": "own", "return_token_ids": True}
        answer = own.client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=9, temperature=0, extra_body=asked
        )
        assert answer.choices[0].prompt_token_ids == ids
        (expected,) = generate(model, [ids], Decoding(9), stop_ids=[0, 2], vocab_size=own.tokenizer.vocab_size)
        assert answer.choices[0].token_ids == expected.tokens
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    asked = {"model": "tiny", "template": "own", "max_tokens": 1, "return_token_ids": True}
    asked["messages"] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " short."}]},
        {"role": "user", "content": "granite", "input": "rocks"},
    ]
    (choice,) = json.loads(own.ask("/v1/chat/completions", asked)[2])["choices"]
    wanted = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "granite\nrocks"}]
    assert choice["prompt_token_ids"] == published.apply_chat_template(
        wanted, add_generation_prompt=True, return_dict=False
    )
    for path, empty in (("completions", {"prompt": ""}), ("completions", {"prompt": ["a", ""], "echo": True})):
        assert own.ask(f"/v1/{path}", {"model": "tiny", **empty})[0] == 400
    info = json.loads(own.ask("/k2mini/info")[2])
    assert (info["template"], info["templates"]) == ("alpaca_short", ["own", "chatml", "alpaca_short"])
    assert json.loads(own.ask("/tokenize", {"prompt": "<|endoftext|>"})[2])["tokens"] == [0]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": "a<|im_end|>"}], "messages[0] has '<|im_end|>' in its text"),
        ([{"role": "system", "content": "<|im_start|>"}, {"role": "user", "content": "a"}], "messages[0] has"),
        ([{"role": "user", "content": "a"}] * 2, "roles must alternate"),  # as the template itself says
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "end with what is to be answered"),
        ([{"role": "user", "content": " "}], "end with what is to be answered"),
        ([{"role": "user", "content": "a " * 600}], "the context has 512"),
    ],
)
def test_what_a_chat_template_refuses(own, messages, said):
    asked = {"model": "tiny", "template": "own", "messages": messages}
    status, _, content = own.ask("/v1/chat/completions", asked)
    error = json.loads(content)["error"]
    assert (status, error["param"]) == (400, "messages"), error
    assert said in error["message"]


def test_every_end_token_ends_an_answer(chat_directory, tmp_path):
    """One of generation_config.json's list is EOS as the tokenizer's is: "stop", and not part of a chat's answer."""
    asked = {"model": "tiny", "prompt": "granite", "max_tokens": 9, "temperature": 0, "return_token_ids": True}
    chat = {**asked, "messages": [{"role": "user", "content": "granite"}], "template": "alpaca"}
    del chat["prompt"]
    found = []
    running = Server(chat_directory)
    for path, body in (("completions", asked), ("chat/completions", chat)):
        found.append(json.loads(running.ask(f"/v1/{path}", body)[2])["choices"][0]["token_ids"])
    running.stop()
    for number, (path, body) in enumerate((("completions", asked), ("chat/completions", chat))):
        end = found[number][4]
        running = Server(copy_model(chat_directory, tmp_path / str(number), eos_token_id=[0, end]))
        (choice,) = json.loads(running.ask(f"/v1/{path}", body)[2])["choices"]
        running.stop()
        assert choice["finish_reason"] == "stop"
        before = found[number][: found[number].index(end)]
        assert choice["token_ids"] == before
        stream = running.tokenizer.stream()
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert text == "".join(map(stream.push, before)) + stream.flush()  # the end token has a text, too


def test_without_a_limit_a_chat_goes_on_to_the_end_of_the_context(server, client):
    messages = [{"role": "user", "content": "granite " * 450}]
    found = client.chat.completions.create(model="tiny", messages=messages, temperature=0, logit_bias={"5": 100})
    assert 10 < found.usage.completion_tokens < 200
    assert (found.choices[0].finish_reason, found.usage.total_tokens) == ("length", server.engine.capacity)


def test_every_slot_has_all_of_the_context_and_answers_as_alone(tiny_tokenizer, tmp_path):
    """The context is not divided among slots, and no answer depends on what runs beside it: widths are a LLaMA's."""
    wide = {"dim": 128, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64, "intermediate_dim": 160}
    config = tiny_config(**wide, vocab_size=tiny_tokenizer.vocab_size, max_seq_len=1024)
    save_model(tiny_llama(config).state_dict(), config, tmp_path / "tiny", tokenizer=tiny_tokenizer)
    server = Server(tmp_path / "tiny")
    rows = [{"prompt": [7 + k] * (990 + k), "max_tokens": 34 - k, "temperature": 0} for k in range(3)]
    rows += [{"prompt": "granite", "max_tokens": 9, "seed": k, "top_p": 0.9} for k in range(3)]
    asked = [{"model": "tiny", "logprobs": 2, "logit_bias": {"2": -100}, **row} for row in rows]

    def answer(body):
        status, _, content = server.ask("/v1/completions", body)
        assert status == 200
        return {name: json.loads(content)[name] for name in ("choices", "usage")}

    alone = [answer(body) for body in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = [*pool.map(answer, asked)]
    assert [found["usage"]["total_tokens"] for found in together[:3]] == [server.engine.capacity] * 3
    assert [found["choices"] for found in together] == [found["choices"] for found in alone]
    server.stop()


@pytest.mark.parametrize("stop", [None, "s", ["nothing", "quick"], ["\n\n\n"]])
def test_a_stream_says_the_same(client, stop):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "seed": 1, "stop": stop, "n": 2, "logprobs": 1}
    whole = client.completions.create(**asked, extra_body={"return_token_ids": True})
    chunks = list(
        client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body={"return_token_ids": True}
        )
    )
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert [token for part in own for token in part.token_ids] == choice.token_ids
        assert [name for part in own for name in part.logprobs.tokens] == choice.logprobs.tokens
        assert [score for part in own for score in part.logprobs.token_logprobs] == choice.logprobs.token_logprobs
        assert [place for part in own for place in part.logprobs.text_offset] == choice.logprobs.text_offset
        assert [part.finish_reason for part in own if part.finish_reason] == [choice.finish_reason]
        assert own[0].prompt_token_ids == choice.prompt_token_ids
        assert not stop or all(text not in choice.text for text in ([stop] if isinstance(stop, str) else stop))


def test_a_stream_has_no_half_of_a_character(server, client):
    """Bytes of a character come one token at a time; nor is a text given out that may be a stop string's beginning."""
    tokenizer = server.tokenizer
    ids = tokenizer.encode_more("é")
    assert len(ids) == 2
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 1, "stream": True}
    chunks = client.completions.create(**asked, logit_bias={str(ids[0]): 100})
    assert "".join(chunk.choices[0].text for chunk in chunks) == "\ufffd"


def test_stop_strings(server, client):
    """One over several tokens ends the answer, and neither its text nor its tokens are given out."""
    text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0).choices[0].text
    stop = text[11:17]
    before = text[: text.index(stop)]
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, stop=stop, logprobs=0)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason) == (before, "stop")
    assert all(place < len(before) for place in choice.logprobs.text_offset)
    assert found.usage.completion_tokens < 40


def test_echo_scores_the_prompt(server, client, models):
    """The first log-probability is null, ids are taken as they are, and greedy is what equals the likeliest."""
    rows = [[5, 20, 40, 41, 77, 300], [9, 300, 310]]
    found = client.completions.create(model="tiny", prompt=rows, max_tokens=1, temperature=0, logprobs=1, echo=True)
    for row, choice in zip(rows, found.choices, strict=True):
        scores = choice.logprobs
        logprobs = log_softmax(models["tiny"](torch.tensor([row]))[0, :, : server.tokenizer.vocab_size])
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(row) + 1
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        for place, token in enumerate(row[1:]):
            assert scores.token_logprobs[place + 1] == pytest.approx(logprobs[place, token].item(), abs=1e-4)
            likeliest = max(scores.top_logprobs[place + 1].values())
            assert likeliest == pytest.approx(logprobs[place].max().item(), abs=1e-4)
            assert (likeliest == scores.token_logprobs[place + 1]) == (logprobs[place].argmax() == token)
        assert scores.token_logprobs[-1] == max(scores.top_logprobs[-1].values())
        assert choice.text.startswith(server.tokenizer.decode(row))
    only = client.completions.create(model="tiny", prompt=rows[0], max_tokens=0, logprobs=1, echo=True).choices[0]
    assert only.logprobs.token_logprobs == found.choices[0].logprobs.token_logprobs[:-1]
    assert only.text == server.tokenizer.decode(rows[0])
    assert only.finish_reason == "length"


def test_offsets_are_where_tokens_begin(server, client):
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30, seed=2, logprobs=0, echo=True)
    text, scores = found.choices[0].text, found.choices[0].logprobs
    assert text.startswith(PROMPT)
    plain = [
        (name, place) for name, place in zip(scores.tokens, scores.text_offset, strict=True) if name[0] not in "b<"
    ]
    assert len(plain) > 10
    for name, place in plain[1:]:
        assert name in text[place : place + len(name) + 3]  # bytes that are no character come with the next token
    streamed = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=30, seed=2, logprobs=0, echo=True, stream=True
    )
    chunks = [chunk.choices[0] for chunk in streamed]
    assert "".join(chunk.text for chunk in chunks) == text
    assert [place for chunk in chunks for place in chunk.logprobs.text_offset] == scores.text_offset


def test_eos_is_a_token_of_a_scored_completion(server, client):
    """lm-evaluation-harness leaves out the last token as the new one; without any it would miss one of the text."""
    tokenizer = server.tokenizer
    asked = {"model": "tiny", "max_tokens": 5, "temperature": 0, "logit_bias": {str(tokenizer.eos_id): 100}}
    found = client.completions.create(**asked, prompt=[5, 20, 40], logprobs=1, echo=True)
    (choice,) = found.choices
    assert len(choice.logprobs.tokens) == 4
    assert choice.logprobs.tokens[-1] == "</s>"
    assert choice.logprobs.token_logprobs[-1] < 0
    assert (choice.text, choice.finish_reason) == (tokenizer.decode([5, 20, 40]), "stop")
    assert found.usage.completion_tokens == 0
    chat = client.chat.completions.create(**asked, messages=[{"role": "user", "content": "granite"}], logprobs=True)
    assert chat.choices[0].logprobs.content == []


def test_chat_logprobs(server, client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "granite"}], "max_tokens": 8, "seed": 1}
    choice = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    assert len(choice.logprobs.content) == 8
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
    text = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode(errors="k2mini.replace")
    assert text == choice.message.content
    chunks = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
    streamed = [token for chunk in chunks for token in chunk.choices[0].logprobs.content]
    assert streamed == choice.logprobs.content


def test_no_two_tokens_are_written_alike(tiny_tokenizer, llama_tokenizer, tmp_path):
    byte_level = Tokenizer(write_json_tokenizer(tmp_path))
    shown = [token_text(byte_level, token) for token in byte_level.encode(" granite\n é", bos=False, eos=True)]
    assert shown == [" granite", "\n", " ", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]
    for tokenizer in (tiny_tokenizer, llama_tokenizer, byte_level):
        names = {token_text(tokenizer, token) for token in range(tokenizer.vocab_size)}
        assert len(names) == tokenizer.vocab_size


def test_text_and_ids(server):
    tokenizer = server.tokenizer

    def post(path, **body):
        return json.loads(server.ask(path, body)[2])

    found = post("/tokenize", prompt=PROMPT)
    assert found["tokens"] == tokenizer.encode(PROMPT, bos=True, eos=False)
    assert post("/tokenize", prompt=PROMPT, add_special_tokens=False)["tokens"] == found["tokens"][1:]
    assert post("/detokenize", tokens=found["tokens"]) == {"prompt": PROMPT}
    assert post("/detokenize", tokens=[]) == {"prompt": ""}
    info = json.loads(server.ask("/tokenizer_info")[2])
    assert post("/tokenize", prompt=info["eos_token"], add_special_tokens=False)["tokens"] == [tokenizer.eos_id]
    assert post("/tokenize", prompt=f"a {info['eos_token']}", add_special_tokens=False)["count"] > 3
    assert post("/detokenize", model="rocks", tokens=[]) == {"prompt": ""}
    for path, body, param in [
        ("/tokenize", {}, "prompt"), ("/detokenize", {"model": "tiny"}, "tokens"), ("/tokenize", {"text": "a"}, "text"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, "model"), ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"), ("/k2mini/why", {"model": "tiny"}, "tokens"),
    ]:  # fmt: skip
        assert post(path, **body)["error"]["param"] == param


def test_why(server, models):
    """The last layer's distribution is the model's own, with the adapter that is named."""
    tokens = server.tokenizer.encode(PROMPT, bos=True, eos=False)
    for name, model in models.items():
        status, _, content = server.ask("/k2mini/why", {"model": name, "tokens": tokens})
        assert status == 200
        layers = json.loads(content)["layers"]
        logprobs = log_softmax(model(torch.tensor([tokens[:-1]]))[0, -1, : server.tokenizer.vocab_size])
        last = layers[-1]
        assert [layer["layer"] for layer in layers] == [0, 1, 2]
        assert last["probability"] == pytest.approx(logprobs[tokens[-1]].exp().item(), rel=1e-3)
        assert last["rank"] == (logprobs > logprobs[tokens[-1]]).sum()
        top = logprobs.topk(5)
        assert [text for text, _ in last["top"]] == [
            token_text(server.tokenizer, token) for token in top.indices.tolist()
        ]
        assert [p for _, p in last["top"]] == pytest.approx(top.values.exp().tolist(), rel=1e-3)
    assert server.ask("/k2mini/why", {"model": "tiny", "tokens": [1]})[0] == 400


def test_info_health_and_metrics(server):
    info = json.loads(server.ask("/k2mini/info")[2])
    assert info["models"] == [{"id": "tiny", "adapter": False}, {"id": "rocks", "adapter": True}]
    assert (info["template"], info["context"]) == ("alpaca_short", server.engine.capacity)
    assert server.ask("/health")[2] == b'{"status": "ok"}'
    server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, seed=1, logit_bias={"2": -100})
    server.wait_until(lambda counts: counts.slots_busy == 0)
    lines = server.ask("/metrics")[2].decode().splitlines()
    values = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}
    assert values["k2mini_slots"] == 3
    assert values["k2mini_slots_busy"] == values["k2mini_waiting"] == 0
    assert values["k2mini_new_tokens_total"] >= 4
    for reused in (0, 256):  # of a prompt, the whole chunks that stand in the cache
        asked = {"model": "tiny", "prompt": [301, *[9] * 299], "max_tokens": 1}
        usage = server.client.completions.create(**asked).usage
        assert usage.prompt_tokens_details.cached_tokens == reused
        assert usage.prompt_tokens == 300
    name = "k2mini_reused_tokens_total"
    assert f"{name} {values[name] + 256:.0f}" in server.ask("/metrics")[2].decode().splitlines()
    for name in ("k2mini_time_to_first_token_seconds", "k2mini_time_per_token_seconds"):  # histograms
        assert f"# TYPE {name} histogram" in lines
        buckets = {key: values[key] for key in values if key.startswith(f"{name}_bucket")}
        assert [*buckets.values()] == sorted(buckets.values())  # each has all that are shorter
        assert values[f'{name}_bucket{{le="+Inf"}}'] == values[f"{name}_count"] > 0
        assert values[f"{name}_sum"] > 0
    with server.slow(0.3):  # a token's time is its own, not a share of the answer's
        server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, seed=1, logit_bias={"2": -100})
    new = server.ask("/metrics")[2].decode()
    for bound, more in [("0.2", 0), ("5", 1)]:
        name = f'k2mini_time_per_token_seconds_bucket{{le="{bound}"}}'
        assert float(re.search(re.escape(name) + r" (\d+)", new)[1]) == values[name] + more


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "granite"}], "max_tokens": 2}
COMPLETION = {"model": "tiny", "prompt": "granite", "max_tokens": 2}
USER = CHAT["messages"][0]


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        *[("chat/completions", {name: value}, name) for name, value in {
            "temperature": 2.5, "top_p": 0, "top_k": -1, "min_p": 1.5, "repetition_penalty": 0, "n": 0, "seed": 1.5,
            "presence_penalty": -3, "frequency_penalty": "1", "no_repeat_ngram_size": 1e9, "stop": [""], "stream": 1,
            "max_tokens": 0, "max_completion_tokens": 4, "top_logprobs": 3, "logprobs": 3, "logit_bias": {"x": 1},
            "stream_options": {"include_usage": True}, "template": "other", "tools": [{"type": "function"}],
            "response_format": {"type": "json_object"}, "store": True, "audio": {}, "echo": True, "prompt": "a",
            "reasoning_effort": "high", "service_tier": "flex", "unheard_of": None, "model": None, "messages": [],
        }.items()],
        *[("chat/completions", {"messages": messages}, "messages") for messages in (
            "granite", [USER, USER], [{"role": "assistant", "content": "a"}], [{**USER, "role": "tool"}], [1],
            [{**USER, "content": None}], [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            [{**USER, "name": "me"}], [{**USER, "content": " "}], [{"role": "system", "content": "a"}],
            [{**USER, "content": "granite " * 4000}], [{**USER, "content": "\n" * 40000}],
        )],
        *[("completions", {name: value}, name) for name, value in {
            "suffix": "end", "best_of": 65, "logprobs": 21, "echo": "yes", "messages": [], "max_tokens": 5000,
            "prompt": [], "temperature": 0.001, "logit_bias": {"1": 101}, "n": 65, "stop": ["x"] * 17,
        }.items()],
        *[("completions", {"prompt": prompt}, "prompt") for prompt in (
            None, 3, [[]], [3, -1], [3, True], [3, 10**9], [[3], "a", None], ["a"] * 65, [5] * 1024, {"text": "a"},
        )],
        ("completions", {"logit_bias": {"399999": 1}}, "logit_bias"),
        ("completions", {"best_of": 2, "n": 3}, "best_of"),
        ("completions", {"best_of": 2, "stream": True}, "best_of"),
        ("completions", {"best_of": 33, "prompt": ["a", "b"]}, "best_of"),
        ("completions", {"n": 33, "prompt": ["a", "b"]}, "n"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_its_name(server, path, changes, param):
    status, _, content = server.ask(f"/v1/{path}", {**(CHAT if path[:2] == "ch" else COMPLETION), **changes})
    error = json.loads(content)["error"]
    assert (status, error["param"]) == (400, param), error
    assert param in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_changes_nothing_is_taken(client):
    idle = {"user": "me", "metadata": {"a": "b"}, "store": False, "response_format": {"type": "text"}, "tools": []}
    null = dict.fromkeys(("stop", "top_p", "seed", "n", "logit_bias", "tool_choice", "audio", "modalities", "template"))
    found = client.chat.completions.create(**CHAT, extra_body={**idle, **null})
    assert found.usage.completion_tokens <= 2
    assert client.completions.create(**COMPLETION, n=2, best_of=2).choices[1].index == 1


def test_typed_errors(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{**COMPLETION, "max_tokens": 1024})
    assert (error.value.param, error.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(**{**COMPLETION, "model": "gpt"})
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="unheard_of"):
        client.completions.create(**COMPLETION, extra_body={"unheard_of": 1})


def test_an_engine_error_is_openais(server, client, monkeypatch):
    """500 with a sentence; in a stream, the client raises as well."""
    with torch.no_grad():
        head = server.model.head_weight
        saved = head[7, 3].clone()
        head[7, 3] = math.nan
    try:
        with pytest.raises(openai.InternalServerError, match="not finite"):
            client.completions.create(**COMPLETION)
        with pytest.raises(openai.APIError, match="not finite"):
            list(client.completions.create(**COMPLETION, stream=True))
    finally:
        with torch.no_grad():
            head[7, 3] = saved
    assert client.completions.create(**COMPLETION).choices[0].text
