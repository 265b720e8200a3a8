"""Tasks and perplexity by two processes, as each launcher starts them: the numbers are those of one process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tests.evaluate.test_tasks import STORY, evaluated, many_requests

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
#: On a CPU `--cpu` starts but one process (more need mpirun); --multi_gpu is what two GPUs turn on by themselves.
ACCELERATE = ["accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]


@pytest.fixture
def command(stories, tmp_path, request):
    # A GPU takes so many texts at once that 90 documents are one process's.
    many_requests(tmp_path / "r.jsonl", documents=3000 if request.node.get_closest_marker("gpu") else 90)
    (tmp_path / "story.txt").write_text(f"{STORY}. " * 40)
    tasks = ["eval", stories, "--requests", str(tmp_path / "r.jsonl")]
    return [*tasks, "--ppl", str(tmp_path / "story.txt"), "--window", "64"]


def launched(launcher, command, file, cache):
    """What two processes found, and what they printed."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "signbit", *command, "--json", str(file)],
        env={**os.environ, "SIGNBIT_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(file.read_text()), done.stdout


def check(launcher, command, tmp_path, monkeypatch, capsys):
    two, printed = launched(launcher, command, tmp_path / "two.json", tmp_path / "two")
    assert printed.count("of which") == 1
    assert len(list((tmp_path / "two" / "answers").glob("*.jsonl"))) == 2, "each process keeps its own answers"
    monkeypatch.setenv("SIGNBIT_CACHE", str(tmp_path / "one"))
    one, _ = evaluated(command, tmp_path / "one.json", capsys)
    assert 0.1 < one["tasks"][0]["results"][0]["values"]["acc"] < 0.9, "some answers are right"
    assert (two["tasks"][0]["processes"], one["tasks"][0]["processes"]) == (2, 1)
    assert two["tasks"][0]["results"] == one["tasks"][0]["results"]
    assert two["results"][0]["nll"] == one["results"][0]["nll"]
    assert two["results"][0]["windows"] == one["results"][0]["windows"] > 4
    return one


@pytest.mark.slow
def test_torchrun_gives_the_numbers_of_one_process(command, tmp_path, monkeypatch, capsys):
    one = check(TORCHRUN, command, tmp_path, monkeypatch, capsys)
    again, _ = launched(TORCHRUN, command, tmp_path / "again.json", tmp_path / "two")
    kept = again["results"][0]
    assert kept["kept"] and kept["nll"] == one["results"][0]["nll"], "both processes take what the first has"


@pytest.mark.slow
def test_accelerate_launch_gives_the_numbers_of_one_process(command, tmp_path, monkeypatch, capsys):
    check(ACCELERATE, command, tmp_path, monkeypatch, capsys)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_two_gpus_give_the_numbers_of_one(command, tmp_path, monkeypatch, capsys):
    check(ACCELERATE, [*command, "--device", "cuda"], tmp_path, monkeypatch, capsys)
