"""launch/: the SLURM script between stubs of srun, scontrol and accelerate, and the files that launchers read."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

LAUNCH = Path(__file__).parents[2] / "launch"
#: What a stub notes of a call: its words, and the node's number where there is one.
NOTE = """#!{python} -IS
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([{name!r}, os.environ.get("SLURM_NODEID"), sys.argv[1:]]) + "\\n")
"""
HOSTNAMES = 'if sys.argv[1:3] == ["show", "hostnames"]: print("node7\\nnode8")\n'
#: One task a node, one after another; it returns what the last gives, as --kill-on-bad-exit makes it.
SRUN = """
import subprocess
at = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("-"))
for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    status = subprocess.call(sys.argv[at:], env=os.environ | {"SLURM_NODEID": str(node)})
sys.exit(status)
"""
#: Makes a checkpoint, tells that it is there and trains until it is told to end.
TRAINING = """
import pathlib, time
run = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
(run / os.environ["MAKES"]).mkdir(parents=True)
for _ in range(500):
    if (run / "end").exists(): sys.exit(int((run / "end").read_text()))
    time.sleep(0.01)
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts launch/slurm.sh as SLURM would, on so many nodes; `calls` reads what the stubs noted."""
    log, stubs = tmp_path / "calls.jsonl", tmp_path / "bin"
    stubs.mkdir()

    def stub(name, body=""):
        path = stubs / name
        path.write_text(NOTE.format(python=sys.executable, log=str(log), name=name) + body)
        path.chmod(0o755)

    def start(*words, nodes=1, **environment):
        job = {"SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "41"}
        job |= {"SLURM_CPUS_PER_TASK": "64", "PATH": f"{stubs}:{os.environ['PATH']}", **environment}
        return subprocess.Popen(
            ["bash", LAUNCH / "slurm.sh", *map(str, words)],
            env=os.environ | job, cwd=LAUNCH.parent, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def calls(name):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [(node, words) for called, node, words in lines if called == name]

    stub("scontrol", HOSTNAMES)
    stub("srun", SRUN)
    stub("accelerate")
    start.stub, start.calls = stub, calls
    return start


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that in five seconds")


def test_every_word_reaches_accelerate_on_every_node_as_it_was_given(slurm, tmp_path):
    run = tmp_path / "a run's $HOME"
    words = ["--rule", "mlp.*: rank=2", "--data", 'my "text".txt', "--keep", "*", "--note", ""]
    assert slurm(run, "distill", "my teacher", *words, nodes=2).wait() == 0
    common = ["--config_file", "launch/fsdp2_2x8.yaml", "--main_process_ip", "node7", "--main_process_port", "20041"]
    common += ["-m", "signbit", "distill", "my teacher", *words, "-o", str(run)]
    assert slurm.calls("accelerate") == [(str(n), ["launch", "--machine_rank", str(n), *common]) for n in (0, 1)]
    ((_, srun),) = slurm.calls("srun")
    assert srun[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=64"]


def test_a_second_start_goes_on_and_another_engine_may_be_named(slurm, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").touch()
    assert slurm(run, "pretrain", "--seed", "1", CONFIG="launch/zero3_1x8.yaml").wait() == 0
    ((_, words),) = slurm.calls("accelerate")
    assert words[4] == "launch/zero3_1x8.yaml" and words[-6:] == ["pretrain", "--seed", "1", "--resume", "-o", str(run)]


def test_a_run_that_fails_is_a_job_that_fails(slurm, tmp_path):
    slurm.stub("accelerate", "sys.exit(3)\n")
    assert slurm(tmp_path / "run", "distill", "teacher").wait() == 3
    assert not any(words[0] == "requeue" for _, words in slurm.calls("scontrol"))


@pytest.mark.parametrize(("makes", "requeued"), [("checkpoint-8", True), ("data", False)])
def test_the_signal_requeues_a_job_that_got_further(slurm, tmp_path, makes, requeued):
    slurm.stub("accelerate", TRAINING)
    run = tmp_path / "run"
    (run / "checkpoint-4").mkdir(parents=True)
    job = slurm(run, "distill", "teacher", MAKES=makes)
    until((run / makes).exists)
    job.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    assert job.poll() is None  # SLURM ends it, not the script
    (run / "end").write_text("5")
    assert job.wait() == 5
    assert (["requeue", "41"] in [words for _, words in slurm.calls("scontrol")]) == requeued
    assert ("lower --save-every" in job.stderr.read()) != requeued


def test_a_job_that_cannot_be_requeued_trains_on(slurm, tmp_path):
    slurm.stub("accelerate", TRAINING)
    slurm.stub("scontrol", HOSTNAMES + 'if sys.argv[1] == "requeue": sys.exit(1)\n')
    run = tmp_path / "run"
    job = slurm(run, "distill", "teacher", MAKES="checkpoint-1")
    until((run / "checkpoint-1").exists)
    job.send_signal(signal.SIGUSR1)
    until(lambda: ["requeue", "41"] in [words for _, words in slurm.calls("scontrol")])
    (run / "end").write_text("0")
    assert job.wait() == 0 and "submit it again to go on" in job.stderr.read()


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("machines", [1, 2])
def test_accelerate_reads_engine_machines_and_processes(engine, machines):
    config = load_config_from_file(str(LAUNCH / f"{engine}_{machines}x8.yaml"))  # unknown keys are an error
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (machines, 8 * machines, "no")
    assert config.distributed_type == {"fsdp2": "FSDP", "zero3": "DEEPSPEED"}[engine]
    if engine == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    else:
        assert config.deepspeed_config["zero_stage"] == 3
        # Else accelerate starts pdsh on each node, or without a hostfile a world of one process.
        launcher = config.deepspeed_config.get("deepspeed_multinode_launcher")
        assert launcher == {1: None, 2: "standard"}[machines]


def commands(launcher):
    """The words of the page's commands that begin with `launcher`."""
    lines = (LAUNCH / "README.md").read_text().replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.startswith(f"{launcher} ")]
    assert found
    return found


def test_the_hostfile_and_its_commands():
    for line in (LAUNCH / "hostfile").read_text().splitlines():
        assert re.fullmatch(r"\S+\s+slots=8", line)  # as deepspeed.launcher.runner reads it
    for words in commands("deepspeed"):
        own = words[: words.index("signbit")]
        assert own[1:3] == ["--hostfile", "launch/hostfile"] and own[-1] == "--module"
        assert "--no_local_rank" in own  # else the verb is --local_rank=0
    for words in commands("accelerate launch"):
        assert (LAUNCH.parent / words[words.index("--config_file") + 1]).is_file()
        assert words[words.index("signbit") - 1] == "-m"
        assert ("pdsh" in words) == ("--deepspeed_hostfile" in words)


@pytest.mark.slow
def test_deepspeed_reads_the_hostfile_and_its_command():
    runner = pytest.importorskip("deepspeed.launcher.runner")
    for words in commands("deepspeed"):
        args = runner.parse_args(words[1:])
        assert args.module and args.no_local_rank
        assert args.user_script == "signbit" and args.user_args[0] == "distill"
        assert dict(runner.fetch_hostfile(LAUNCH.parent / args.hostfile)) == {"node1": 8, "node2": 8}
