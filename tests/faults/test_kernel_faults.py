"""Bugs seeded in the C++ kernels: the replayed cases of the laws must catch each."""

import re
import shutil

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


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("cases") / "cases"
    record.write(path)
    return path


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_the_replayed_laws_catch(fault, recorded, tmp_path, monkeypatch):
    need("c++", "cmake", "ninja")
    source = tmp_path / "csrc"
    shutil.copytree(CSRC, source)
    if fault is not None:
        file, right, wrong = FAULTS[fault]
        text = (source / file).read_text()
        assert text.count(right) == 1, f"{file} has changed: {right}"
        (source / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr("tests.ops.test_replay.CSRC", source)
    program = build(tmp_path / "built", "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1", "-DSIGNBIT_EMULATE=INSTEAD")
    done = run(program, recorded, "2", "first")
    wrong = int(re.search(r"(\d+) wrong;", done.stdout).group(1))
    assert (done.returncode == 0) == (wrong == 0) == (fault is None), done.stdout[-500:]
