"""Bugs seeded in the CUDA kernels: a law must catch each, and the kernels as they are break none."""

import itertools

import pytest
import torch

from signbit.ops import BACKENDS, cuda
from tests.laws import cases, laws
from tests.ops.test_cuda import needs_gpu, on_gpu, one_way

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
    "input scales of the first plane": (
        "const long long row = (long long)min(plane, a.in_scale_planes - 1) * a.columns;", "const long long row = 0;",
        "shared_signs", (1, 4),
    ),
    "an input shift for eight columns": (
        "dot += f[j] * load(a.in_shift, k + j, FLOAT_TYPE(a));", "dot += f[j] * load(a.in_shift, k, FLOAT_TYPE(a));",
        "in_shift", (1, 4),
    ),
    "signs of the first plane": (
        "(a.sign_planes == 1 ? 0 : plane) * p.row_tiles", "(0) * p.row_tiles", "planes", (1, 4),
    ),
    "dense: signs of the first plane": (
        "(a.sign_planes == 1 ? 0 : plane) * row_tiles + tile) * column_tiles;", "(0) * row_tiles + tile) * column_tiles;",
        "planes", (40,),
    ),
    "dense: input scales of the first plane": (
        "term = __fmul_rn(term, load(a.in_scale, (long long)min(plane, a.in_scale_planes - 1) * a.columns + k + b,",
        "term = __fmul_rn(term, load(a.in_scale, k + b,", "shared_signs", (40,),
    ),
    "dense: a group of another's shift": (
        "load(a.shift, ((long long)tile * a.groups + group) * 16 + row, FLOAT_TYPE(a)));",
        "load(a.shift, ((long long)tile * a.groups) * 16 + row, FLOAT_TYPE(a)));", "shift", (40,),
    ),
    "dense: no input shift": (
        "if (a.in_shift != 0) values[b] =", "if (a.in_shift == (const void *)1) values[b] =", "in_shift", (40,),
    ),
    "dense: salient values without their zero": (
        "float(packet_code(packet, i) - zero)));", "float(packet_code(packet, i))));", "salient_offsets", (40,),
    ),
    "dense: no low halves": ("low = (v - high) * 4096;", "low = 0;", "shift", (40,)),
    "dense: codes cut instead of rounded": (
        "const float q = rintf(__fdiv_rn(127.0f * load(a.x, at + k, a.x_type), largest));",
        "const float q = truncf(__fdiv_rn(127.0f * load(a.x, at + k, a.x_type), largest));", "row", (40,),
    ),
    "head: the step of another token": (
        "store(a.y, (long long)t * a.rows + n, float(sums[t]) * (scale * step[t]), a.x_type);",
        "store(a.y, (long long)t * a.rows + n, float(sums[t]) * (scale * step[0]), a.x_type);", "head", (3,),
    ),
    "head: codes cut instead of rounded": (
        "(u8)__float2int_rn(__fdiv_rn(127.0f * read(token, k), largest));",
        "(u8)__float2int_rz(__fdiv_rn(127.0f * read(token, k), largest));", "head", (1, 3),
    ),
    "head: a code for its neighbour": (
        "x.w * float((signed char)(words[j] >> 24));", "x.w * float((signed char)(words[j] >> 16));", "head", (1, 3),
    ),
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
    right, wrong, kind, numbers = FAULTS[fault] if fault else ("", "", None, (1, 4, 40))
    for path in cuda._SOURCES.iterdir():
        text = path.read_text()
        (tmp_path / path.name).write_text(text.replace(right, wrong) if fault else text)
    monkeypatch.setattr(cuda, "_SOURCES", tmp_path)
    for cached in (cuda._kernel, cuda._module):
        cached.cache_clear()
    broken = []

    def put_through(law, *arguments, **options):
        try:
            law(*arguments, **options)
        except AssertionError as error:
            broken.append(str(error))

    try:
        # As they are, on all that faults are shown by. Float32 shows what halves would round.
        kinds = [kind] if fault else sorted({kind for _, _, kind, _ in FAULTS.values()})
        for kind, tokens in itertools.product(kinds, numbers):
            if kind == "head":
                put_through(laws.law_int8_linear, BACKENDS["cuda"], torch.bfloat16, "cuda", 40, 1040, tokens)
                continue
            w = on_gpu(cases.make(kind, 88, 1024))
            for way, dtype in itertools.product(("slices", "dense"), (torch.bfloat16, torch.float32)):
                put_through(laws.law_random, one_way(way), w, dtype, "cuda", tokens=tokens)
                put_through(laws.law_int8, one_way(way), w, dtype, "cuda", tokens=tokens)
    finally:
        for cached in (cuda._kernel, cuda._module):
            cached.cache_clear()
    assert bool(broken) == (fault is not None), broken
