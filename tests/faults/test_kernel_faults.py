"""Bugs seeded in the C++ kernels: the replayed cases of the laws must catch each."""

import json
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from signbit.ops import native
from tests.laws import record
from tests.ops.test_replay import CSRC, build, need, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(isinstance(native.library(), str), reason=f"no CPU kernels: {native.library()}"),
]
# Name: file, what stands there, what stands there instead.
FAULTS = {
    "last rows unwritten": (
        "api.cpp", "last = total * (i + 1) / job.tasks;", "last = total * (i + 1) / job.tasks - (i + 1 == job.tasks);",
    ),
    "one wrong bit": ("isa_portable.cpp", "-(bits >> k & 1)", "-(bits >> (k == 5 ? 6 : k) & 1)"),
    "scale off by 1 %": (
        "kernels.inl", "return splat(load(w.scale, plane * w.groups + group, w.float_type));",
        "return splat(load(w.scale, plane * w.groups + group, w.float_type) * 1.01f);",
    ),
    "group of another scale": ("kernels.inl", "const vf scale = scale_of(plane, block + r, group);",
                               "const vf scale = scale_of(plane, block + r, 0);"),
    "shift forgotten": ("kernels.inl", "if (w.shift != nullptr) add_shift();", ""),
    "input shift forgotten": ("kernels.inl", "vload<vf>(y + cell(block, t)) + shifted[t]", "vload<vf>(y + cell(block, t))"),
    "code cut at a byte": ("kernels.inl", "if (in_byte + w.salient_bits > 8)", "if (in_byte > 8)"),
    "a group's scale of all rows": ("kernels.inl", "splat(load(w.scale, plane * w.groups + group,",
                                    "splat(load(w.scale, plane * w.groups,"),
    "salient values under one plane of two": ("kernels.inl", "w.in_scale_planes == 1 ? w.planes : plane + 1", "plane + 1"),
    "eps of the input's norm": ("kernels.inl", " / static_cast<float>(columns) + call.norm_in_eps", " / columns"),
    "eps of the outputs' norm": ("api.cpp", " + call.norm_out_eps", ""),
    "127 times an activation beyond floats": ("kernels.inl", "low = clamped(vload<vf>(u + k) * 127.0f / a)",
                                              "low = vload<vf>(u + k) * 127.0f / a"),
    "second plane's input scale": ("kernels.inl", "const int64_t row = plane * w.columns;", "const int64_t row = 0;"),
    "mean of the input's norm": ("kernels.inl", "for (k = 0; k < columns; k++) to[k] -= mean;", ""),
    "head without its last columns": ("kernels.inl", "for (int64_t k = most; k < columns; k++) whole",
                                      "for (int64_t k = most; k < columns - 1; k++) whole"),
    "avx2: the table's upper half never": ("isa_avx2.inl", "_mm256_loadu_ps(table + 8), index), high)",
                                           "_mm256_loadu_ps(table + 8), index), _mm256_setzero_ps())"),
    "avx2: a plane shifted too far": ("isa_avx2.cpp", "128 >> p", "128 >> (p == 6 ? 7 : p)"),
    "avx2: Σq once": ("isa_avx2.inl", "twice = _mm256_slli_epi32(acc[t].sums(), 1)", "twice = acc[t].sums()"),
    "avx2: head without the codes' sign": ("isa_avx2.inl", "_mm256_sign_epi8(load256(q + t * q_stride + k), c)",
                                           "load256(q + t * q_stride + k)"),
    "avxvnni: another bit": ("isa_avxvnni.cpp", "_mm256_srli_epi32(bits, p)", "_mm256_srli_epi32(bits, p ^ 1)"),
    "avx512: every other lookup": ("isa_avx512.inl", "index[r] = _mm512_srli_epi32(index[r], 4);",
                                   "index[r] = _mm512_srli_epi32(index[r], i % 2 ? 4 : 0);"),
    "avx512: planes not shifted": ("isa_avx512.inl", "_mm512_srai_epi32(acc[r][t][s], s)", "acc[r][t][s]"),
    "avx512: head's codes not back at zero": ("isa_avx512.inl", "plain[t] = _mm512_dpbusd_epi32(plain[t], high, some);", ""),
    "group: four bits of a byte alone": ("isa_avx512.inl", "p < 4 ? low : high", "low"),
    "group: a sum beyond 16 bits": ("isa_avx512.inl", "acc[s], _mm512_set1_epi32(8 >> s)",
                                    "_mm512_slli_epi32(acc[s], 1), _mm512_set1_epi32(4 >> s)"),
    "group: Σq of the next": ("kernels.inl", "(from, codes, begin[g])", "(from, codes, begin[g + 1 < groups ? g + 1 : g])"),
    "group: a scale for the next": ("kernels.inl", "scale_of(plane, block, first_group + g);",
                                    "scale_of(plane, block, first_group);"),
    "lookup: sums counted twice": ("isa_avx512.inl", "low[r] = i == 0 || i == 8 ?", "low[r] = i == 0 ?"),
    "lookup: columns across two words": ("isa_avx512.inl", "_mm512_shrdv_epi32(first[b], second[b],",
                                         "_mm512_srlv_epi32(first[b],"),
    "lookup: a group's scale for the next": ("kernels.inl", "vf *scale = scales[group - first_group];",
                                               "vf *scale = scales[0];"),
    "matrix: a group's scale for the next": ("kernels.inl", "scale = scales[group][r];", "scale = scales[0][r];"),
    "matrix: two groups as one": ("kernels.inl", "end = least(steps, ((word * 32 / width + group + 1)",
                                  "end = least(steps, ((word * 32 / width + group + 2)"),
    "matrix: products of the group before": ("kernels.inl", "products = group_products + group % 2 * A * R * 256",
                                             "products = group_products + (group + 1) % 2 * A * R * 256"),
    "matrix: second block by the first's codes": ("kernels.inl", "multiply<3, 5, 7>", "multiply<3, 4, 7>"),
    "matrix: only the last panel's sums": ("kernels.inl", "if (fresh) Products", "if (true) Products"),
    "matrix: codes of the plane before": ("kernels.inl", "if (w.in_scale_planes > 1) take_plane(plane);",
                                          "if (w.in_scale_planes > 1) take_plane(0);"),
}  # fmt: skip


# What a fault's name begins with: the instruction set that has such a way; all others are in each.
SETS = {
    "avx2": "avx2", "avxvnni": "emulated-avxvnni", "avx512": "emulated-avx512", "group": "emulated-avx512",
    "lookup": "emulated-avx512", "matrix": "emulated-amx",
}  # fmt: skip
# The file that such a set's kernels are compiled from.
UNITS = {"emulated-avxvnni": "isa_emulated_avxvnni.cpp", "avx2": "isa_avx2.cpp", "portable": "isa_portable.cpp"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("cases") / "cases"
    record.write(path)
    return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The kernels as they are, built; a fault replaces one object."""
    need("c++", "cmake", "ninja")
    options = (
        "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1",
        "-DSIGNBIT_EMULATE=INSTEAD",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
    )
    return build(tmp_path_factory.mktemp("honest"), *options).parent


def compiled(name, source, honest, folder):
    """The replay program with the file `name` of `source` instead of that of csrc/."""
    object_of, changed = {}, folder / "changed.o"
    for entry in json.loads((honest / "compile_commands.json").read_text()):
        command = shlex.split(entry["command"])
        object_of[Path(entry["file"]).name] = honest / command[command.index("-o") + 1]
        if Path(entry["file"]).name == name:
            compiler = command[: command.index("-o")]
    link = [*compiler, "-pthread", "-o", folder / "replay", *(object_of | {name: changed}).values()]
    for command in ([*compiler, "-c", source / name, "-o", changed], link):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "replay"


def runs_and_wrong(program, *arguments):
    """How often cases ran and how often an output was wrong; what was printed."""
    done = run(program, *arguments)
    runs, wrong = map(int, re.search(r"(\d+) runs, (\d+) wrong;", done.stdout).groups())
    assert done.returncode == (wrong > 0), done.stdout[-500:] + done.stderr
    return runs, wrong, done.stdout[-500:]


def test_the_kernels_as_they_are_break_none(honest, recorded):
    runs, wrong, printed = runs_and_wrong(honest / "signbit_replay", recorded, "2")
    assert runs > 2000 and wrong == 0, printed


@pytest.mark.parametrize("fault", FAULTS)
def test_the_replayed_laws_catch(fault, honest, recorded, tmp_path):
    file, right, wrong = FAULTS[fault]
    source = tmp_path / "csrc"
    shutil.copytree(CSRC, source)
    text = (source / file).read_text()
    assert text.count(right) == 1, f"{file} has changed: {right}"
    (source / file).write_text(text.replace(right, wrong))
    isa = SETS.get(fault.partition(":")[0], "portable")
    if isa in ("avx2", "emulated-avxvnni") and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{isa} needs an x86 processor")
    unit = UNITS.get(isa, "isa_emulated.cpp") if file.startswith("isa_") or file == "kernels.inl" else file
    _, wrong, printed = runs_and_wrong(compiled(unit, source, honest, tmp_path), recorded, "2", isa)
    assert wrong == 1, printed
