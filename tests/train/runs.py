"""What tests of whole runs look at."""

import json

#: What a line of metrics says of the machine and not of the run.
TIME = ("tokens_per_s", "used_s")


def metrics(out):
    """The lines of a run's metrics, without its times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME} for line in lines]
