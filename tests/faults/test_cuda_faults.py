"""Bugs seeded in the CUDA kernels: a law must catch each, and the kernels as they are break none."""

import pytest
import torch

from signbit.ops import BACKENDS, cuda
from tests.laws import cases, laws
from tests.ops.test_cuda import needs_gpu, on_gpu

# Name: what stands there, what stands there instead, the weight that shows it, numbers of tokens.
FAULTS = {
    "codes cut instead of rounded": (
        "__fadd_rn(__fmaf_rn(__fmaf_rn(-near, a, u), reciprocal, near), MAGIC);",
        "__fadd_rn(truncf(__fmaf_rn(__fmaf_rn(-near, a, u), reciprocal, near)), MAGIC);", "row", (1, 3),
    ),
    "the sign's bit plane added": ("t == 3 ? -(partial[u][0][1] << 7)", "t == 3 ? (partial[u][0][1] << 7)", "row", (1,)),
    "the columns of two words swapped": (
        "u32 *to = (u32 *)s.bytes + lane % 2 * 32 + lane / 2 % 2 * 8 + lane / 4;",
        "u32 *to = (u32 *)s.bytes + lane % 2 * 32 + (1 - lane / 2 % 2) * 8 + lane / 4;", "row", (1,),
    ),
    "the largest of the first warp only": (
        "most = lane < share.warps && share.mine ?", "most = lane < 1 && share.mine ?", "row", (1, 2),
    ),
    "a group of another's scale": (
        "const int group = min(begin / a.width, a.groups - 1);", "const int group = 0;", "group", (1, 5),
    ),
    "the lower bytes twice": ("high[i] = signed_ones(words[u][i], ones);",
                              "high[i] = signed_ones(words[u][i] << 8, ones);", "row", (1, 7)),
    "the last slot of columns left out": ("if (slot < plan.slots) sum += from", "if (slot + 1 < plan.slots) sum += from",
                                          "row", (1, 4)),
    "shift forgotten": ("s.group_sums[token * a.groups + group];", "0.0f;", "shift", (1, 4)),
    "salient values beside what they replace": (
        "float f = plane < 0 ? 0 : scale_of(a, plan, s, plane, p.row / 16, group, p.row % 16);",
        "float f = 0;", "salient_bitmap", (1, 6),
    ),
    "missing salient values added": ("const int missing = 7 - packet_count(packet);", "const int missing = 0;",
                                     "salient_offsets", (1, 6)),
    "salient columns in their own order": (
        "(columns & 0xe3e3e3e3) | (columns & 0x0c0c0c0c) << 1 | (columns >> 2 & 0x04040404);", "columns;",
        "salient_offsets", (2, 6),
    ),
    "neighbours of the dense matrix": ("t % 2 ? theirs : own, t % 2 ? own : theirs, p, scale);",
                                       "own, theirs, p, scale);", "row", (40,)),
    "the step of another token": ("const float step = a.step[token];", "const float step = a.step[0];", "row", (40,)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_to_be_changed_stands_in_the_source_once(fault):
    right, wrong, *_ = FAULTS[fault]
    assert right != wrong
    assert sum(path.read_text().count(right) for path in cuda._SOURCES.iterdir()) == 1


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_law_catches(fault, tmp_path, monkeypatch):
    right, wrong, kind, numbers = FAULTS[fault] if fault else ("", "", "row", (1, 4, 40))
    for path in cuda._SOURCES.iterdir():
        text = path.read_text()
        (tmp_path / path.name).write_text(text.replace(right, wrong) if fault else text)
    monkeypatch.setattr(cuda, "_SOURCES", tmp_path)
    for cached in (cuda._kernel, cuda._module):
        cached.cache_clear()
    broken = []
    try:
        w = on_gpu(cases.make(kind, 88, 1024))
        for tokens in numbers:
            for law in (laws.law_random, laws.law_int8):
                try:
                    law(BACKENDS["cuda"], w, torch.bfloat16, "cuda", tokens=tokens)
                except AssertionError as error:
                    broken.append(str(error))
    finally:
        for cached in (cuda._kernel, cuda._module):
            cached.cache_clear()
    assert bool(broken) == (fault is not None), broken
