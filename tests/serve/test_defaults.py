"""What an answer is like where a request does not say: the model's generation_config.json, and the server's options."""

import shutil

import pytest
import torch
from tests.serve.conftest import CONTEXT
from tests.serve.test_serving import start  # noqa: F401 (a fixture)

import signbit
from signbit.hub.load import load_any, load_tokenizer

openai = pytest.importorskip("openai", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")


@pytest.fixture
def serve(packed_dir, tmp_path):
    """A function that serves a packed directory with another generation config, and asks it through OpenAI's client."""

    def served(config, max_new_tokens=None):
        from fastapi.testclient import TestClient
        from transformers import GenerationConfig

        from signbit.serve.answers import Answers
        from signbit.serve.app import build_app

        folder = shutil.copytree(packed_dir, tmp_path / "copy", dirs_exist_ok=True)
        GenerationConfig(bos_token_id=1, **config).save_pretrained(folder)
        app = build_app("OUT", load_any(str(folder)), load_tokenizer(str(folder)), Answers(CONTEXT), max_new_tokens)
        client = openai.OpenAI(
            base_url="http://testserver/v1", api_key="any", http_client=TestClient(app), max_retries=0
        )

        def ask(**asked):
            """The text and the number of tokens of a completion."""
            answer = client.completions.create(model="OUT", prompt="w3 w4", **asked)
            return answer.choices[0].text, answer.usage.completion_tokens

        ask.client = client
        return ask

    return served


def test_the_length(serve, monkeypatch):
    monkeypatch.setattr("signbit.serve.app._MAX_NEW_TOKENS", 9)
    assert serve({})()[1] == 9
    ask = serve({"max_new_tokens": 7})
    assert ask()[1] == 7
    talk = ask.client.chat.completions.create(model="OUT", messages=[{"role": "user", "content": "w3"}])
    assert (talk.usage.completion_tokens, talk.choices[0].finish_reason) == (7, "length")
    assert ask(max_tokens=3)[1] == 3
    assert ask(max_tokens=11)[1] == 11
    assert serve({"max_new_tokens": 7}, max_new_tokens=5)()[1] == 5, "--max-new-tokens stands above the model's own"


def test_the_temperature(serve):
    greedy = serve({"max_new_tokens": 12})()[0]

    def seeds(ask, **asked):
        return {ask(seed=seed, **asked)[0] for seed in range(4)}

    warm = serve({"max_new_tokens": 12, "do_sample": True, "temperature": 1.5})
    assert len(seeds(warm)) == 4
    assert seeds(warm, temperature=0) == {greedy}
    cold = serve({"max_new_tokens": 12, "do_sample": True, "temperature": 1e-4})
    assert seeds(cold) == {greedy}, "sampled at a temperature at which the likeliest token is all but certain"
    assert len(seeds(cold, temperature=1.5)) == 4
    assert seeds(serve({"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "top_k": 1})) == {greedy}


@pytest.fixture
def adapter(packed_dir, tmp_path):
    """An adapter that changes what its model says, and the model with it."""
    pytest.importorskip("peft", reason="the extra lora is not installed")
    model = load_any(packed_dir)
    model.add_adapter(signbit.lora_config(model, r=2, init_lora_weights="gaussian"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), model.eval()


@pytest.mark.slow
def test_an_adapter_is_served_beside_its_model(adapter, packed_dir, start):  # noqa: F811
    folder, model = adapter
    server = start(folder, "--port", "0", "--name", "tuned", "--max-new-tokens", "6")
    assert "model tuned" in server.first_line
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)
    answer = client.completions.create(model="tuned", prompt="w3 w4")
    tokenizer = load_tokenizer(packed_dir)
    prompt = torch.tensor([tokenizer("w3 w4")["input_ids"]])

    def words(which):
        ids = which.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
        return tokenizer.decode(ids, skip_special_tokens=True).split()

    assert answer.choices[0].text.split() == words(model)
    model.disable_adapters()
    assert answer.choices[0].text.split() != words(model), "the adapter changes nothing, so that it could be missing"
    assert answer.usage.completion_tokens == 6
    assert server.end()[0] == 0
