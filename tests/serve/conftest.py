"""A packed model that a server of this process serves, and OpenAI's client of it."""

import threading
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import tiny_llama_config

import signbit

CONTEXT = 2048


@pytest.fixture(scope="session")
def packed_dir(tokenizer, tmp_path_factory):
    """A packed directory whose model writes without an end, in a context of 2048 tokens."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    # Not tied: the answer to w3 is not w3 for ever.
    model = LlamaForCausalLM(
        tiny_llama_config(max_position_embeddings=CONTEXT, tie_word_embeddings=False, initializer_range=0.5)
    )
    model.generation_config.eos_token_id = None
    signbit.quantize_(model.eval(), signbit.SignbitConfig())
    return str(signbit.save(model, tmp_path_factory.mktemp("served") / "OUT", tokenizer))


@pytest.fixture(scope="module")
def server(packed_dir):
    """A running server, its client, its model, and the tokens and end of each call of generate."""
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    openai = pytest.importorskip("openai", reason="the extra serve is not installed")
    import uvicorn

    from signbit.hub.load import load_any, load_tokenizer
    from signbit.serve.answers import Answers
    from signbit.serve.app import build_app
    from signbit.serve.server import ServerOptions, bind, url

    model, tokenizer = load_any(packed_dir), load_tokenizer(packed_dir)
    bound = bind(ServerOptions(port=0))
    answers = Answers(CONTEXT)
    # No more than one uvicorn in this process has this loop; signals stay with pytest outside of the main thread.
    running = uvicorn.Server(uvicorn.Config(build_app("OUT", model, tokenizer, answers), log_level="warning"))
    bound.listen(128)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
    thread.start()
    client = openai.OpenAI(base_url=url(bound), api_key="any", max_retries=0, timeout=120)
    yield SimpleNamespace(client=client, url=url(bound), model=model, tokenizer=tokenizer, answers=answers)
    running.should_exit = True
    thread.join(60)
    assert not thread.is_alive()
