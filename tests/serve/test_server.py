"""The server through OpenAI's own client, over HTTP."""

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import torch

openai = pytest.importorskip("openai", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

MESSAGES = [{"role": "user", "content": "w5"}]


def chat(server, **asked):
    return server.client.chat.completions.create(**{"model": "OUT", "messages": MESSAGES, "max_tokens": 12, **asked})


def text(server, **asked):
    return server.client.completions.create(**{"model": "OUT", "prompt": "w3 w4", "max_tokens": 12, **asked})


def greedy(server, prompt, count):
    """The words that transformers' own generate writes behind the tokens `prompt`."""
    ids = server.model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0, len(prompt) :]
    return server.tokenizer.decode(ids, skip_special_tokens=True).split()


def test_models_lists_the_one_that_is_served(server):
    assert [(model.id, model.object) for model in server.client.models.list()] == [("OUT", "model")]
    assert server.client.models.retrieve("OUT").id == "OUT"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; this server has 'OUT'"):
        server.client.models.retrieve("other")


def test_chat_equals_transformers_generate(server):
    answer = chat(server)
    prompt = server.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert answer.choices[0].message.content.split() == greedy(server, prompt, 12)
    assert (answer.model, answer.choices[0].finish_reason) == ("OUT", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)


def test_a_completion_equals_transformers_generate(server):
    answer = text(server)
    prompt = server.tokenizer("w3 w4")["input_ids"]
    assert answer.choices[0].text.split() == greedy(server, prompt, 12)
    assert answer.choices[0].text.startswith(" "), "it goes on where the prompt ends"
    assert answer.usage.total_tokens == len(prompt) + 12


def test_streams_are_the_same_text_in_pieces(server):
    events = list(chat(server, stream=True))
    pieces = [event.choices[0].delta.content for event in events if event.choices[0].delta.content]
    assert len(pieces) > 5
    assert "".join(pieces) == chat(server).choices[0].message.content
    assert events[-1].choices[0].finish_reason == "length"
    assert events[-1].usage.completion_tokens == 12
    assert "".join(event.choices[0].text for event in text(server, stream=True)) == text(server).choices[0].text


def test_a_stream_ends_with_done(server):
    assert post(server, "/v1/completions", {"prompt": "w3", "max_tokens": 2, "stream": True})[1].endswith(
        "data: [DONE]\n\n"
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ask", [chat, text])
def test_an_answer_ends_before_a_stop_string(server, ask, stream):
    def write(**asked):
        if not stream:
            choice = ask(server, **asked).choices[0]
            return (choice.message.content if ask is chat else choice.text), choice.finish_reason
        events = list(ask(server, stream=True, **asked))
        parts = [e.choices[0].delta.content if ask is chat else e.choices[0].text for e in events]
        return "".join(part or "" for part in parts), events[-1].choices[0].finish_reason

    whole, _ = write()
    # A string over three tokens, that begins and ends inside of one.
    stop = whole[len(whole) // 2 - 3 : len(whole) // 2 + 3]
    assert write(stop=[stop, "not there"]) == (whole[: whole.index(stop)], "stop")
    assert write(stop="not there") == (whole, "length")


def test_stop_strings_token_by_token():
    from signbit.serve.answers import Stops

    stops = Stops(["abc", "bd"])
    assert [stops.feed(piece) for piece in ("xa", "b", "a", "b", "dc")] == ["x", "", "ab", "", "a"]
    assert stops.found
    held = Stops(["abc"])
    assert (held.feed("xab"), held.rest(), held.found) == ("x", "ab", False)


def test_a_temperature_samples_and_a_seed_repeats(server):
    def sample(seed):
        return text(server, temperature=1.5, seed=seed, max_tokens=20).choices[0].text

    with ThreadPoolExecutor(6) as pool:
        first, second, *others = pool.map(sample, (1, 1, 2, 3, 4, 5))
    assert first == second, "requests at the same time do not take each other's random numbers"
    assert len({first, *others}) == 5
    assert text(server, temperature=0).choices[0].text == text(server).choices[0].text


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5])
def test_the_lowest_temperatures_are_greedy(server, temperature):
    assert text(server, temperature=temperature).choices[0].text == text(server).choices[0].text


@pytest.mark.parametrize("bias", [100, 100.0])
def test_a_logit_bias_changes_the_text(server, bias):
    token = server.tokenizer("w7")["input_ids"][-1]
    asked = {"logit_bias": {str(token): bias}, "max_tokens": 3}
    assert chat(server, **asked).choices[0].message.content.split() == ["w7"] * 3
    assert text(server, **asked).choices[0].text.split() == ["w7"] * 3
    first = greedy(server, server.tokenizer("w3 w4")["input_ids"], 1)[0]
    never = {server.tokenizer(first)["input_ids"][-1]: -bias}
    assert text(server, logit_bias=never).choices[0].text.split()[0] != first


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"model": "other"}, openai.NotFoundError, "there is no model 'other' here; this server has 'OUT'"),
        ({"prompt": "w3 " * 2048}, openai.BadRequestError, "the prompt has 2048 tokens, the context 2048; shorten"),
        ({"prompt": ""}, openai.BadRequestError, "prompt: String should have at least 1 character"),
        ({"prompt": " "}, openai.BadRequestError, "the prompt has no token"),
        ({"prompt": ["w3"]}, openai.BadRequestError, "prompt: Input should be a valid string"),
        ({"temperature": 3}, openai.BadRequestError, "temperature: Input should be less than or equal to 2, not 3"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"n": 2}, openai.BadRequestError, "n: Input should be 1, not 2"),
        ({"best_of": 2}, openai.BadRequestError, "best_of"),
        ({"echo": True}, openai.BadRequestError, "echo"),
        ({"logprobs": 5}, openai.BadRequestError, "logprobs"),
        ({"suffix": "w3"}, openai.BadRequestError, "suffix"),
        ({"stop": [""]}, openai.BadRequestError, "stop"),
        ({"seed": -1}, openai.BadRequestError, "seed"),
        ({"presence_penalty": 1}, openai.BadRequestError, "presence_penalty"),
        ({"frequency_penalty": -1}, openai.BadRequestError, "frequency_penalty"),
        ({"logit_bias": {"64": 1}}, openai.BadRequestError, "logit_bias: there is no token 64"),
        ({"logit_bias": {"3": 1e300}}, openai.BadRequestError, "less than or equal to 100"),
        ({"extra_body": {"generation_config": "{}"}}, openai.BadRequestError, "generation_config"),
        ({"extra_body": {"tempreature": 1}}, openai.UnprocessableEntityError, "tempreature"),
    ],
)
def test_completions_that_are_refused(server, asked, error, message):
    with pytest.raises(error, match=message) as refused:
        text(server, **asked)
    assert refused.value.body["type"] == "invalid_request_error"
    (field,) = asked.get("extra_body", asked)
    assert refused.value.body["param"].split(".")[0] == field


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"content": "w3"}]}, r"messages\.0\.role: Field required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "w3 " * 3000}]}, "the prompt has 3000 tokens, the context 2048"),
        ({"n": 3}, "n: Input should be 1"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": False}}}, "tokenize is no variable of a template"),
    ],
)
def test_chats_that_are_refused(server, asked, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        chat(server, **asked)
    assert refused.value.body["param"].split(".")[0] in {**asked, "tokenize": None}


def test_an_over_long_prompt_is_refused_before_anything_is_computed(server, monkeypatch):
    calls = []
    monkeypatch.setattr(server.model, "forward", lambda *_, **__: calls.append(1))
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            text(server, prompt="w3 " * 100_000, stream=stream)
        assert refused.value.code == "context_length_exceeded"
    assert not calls


def test_others_are_answered_while_a_long_prompt_is_counted(server, monkeypatch):
    counting, answered = threading.Event(), threading.Event()
    real = server.tokenizer._tokenizer

    class Slow:
        def encode_batch(self, *args, **kwargs):
            counting.set()
            assert answered.wait(60)
            return real.encode_batch(*args, **kwargs)

    monkeypatch.setattr(server.tokenizer, "_tokenizer", Slow())
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(text, server, prompt="w3 " * 5000)
        assert counting.wait(60)
        assert server.client.models.list().data[0].id == "OUT"
        answered.set()
        with pytest.raises(openai.BadRequestError, match="the prompt has 5000 tokens"):
            refused.result()


def test_an_answer_fills_the_context_and_no_more(server):
    answer = text(server, prompt="w3 " * 2040, max_tokens=100)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (8, "length")


def test_templates_that_refuse_and_models_without_one(server):
    template = server.tokenizer.chat_template
    server.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(openai.BadRequestError, match="chat template refuses this: roles must alternate"):
            chat(server)
        server.tokenizer.chat_template = None
        with pytest.raises(openai.BadRequestError, match="no chat template, so it cannot chat; use /v1/completions"):
            chat(server)
    finally:
        server.tokenizer.chat_template = template


def test_a_failure_in_the_model_is_told_and_survived(server, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError('out of "memory"\nsomewhere')

    with monkeypatch.context() as broken:
        broken.setattr(server.model, "forward", fail)
        with pytest.raises(openai.InternalServerError, match="could not be generated"):
            text(server)
        with pytest.raises(openai.APIError, match='RuntimeError: out of "memory" somewhere'):
            list(chat(server, stream=True))
    assert text(server).choices[0].text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_ends_its_answer(server, monkeypatch, stream):
    gone, ended, lengths = threading.Event(), threading.Event(), []
    generate = server.model.generate

    def watched(*args, streamer, **kwargs):
        put = streamer.put

        def watched_put(value):
            if streamer.total_tokens > 2:
                assert gone.wait(60)
            put(value)

        streamer.put = watched_put
        try:
            return generate(*args, streamer=streamer, **kwargs)
        finally:
            lengths.append(streamer.total_tokens)
            ended.set()

    monkeypatch.setattr(server.model, "generate", watched)
    if stream:
        answer = text(server, max_tokens=2000, stream=True)
        assert next(iter(answer)).choices
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            text(server, max_tokens=2000, timeout=1)
    gone.set()
    assert ended.wait(60)
    assert lengths[0] < 2000
    monkeypatch.undo()
    assert text(server).choices[0].text


def post(server, path, body, content_type="application/json"):
    where = urlsplit(server.url)
    connection = http.client.HTTPConnection(where.hostname, where.port)
    data = body if isinstance(body, bytes) else json.dumps(body)
    connection.request("POST", path, data, {"Content-Type": content_type} if content_type else {})
    response = connection.getresponse()
    return response.status, response.read().decode()


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_body_that_is_no_json_object(server, body):
    status, answer = post(server, "/v1/completions", body)
    assert status == 400
    assert json.loads(answer)["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded"])
def test_json_that_is_not_called_so(server, content_type):
    status, answer = post(server, "/v1/completions", {"prompt": "w3"}, content_type)
    assert status == 400
    assert "with the header Content-Type: application/json" in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        ("completions", {"prompt": "\ud800"}, "prompt"),
        ("completions", {"prompt": "w3", "stop": "\ud800"}, "stop"),
        ("completions", {"prompt": "w3", "model": "\ud800"}, "model"),
        ("completions", {"prompt": "w3", "\ud800": 1}, "\\ud800"),
        ("chat/completions", {"messages": MESSAGES, "user": "\ud800"}, "user"),
        ("chat/completions", {"messages": [{"role": "user", "content": "w3", "name": "\ud800"}]}, "messages"),
    ],
)
def test_a_lone_surrogate_is_refused(server, path, asked, param):
    status, answer = post(server, f"/v1/{path}", asked)
    assert 400 <= status < 500
    assert json.loads(answer)["error"]["param"].startswith(param)


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/audio/transcriptions", "/v1/embeddings", "/load_model", "/reset"]
)
def test_what_else_transformers_serves_is_not_there(server, path):
    status, answer = post(server, path, {"model": "OUT"})
    assert status == 404
    assert "this server has /v1/chat/completions" in json.loads(answer)["error"]["message"]


def test_reasoning_and_tool_calls_end_before_a_stop_string_too(server):
    """A template of the tokenizer divides the answer; the stop string belongs to its content."""
    whole = chat(server).choices[0].message.content
    first, second = whole.split()[:2]
    server.tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "w1",
        "fields": {
            "reasoning_content": {"open": first, "close": second, "content": "text"},
            "content": {"close": "never", "content": "text"},
        },
    }
    try:
        words = whole.split()
        last = next(i for i in range(3, len(words)) if f" {words[i]} " not in " ".join(words[:i]) + " ")
        plain = chat(server).choices[0].message
        stopped = chat(server, stop=f" {words[last]}").choices[0].message
        assert plain.content.split() == words[2:]
        assert stopped.content.split() == words[2:last]
    finally:
        server.tokenizer.response_template = None


def test_a_key(packed_dir, server):
    from fastapi.testclient import TestClient

    from signbit.serve.app import build_app

    app = build_app("OUT", server.model, server.tokenizer, server.answers, api_key="secret")
    client = TestClient(app)
    assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Bearer café"}):
        refused = client.get("/v1/models", headers={k: v.encode() for k, v in headers.items()})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
