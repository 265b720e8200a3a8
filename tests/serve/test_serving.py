"""`signbit serve` as a process, and docs/guides/server.md by running all of it."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from signbit.cli import main
from signbit.errors import OptionError
from signbit.extras import install

openai = pytest.importorskip("openai", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guides" / "server.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", GUIDE, re.S)


class Process:
    """`signbit serve` with some arguments; its first line and its URL."""

    def __init__(self, arguments, log, **variables):
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
        command = [sys.executable, "-m", "signbit", "serve", *arguments]
        with log.open("w") as errors:
            # As at a terminal: background jobs of a shell, which these tests may be, ignore Ctrl-C, and so do their children.
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        self.first_line = self.process.stdout.readline()
        assert self.first_line, log.read_text()
        self.url = self.first_line.split()[0]
        self.port = int(self.url.rpartition(":")[2].removesuffix("/v1"))

    def end(self, sig=signal.SIGTERM):
        """Its exit status and what it wrote to the standard error."""
        self.process.send_signal(sig)
        self.process.stdout.read()
        status = self.process.wait(60)
        self.process.stdout.close()
        return status, self.log.read_text()


@pytest.fixture
def start(tmp_path):
    """Starts processes, which end with the test."""
    started = []

    def start(*arguments, **variables):
        started.append(Process(arguments, tmp_path / f"{len(started)}.log", **variables))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.end()


def ask(url, max_tokens=12, **asked):
    """The text that a client of its own gets, streamed or not."""
    own = openai.DefaultHttpxClient(verify=False)  # certificates take longer to read than the answer
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60, http_client=own) as client:
        answer = client.completions.create(**{"model": "OUT", "prompt": "w3", "max_tokens": max_tokens, **asked})
        return "".join(e.choices[0].text for e in answer) if asked.get("stream") else answer.choices[0].text


def test_one_process_survives_all_and_ends_on_sigterm_in_the_midst_of_answers(start, packed_dir):
    server = start(packed_dir, "--port", "0", "--threads", "1")
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60)
    wanted = {length: ask(server.url, length) for length in (1, 2, 4, 12)}
    assert ask(server.url, stream=True) == wanted[12]
    stop = wanted[12][-6:-2]
    for stream in (False, True):
        assert ask(server.url, stop=stop, stream=stream) == wanted[12].partition(stop)[0]
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        ask(server.url, model="other")
    with pytest.raises(openai.BadRequestError, match="the prompt has 3000 tokens, the context 2048"):
        ask(server.url, prompt="w3 " * 3000)
    for _ in range(3):
        stream = client.completions.create(model="OUT", prompt="w3", max_tokens=2000, stream=True)
        assert next(iter(stream)).choices[0].text
        stream.close()
    with ThreadPoolExecutor(50) as pool:
        lengths = [(1, 2, 4)[number % 3] for number in range(50)]
        answers = pool.map(lambda n: ask(server.url, lengths[n], stream=n % 2 == 0), range(50))
        assert list(answers) == [wanted[length] for length in lengths]

    stream = client.completions.create(model="OUT", prompt="w3", max_tokens=2000, stream=True)
    assert next(iter(stream)).choices[0].text
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.completions.create, model="OUT", prompt="w3", max_tokens=2000)
        client.models.list()  # as soon as this is answered, that waits behind the stream
        status, errors = server.end()
        with pytest.raises(openai.APIError, match="the server is closing"):
            list(stream)
        with pytest.raises(openai.APIError):
            waiting.result()
    assert status == 0
    assert "Traceback" not in errors
    socket.create_server(("127.0.0.1", server.port)).close()


@pytest.mark.slow
def test_all_of_the_guide(start, packed_dir, tmp_path):
    server, printed, ran = None, "", []

    def here(text):
        text = (
            text.replace("--port 8000", "--port 0").replace("NAME", "name").replace("FOLDER", str(tmp_path / "folder"))
        )
        text = re.sub(r"(serve|push) OUT", rf"\1 {packed_dir}", text)
        return text if server is None else text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")

    for language, block in BLOCKS:
        ran.append(language)
        words = shlex.split(here(block)) if language == "bash" else []
        if language == "":
            assert block == "pip install '.[serve]'\n"  # tests/docs holds all pages to what can be installed
        elif "serve" in words:
            assert server is None or server.end()[0] == 0
            variables, arguments = words[: words.index("signbit")], words[words.index("serve") + 1 :]
            server = start(*arguments, **dict(word.split("=", 1) for word in variables))
        elif "push" in words:
            assert main(words[1:]) == 0
            assert (tmp_path / "folder" / "model.safetensors").exists()
        elif language == "bash":
            if shutil.which("curl") is None:
                pytest.skip("curl is not installed")
            printed = run(["bash", "-ec", here(block)])
            assert printed.count('"object":') == 4 or printed.count('"error":') == 1
        elif language == "python":
            # The guide's second example prints the name that the guide gives the model.
            assert run([sys.executable, "-c", here(block)]).strip() == "assistant" or "assistant" not in block
        elif language == "text":
            assert re.sub(r"kernels \w+", "kernels", server.first_line) == re.sub(
                r"kernels \w+", "kernels", here(block)
            )
        else:
            assert (language, printed.strip()) == ("json", block.strip())
    assert [ran.count(language) for language in ("bash", "python", "text", "json")] == [5, 2, 1, 1]


def run(command):
    """What a command prints; it must end well and print something."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return done.stdout


@pytest.mark.slow
def test_ctrl_c_says_interrupted(start, packed_dir):
    server = start(packed_dir, "--port", "0", "--max-context", "64", "--activations", "int8")
    assert "int8 activations" in server.first_line
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="the prompt has 64 tokens, the context 64"):
        client.completions.create(model="OUT", prompt="w3 " * 64)
    status, errors = server.end(signal.SIGINT)
    assert status == 130
    assert "signbit: interrupted" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--port 65536", "--port is 65536"),
        ("--host 192.0.2.1", "192.0.2.1:8000 cannot be listened on"),
        ("--port 0 --max-context 4096", "--max-context is 4096; the model's context has 2048 tokens"),
        ("--port 0 --max-context 1", "--max-context is 1; at least 2"),
        ("--port 0 --max-new-tokens 0", "--max-new-tokens is 0"),
        ("--port 0 --threads 0", "--threads is 0"),
        ("--port 0 --api-key ''", "--api-key and --name may not be empty"),
    ],
)
def test_options_that_cannot_be(packed_dir, capsys, arguments, message):
    try:
        status = main(["serve", packed_dir, *shlex.split(arguments)])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_port_that_is_taken(packed_dir, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", packed_dir, "--port", str(port)]) == 1
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in capsys.readouterr().err


def test_without_the_extra(packed_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", packed_dir]) == 1
    assert install("serve") in capsys.readouterr().err


def test_a_slow_tokenizer_is_refused(packed_dir):
    from types import SimpleNamespace

    from signbit.serve.server import ServerOptions, serve

    with pytest.raises(OptionError, match="needs a fast tokenizer"):
        serve(None, SimpleNamespace(is_fast=False), "OUT", ServerOptions(), None, print)
