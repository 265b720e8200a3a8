"""What tests of whole runs look at."""

import json

import pytest

from signbit.cli import main
from signbit.train import DistillTrainer

#: What a line of metrics says of the machine and not of the run.
TIME = ("tokens_per_s", "used_s")


def metrics(out):
    """The lines of a run's metrics, without its times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME} for line in lines]


class _MadeError(Exception):
    """In the place of the first step."""


def trainer_of(command):
    """The trainer that a command line makes, before its first step."""
    made = []

    def run(self, *given):
        made.append(self)
        raise _MadeError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillTrainer, "run", run)
        with pytest.raises(_MadeError):
            main(command.split())
    return made[0]
