"""The laws' cases replayed by a C++ program: under AddressSanitizer and UBSan here, and for NEON under qemu-user.

The program for this processor also has the kernels for AVX-512 and for matrix units, with their instructions in plain C++.
"""

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from tests.laws import record

from signbit.ops import native

pytestmark = pytest.mark.slow
CSRC = Path(__file__).resolve().parents[2] / "csrc"
CROSS, QEMU, SYSROOT = "aarch64-linux-gnu-g++", "qemu-aarch64-static", "/usr/aarch64-linux-gnu"
EMULATE = "-DSIGNBIT_EMULATE=ON"
EMULATED = {"emulated-avxvnni", "emulated-avx512", "emulated-amx"}


def need(*programs):
    """Skips where a program is not installed; in CI, which installs them all, that is a failure."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        (pytest.fail if "SIGNBIT_CI" in os.environ else pytest.skip)(f"not installed: {', '.join(missing)}")


def build(folder, *options):
    """The replay program, built in `folder` with these options of CMake."""
    need("cmake", "ninja")
    configure = ["cmake", "-G", "Ninja", "-S", CSRC, "-B", folder, "-DSIGNBIT_REPLAY=ON", *options]
    for command in ([*configure, "-DCMAKE_BUILD_TYPE=RelWithDebInfo"], ["ninja", "-C", folder, "signbit_replay"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "signbit_replay"


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The file of all cases."""
    path = tmp_path_factory.mktemp("cases") / "cases"
    assert record.write(path) > 500
    return path


@pytest.fixture(scope="module")
def replay(tmp_path_factory):
    """The program for this processor, sanitized."""
    library = native.library()
    if isinstance(library, str):
        pytest.skip(f"no CPU kernels: {library}")
    need("c++")
    return build(tmp_path_factory.mktemp("sanitized"), "-DSIGNBIT_SANITIZE=ON", EMULATE)


class LastCase:
    """Where the operands of the last case of a file lie: it is the last head of `record.write`."""

    def __init__(self, path):
        self.bytes = bytearray(path.read_bytes())
        rows, columns, tokens = 40, 300, record.TOKENS[-1]
        assert f"head {rows}x{columns} int8 {tokens} tokens torch.float16\0".encode() in self.bytes
        self.slack = self.blob(len(self.bytes), rows * tokens * 4)
        self.want = self.blob(self.slack - 8, rows * tokens * 4)
        self.x = self.blob(self.want - 8, columns * tokens * 2)

    def blob(self, end, size):
        assert struct.unpack_from("<q", self.bytes, end - size - 8) == (size,)
        return end - size


def test_every_instruction_set_passes_under_sanitizers(replay, recorded):
    done = run(replay, recorded, "2")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    cases, runs, wrong, names = re.search(r"(\d+) cases, (\d+) runs, (\d+) wrong; (.*)", done.stdout).groups()
    expected = EMULATED | set(native.library().runs)
    assert set(names.split()) == expected
    assert int(cases) > 500 and int(runs) == int(cases) * len(expected) and wrong == "0"


def test_a_value_beyond_the_slack_is_reported(replay, recorded, tmp_path):
    last = LastCase(recorded)
    (want,), (slack,) = (struct.unpack_from("<f", last.bytes, place) for place in (last.want, last.slack))
    struct.pack_into("<f", last.bytes, last.want, want + 3 * slack)
    (tmp_path / "changed").write_bytes(last.bytes)
    done = run(replay, tmp_path / "changed")
    runs = len(EMULATED | set(native.library().runs))
    assert done.returncode == 1 and f" {runs} wrong;" in done.stdout
    assert done.stdout.count("wrong: head 40x300 int8 29 tokens torch.float16 on ") == runs
    assert done.stdout.count("error 0, 1 of 1160 values") == runs


def test_a_read_beyond_an_operand_is_seen(replay, recorded, tmp_path):
    last = LastCase(recorded)
    size = last.want - 8 - last.x
    short = last.bytes[: last.x - 8] + struct.pack("<q", size - 2)
    short += last.bytes[last.x : last.x + size - 2] + last.bytes[last.want - 8 :]
    (tmp_path / "short").write_bytes(short)
    done = run(replay, tmp_path / "short")
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_a_file_that_is_none_or_ends_early_is_refused(replay, recorded, tmp_path):
    content = recorded.read_bytes()
    for name, made, message in (
        ("truncated", content[:-1], "the file of cases ends too early"),
        ("other", b"signbit0" + content[8:], "is no file of cases"),
    ):
        (tmp_path / name).write_bytes(made)
        done = run(replay, tmp_path / name)
        assert done.returncode == 2 and message in done.stderr
    done = run(replay, tmp_path / "absent")
    assert done.returncode == 2 and "no such file of cases" in done.stderr


def test_neon_under_qemu(recorded, tmp_path):
    need(CROSS, QEMU)  # AddressSanitizer does not run under qemu-user; UBSan does
    program = build(
        tmp_path / "build",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={CROSS}",
        "-DCMAKE_CXX_FLAGS=-fsanitize=undefined -fno-sanitize-recover=all",
    )
    # The second is an ARMv8.0 without dot products, as in a Raspberry Pi 4.
    for cpu, sets in (("max", "neon portable"), ("cortex-a72", "portable")):
        done = run(QEMU, "-cpu", cpu, "-L", SYSROOT, program, recorded, "2")
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        assert f" 0 wrong; {sets}\n" in done.stdout
