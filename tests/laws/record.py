"""Writes the laws' cases to a file that csrc/replay.cpp reads: python -m tests.laws.record FILE.

A case is a prepared matrix, its inputs, what float64 says the outputs are and how far a kernel may be off. Integers are
int64 and floats float64, both little endian; a tensor is its number of bytes (−1: none) and those bytes.
"""

import struct
import sys

import torch
import torch.nn.functional as F

from signbit.linear import Int8Head
from signbit.ops import cpu, native
from tests.laws import cases, laws

SHAPES = ((24, 128), (40, 1000), (17, 32), (65, 2304))
TOKENS = (1, 2, 5, 13, 29)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMPTY = (None,) * 11


class Writer:
    """The bytes of all cases."""

    def __init__(self):
        self.cases = []

    def add(self, name, head, x, call, matrix, tensors, bias, want, slack):
        parts = [blob(name.encode() + b"\0"), integers(head, x.shape[0]), call]
        parts += [integers(*matrix), *(blob(raw(t)) for t in (*tensors, bias, x))]
        parts += [blob(raw(want.float())), blob(raw(slack.float()))]
        self.cases.append(b"".join(parts))

    def linear(self, kind, w, x, mode, norms=("none", "none"), bias=None):
        prepared = cpu.prepare(w.operands())
        want, slack = expected(w, x, mode, norms, bias)
        rows, columns, groups, planes, sign_planes, scale_rows, in_scale_planes, salient_bits, *_ = prepared.shape
        p = prepared
        matrix = (
            rows, columns, groups, planes, sign_planes, scale_rows, in_scale_planes, native.FLOATS[p.scale.dtype],
            salient_bits,
        )  # fmt: skip
        tensors = (
            p.signs, p.scale, p.shift, p.in_scale, p.in_shift, p.salient_codes, p.salient_positions, p.salient_counts,
            p.salient_scale, p.salient_zero, p.salient_starts,
        )  # fmt: skip
        name = f"{kind} {rows}x{columns} {mode} {len(x)} tokens {x.dtype} norms {' '.join(norms)}"
        self.add(name, 0, x, call(x, mode, norms, bias), matrix, tensors, bias, want, slack)

    def head(self, rows, columns, x, mode):
        codes, scale = Int8Head.quantize(torch.randn(rows, columns))
        u, step = x.double(), 1.0
        if mode == "int8":
            a = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-5)
            u, step = (127 * x.float() / a).round().double(), a.double() / 127
        want = u @ codes.double().T * (scale.double() * step)
        size = u.abs() @ codes.double().abs().T * (scale.double() * step)
        tensors = (None, scale, None, None, None, codes, *EMPTY[:5])
        name = f"head {rows}x{columns} {mode} {len(x)} tokens {x.dtype}"
        slack = rounding(x.dtype, want, size)
        self.add(name, 1, x, call(x, mode), (rows, columns, 1, 1, 1, 1, 0, 0, 0), tensors, None, want, slack)


def integers(*values):
    """Values as int64."""
    return struct.pack(f"<{len(values)}q", *values)


def raw(tensor):
    """The tensor's bytes, or None."""
    return None if tensor is None else tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def blob(content):
    """Bytes behind their number."""
    return integers(-1) if content is None else integers(len(content)) + content


def call(x, mode, norms=("none", "none"), bias=None):
    """How the matrix is applied."""
    types = native.FLOATS[x.dtype], native.NORMS[norms[0]], native.NORMS[norms[1]]
    bias_type = native.NO_BIAS if bias is None else native.FLOATS[bias.dtype]
    return integers(int(mode == "int8"), *types, bias_type) + struct.pack("<2d", 1e-5, 1e-5)


def rounding(dtype, want, size):
    """What the outputs' dtype and float32 sums may cost."""
    return torch.finfo(dtype).eps * want.abs() + 16 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).tiny


def expected(w, x, mode, norms, bias):
    """Outputs and slack in float64, the norms' rounding to the dtype of x included."""
    dtype = x.dtype
    if norms[0] == "rms":
        x = F.rms_norm(x, (w.in_features,), eps=1e-5)
    elif norms[0] == "layer":
        x = F.layer_norm(x, (w.in_features,), eps=1e-5)
    if mode == "int8":
        want, size = laws.int8_by_definition(x, w)
        loose = torch.zeros_like(want)
    else:
        want, size = x.double() @ w.to_dense(torch.float64).T, x.double().abs() @ laws.size_of_terms(w).T
        loose = torch.finfo(dtype).eps * size if norms[0] != "none" else torch.zeros_like(size)
    slack = rounding(dtype, want, size) + loose
    if norms[1] == "layer":
        spread = want.var(-1, correction=0, keepdim=True).add(1e-5).sqrt()
        want = F.layer_norm(want, (w.out_features,), eps=1e-5)
        slack = 4 * (slack + torch.finfo(dtype).eps * size).amax(-1, keepdim=True) / spread + rounding(dtype, want, 0)
    if bias is not None:
        slack = slack + 2 * torch.finfo(dtype).eps * (want.abs() + bias.double().abs())
        want = want + bias.double()
    return want, slack


def supported(w):
    """Whether the kernels take this weight."""
    return cpu.unsupported(w.operands()) is None


def write(path):
    """All cases to `path`; returns how many."""
    torch.manual_seed(0)
    writer = Writer()
    for kind in (*cases.KINDS, "shared_parts"):
        for n, k in SHAPES[:1] if kind in cases.METHOD_CASES else SHAPES:
            w = cases.make(kind, n, k)
            for place, tokens in enumerate(TOKENS):
                x = torch.randn(tokens, k).to(DTYPES[place % 3])
                for mode in ("exact", "int8"):
                    if supported(w):
                        writer.linear(kind, w, x, mode)
    # One token and groups of each width with a way of its own, their sums as large as can be; and of one without.
    for width in (32, 64, 128, 256, 512):
        for kind in ("group", "planes", "shift"):
            w = cases.make(kind, 40, 1536, torch.float16, 1536 // width)
            w.signs[:, :16] = 255
            for dtype, x in zip(DTYPES, (torch.randn(1, 1536), torch.ones(1, 1536), -torch.ones(1, 1536)), strict=True):
                writer.linear(kind, w, x.to(dtype), "int8")
    # Where a lookup takes 16 blocks of rows together, four, and some that are not there; an odd number of words.
    for n, k, groups in ((300, 960, 3), (230, 1000, 1)):
        for kind in ("group", "planes"):
            w = cases.make(kind, n, k, torch.float16, groups)
            for place, tokens in enumerate((3, 16, 33, 70)):
                writer.linear(kind, w, torch.randn(tokens, k).to(DTYPES[place % 3]), "int8")
    # Where matrix units take more tokens than fit at once, and more rows; every width of groups in a panel of 512 columns.
    for n, k, groups in ((530, 640, 10), (520, 1056, 1), (40, 1152, 2), (40, 1536, 12), (17, 1152, 1)):
        for kind in ("group", "planes", "shift", "in_shift", "shared_signs"):
            w = cases.make(kind, n, k, torch.bfloat16, groups)
            for place, tokens in enumerate((8, 31, 150)):
                writer.linear(kind, w, torch.randn(tokens, k).to(DTYPES[place % 3]), "int8")
    for place, norms in enumerate((a, b) for a in native.NORMS for b in ("none", "layer")):
        for tokens in TOKENS[:3]:
            dtype = DTYPES[(place + tokens) % 3]
            x, w = torch.randn(tokens, 128).to(dtype), cases.make("all")
            # int8 codes of a normed input depend on its last bit, so exact alone.
            writer.linear("all", w, x, "exact", norms, torch.randn(24).to(dtype))
        # Where the norms' eps is a good part.
        writer.linear("row", cases.make("row"), 1e-3 * torch.randn(3, 128), "exact", norms)
    # 127 times some of these is infinite.
    for kind in ("row", "group"):
        for tokens in (1, 13):
            writer.linear(kind, cases.make(kind), 2e36 * torch.randn(tokens, 128), "int8")
    for n, k in ((5, 33), (19, 64), (40, 300)):
        for tokens in TOKENS:
            for dtype in DTYPES:
                for mode in ("exact", "int8"):
                    writer.head(n, k, torch.randn(tokens, k).to(dtype), mode)
    with open(path, "wb") as file:
        file.write(b"signbit1" + integers(len(writer.cases)))
        file.writelines(writer.cases)
    return len(writer.cases)


if __name__ == "__main__":
    print(f"{write(sys.argv[1])} cases in {sys.argv[1]}")
