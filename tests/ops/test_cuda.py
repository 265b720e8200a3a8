"""The CUDA kernels: sizes beyond a tile, every number of tokens, graphs, several devices, the cache of compiled code."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from tests import families
from tests.laws import cases, laws

import signbit
from signbit import bits
from signbit.errors import OptionError, SignbitError
from signbit.linear import PackedLinear
from signbit.ops import BACKENDS, cuda, explain, layout, nvrtc, reference
from signbit.ops.dispatch import Backend
from signbit.ops.prepared import Prepared
from signbit.weight import BinaryWeight, Salient

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_gpu(w):
    return PackedLinear(w).to("cuda").weights[0]


@pytest.mark.parametrize(("planes", "n", "k"), [(1, 24, 128), (2, 17, 1000), (1, 65, 2304), (3, 1, 8), (1, 1040, 300)])
def test_tiles_hold_each_sign_where_the_kernels_look_for_it(planes, n, k):
    signs = torch.randint(0, 256, (planes, n, -(-k // 8)), dtype=torch.uint8)
    if k % 8:
        signs[..., -1] &= (1 << k % 8) - 1
    laid = layout.lay_tiles(signs, k)
    assert torch.equal(layout.stored_tiles(laid, planes, n, k), signs)
    # lane 4g + t, word 2h + r, byte b, bit p: row 8r + g, column 32p + 16h + 4t + b; a set bit is −1.
    tiles = laid.view(planes, -(-n // 16), -(-k // 256), 8, 4, 2, 2, 4)
    for _ in range(100):
        plane, row, column = (int(torch.randint(0, high, ())) for high in (planes, n, k))
        stored = int(signs[plane, row, column // 8]) >> column % 8 & 1
        c = column % 256
        byte = tiles[plane, row // 16, column // 256, row % 8, c // 4 % 4, c // 16 % 2, row % 16 // 8, c % 4]
        assert int(byte) >> c // 32 & 1 == 1 - stored


@pytest.mark.parametrize(
    ("n", "k", "width", "share"), [(24, 128, 32, 0.4), (5, 1000, 1000, 0.1), (3, 2304, 384, 0.9), (40, 96, 96, 0.02)]
)
def test_packets_hold_each_salient_value_where_the_kernels_look_for_it(n, k, width, share):
    mask = torch.rand(n, k) < share
    mask[n // 2] = False
    mask[0, k - 1] = True
    index, codes = mask.view(-1).nonzero()[:, 0], torch.randint(0, 256, (int(mask.sum()),))
    laid, starts = layout.lay_packets(index, codes, n, k, width)
    stored_index, stored_codes = layout.stored_packets(laid, starts, k)
    assert torch.equal(stored_index, index) and torch.equal(stored_codes, codes.int())
    values = torch.zeros(n, k, dtype=torch.long)
    values.view(-1)[index] = codes + 1
    seen = torch.zeros(n, k, dtype=torch.long)
    for row in range(n):
        for packet in laid[starts[row] : starts[row + 1]].tolist():
            block, held = packet[0] + 256 * packet[1] % 4096, packet[1] >> 4
            columns = [256 * block + packet[at] for at in (4, 5, 6, 7, 2, 3, 15)]
            assert 1 <= held <= 7 and columns[held:] == [columns[0]] * (7 - held) and not any(packet[8 + held : 15])
            assert len({column // width for column in columns}) == 1
            for column, code in zip(columns[:held], packet[8:15], strict=False):
                seen[row, column] = code + 1
    assert torch.equal(seen, values)


def test_a_wrong_variable_is_refused(monkeypatch):
    monkeypatch.setenv(cuda.VARIABLE, "yes")
    cuda.selected.cache_clear()
    try:
        with pytest.raises(OptionError, match="SIGNBIT_CUDA is 'yes'; only reference is allowed"):
            cuda.selected(0)
        monkeypatch.setenv(cuda.VARIABLE, "reference")
        assert cuda.selected(0) == (None, "SIGNBIT_CUDA=reference asks for plain torch")
    finally:
        cuda.selected.cache_clear()


def test_an_old_device_is_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    cuda.selected.cache_clear()
    try:
        name, reason = cuda.selected(0)
    finally:
        cuda.selected.cache_clear()
    assert name is None and reason.startswith("compute capability 7.5 is below 8.0")


#: Shared memory that a block may have on compute capability 8.6 and 8.9: the least that there is from 8.0 on.
LEAST_SHARED = 99 * 1024


def on_paper(monkeypatch, n, k, groups, *, planes=1, halves=False, shared_bytes=LEAST_SHARED, **terms):
    """A Multiplication that plans launches for a device that is not here; its tensors hold nothing."""
    monkeypatch.setattr(cuda, "_limits", lambda index: (72, shared_bytes))
    nothing = torch.empty(0, dtype=torch.float16 if halves else torch.float32)
    shape = [n, k, groups, planes, planes, 1, 0, 8, 0, 0]
    return cuda.Multiplication(Prepared(nothing, nothing, *(terms.get(name) for name in Prepared._fields[2:-1]), shape))


@pytest.mark.parametrize("terms", [(), ("shift",), ("shift", "in_scale", "in_shift", "salient_codes")], ids=str)
@pytest.mark.parametrize(("k", "width"), [(64, 64), (4096, 32), (11008, 32), (28672, 28672), (131072, 32)])
@pytest.mark.parametrize("planes", [1, 4])
def test_every_slice_fits_the_least_shared_memory(terms, k, width, planes, monkeypatch):
    for n in (16, 4096, 22016):
        w = on_paper(monkeypatch, n, k, k // width, planes=planes, **dict.fromkeys(terms, torch.empty(0)))
        for mode in ("exact", "int8"):
            for tokens in range(1, w._at_once(torch.bfloat16, mode) + 1):
                grid, chunk, simple, needed = w._division(w._mode(torch.bfloat16, mode, tokens), tokens)
                assert 1 <= grid <= -(-n // 16) and chunk % 256 == 0 and needed <= LEAST_SHARED
                assert not simple or (chunk >= k and planes == 1 and "shift" not in terms)


def test_slices_are_of_fewer_tokens_where_the_sums_of_their_groups_do_not_fit(monkeypatch):
    shift = torch.empty(0)
    assert on_paper(monkeypatch, 2048, 4096, 128, shift=shift)._at_once(torch.bfloat16, "exact") == 16
    assert on_paper(monkeypatch, 2048, 11008, 344, shift=shift)._at_once(torch.bfloat16, "exact") == 8
    assert on_paper(monkeypatch, 2048, 11008, 344)._at_once(torch.bfloat16, "exact") == 16
    wide = on_paper(monkeypatch, 2048, 11008, 344, shift=shift, shared_bytes=227 * 1024)
    assert wide._at_once(torch.bfloat16, "exact") == 16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a small one")
    with pytest.raises(
        SignbitError, match=r"2048 × 11008 in 344 groups does not fit the shared memory of a small one; SIG"
    ):
        on_paper(monkeypatch, 2048, 11008, 344, shift=shift, shared_bytes=32 * 1024)._at_once(torch.bfloat16, "exact")


def test_slices_turn_into_a_dense_matrix_where_their_costs_cross(monkeypatch):
    """The tokens at which the measured costs of docs/speed.md cross."""
    size, scale = (4096, 4096), torch.empty(0)
    packets = torch.empty(int(0.01625 * 4096 * 4096), 0)  # of 10 % salient values: 2.6 bytes a value, 16 a packet
    plain = on_paper(monkeypatch, *size, 1)
    assert 60 <= plain.dense_from("exact") <= 85 and 60 <= plain.dense_from("int8") <= 85
    grouped = on_paper(monkeypatch, *size, 32, halves=True)
    assert 55 <= grouped.dense_from("exact") < plain.dense_from("exact")
    salient = on_paper(monkeypatch, *size, 1, salient_codes=packets, salient_scale=scale)
    assert 60 <= salient.dense_from("exact") <= 80 and 140 <= salient.dense_from("int8") <= 180
    planes = on_paper(monkeypatch, *size, 1, planes=2, shift=scale)
    assert 80 <= planes.dense_from("exact") <= 100 and 130 <= planes.dense_from("int8") <= 175
    assert on_paper(monkeypatch, *size, 1, in_shift=scale).dense_from("int8") == cuda.NEVER
    monkeypatch.setattr(cuda, "_FLOAT_SUMS", False)
    for slices in (on_paper(monkeypatch, *size, 32, halves=True), on_paper(monkeypatch, *size, 1, shift=scale)):
        assert slices.dense_from("int8") == cuda.NEVER


@pytest.mark.parametrize("kind", ["row", "scalar", "planes", "shift", "salient_offsets", "salient_bitmap"])
def test_no_weight_exceeds_its_rows_bound(kind):
    w = cases.make(kind, 41, 256).operands()
    prepared = Prepared.of(w, layout.lay_tiles(w.signs, w.in_features))
    bound, largest = cuda.Multiplication(prepared)._bounds(), bits.dense(w).abs().amax(1)
    assert bound.shape == largest.shape and bool((largest <= bound * (1 + 1e-6)).all())


def test_inside_a_capture_nothing_is_loaded_or_prepared(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        SignbitError, match=r"a kernel is loaded for the first time inside the capture .* call the layer once"
    ):
        nvrtc.Module(b"")
    with pytest.raises(SignbitError, match="a matrix is brought into the kernels' order for the first time inside"):
        cuda.prepare(cases.make("row").operands())


@pytest.fixture
def some_nvrtc(monkeypatch, tmp_path):
    """NVRTC of any CUDA that is installed, also beside a torch without CUDA: it compiles where there is no GPU."""
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path))
    found = [path for folder in sys.path for path in Path(folder).glob("nvidia/*/lib/libnvrtc.so.1[2-9]")]
    if torch.version.cuda is None and found:
        monkeypatch.setattr(torch.version, "cuda", found[0].suffix[1:])
    nvrtc._nvrtc.cache_clear()
    yield nvrtc.unavailable()
    nvrtc._nvrtc.cache_clear()


@pytest.mark.slow
def test_every_kernel_compiles_for_the_oldest_device(some_nvrtc):
    if some_nvrtc is not None:
        pytest.skip(some_nvrtc)
    variants = [("dense", {}), *(("head", {"HEAD": mode, "ONE": one}) for mode, one in ((0, 1), (1, 0), (1, 1)))]
    for mode, plain in itertools.product(range(4), (True, False)):
        one = plain or mode == 0
        macros = {
            "MODE": mode, "COLUMNS": 1 if one else 2, "ONE": one, "X_TYPE": 2 if mode == 2 else 1, "VECTORS": plain,
            "SCALES": 2, "SHARED_SCALES": plain, "GROUPED": mode > 0 and not plain, "SIMPLE": plain,
            **dict.fromkeys(("SHIFT", "IN_SCALE", "IN_SHIFT", "SALIENT"), not plain), "STAGES": cuda._stages(mode),
        }  # fmt: skip
        variants.append(("linear", macros))
    for name, macros in variants:
        given = [f"{macro}={int(value)}" for macro, value in macros.items()]
        assert nvrtc.compiled(cuda._SOURCES / f"{name}.cu", given, "sm_80")


def kernels():
    return BACKENDS["cuda"]


@gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [*range(1, 18), 32, 33, 40])
@pytest.mark.parametrize("kind", ["row", "group", "all", "salient_offsets", "shared_signs", "in_shift"])
def test_every_number_of_tokens(kind, tokens):
    w = on_gpu(cases.make(kind, 88, 1024))
    backend = kernels()
    for dtype in (torch.bfloat16, torch.float16):
        laws.law_random(backend, w, dtype, "cuda", tokens=tokens)
        laws.law_int8(backend, w, dtype, "cuda", tokens=tokens)
    laws.law_int8(backend, w, torch.float32, "cuda", tokens=tokens)


def one_way(way):
    """A backend whose many tokens go in slices, or by a dense matrix where there is one."""

    def binary_linear(x, w, activations):
        assert cuda.unsupported(w) is None
        return cuda.Multiplication(cuda.prepare(w))(x, activations, way)

    return Backend("cuda", binary_linear, cuda.int8_linear, "cuda")


@gpu
@needs_gpu
@pytest.mark.parametrize("way", ["slices", "dense"])
@pytest.mark.parametrize("kind", cases.TERMS)
def test_many_tokens(kind, way):
    for n, k, groups in ((88, 1024, 4), (129, 1056, 3), (129, 999, 1)):
        w = on_gpu(cases.make(kind, n, k, groups=groups))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            laws.law_random(one_way(way), w, dtype, "cuda", tokens=50)
            laws.law_int8(one_way(way), w, dtype, "cuda", tokens=50)


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["row", "group", "salient_offsets", "planes"])
def test_they_turn_into_a_dense_matrix_where_they_say(kind, monkeypatch):
    w = cuda.Multiplication(cuda.prepare(on_gpu(cases.make(kind, 88, 1024)).operands()))
    for mode in ("exact", "int8"):
        turn, sliced = w.dense_from(mode), []
        monkeypatch.setattr(w, "_some", lambda x, y, mode, stream, into=sliced: into.append(len(x)))
        w(torch.randn(turn - 1, 1024, device="cuda", dtype=torch.bfloat16), mode)
        assert sum(sliced) == turn - 1
        w(torch.randn(turn, 1024, device="cuda", dtype=torch.bfloat16), mode)
        assert sum(sliced) == turn - 1


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["row", "group", "in_scale", "salient_bitmap"])
def test_the_bias_of_many_tokens(kind, dtype):
    w, bias = on_gpu(cases.make(kind, 88, 1024)), torch.randn(88, device="cuda")
    x = torch.randn(40, 1024, device="cuda", dtype=dtype)
    prepared = cuda.prepare(w.operands())
    for mode in ("exact", "int8"):
        for way in ("slices", "dense"):
            plain = cuda.Multiplication(prepared)(x, mode, way).float()
            got = cuda.Multiplication(prepared, bias)(x, mode, way).float()
            # The bias itself is rounded, and the sum.
            assert (got - plain - bias).abs().max() <= 4 * torch.finfo(dtype).eps * (plain.abs() + bias.abs()).max()


@gpu
@needs_gpu
@pytest.mark.parametrize("way", ["slices", "dense"])
@pytest.mark.parametrize("kind", ["group", "shift", "planes"])
def test_long_sums_of_one_sign(kind, way):
    """Float sums as wide as those of LLaMA-7B's longest rows, which do not cancel: matrix units round each of 16 columns."""
    w = on_gpu(cases.make(kind, 64, 11008, groups=86))
    ones = BinaryWeight.from_signs(torch.ones(64, 11008), torch.rand(1, 64, 86).half(), shift=torch.rand(64, 86).half())
    x = torch.rand(40, 11008, device="cuda")
    for weight in (w, on_gpu(ones)):
        want, size = laws.int8_by_definition(x, weight)
        got = one_way(way).binary_linear(x, weight.operands(), "int8").double()
        assert bool(((got - want).abs() <= (16 + 11008 / 16) * torch.finfo(torch.float32).eps * size).all())


@gpu
@needs_gpu
@pytest.mark.parametrize(("n", "k"), [(2048, 28672), (22016, 4096)])
@pytest.mark.parametrize("kind", ["row", "salient_offsets", "in_scale", "planes"])
def test_what_does_not_fit_at_once(kind, n, k, monkeypatch):
    """As where a block has less shared memory than an H100's: columns go in chunks, rows in several waves."""
    monkeypatch.setattr(cuda, "_limits", lambda index: (72, 99 * 1024))
    w = on_gpu(cases.make(kind, n, k, torch.float16, 1))
    for tokens in (1, 4, 16):
        laws.law_int8(kernels(), w, torch.bfloat16, "cuda", tokens=tokens)
        laws.law_random(kernels(), w, torch.bfloat16, "cuda", tokens=tokens)


@gpu
@needs_gpu
def test_tokens_whose_group_sums_do_not_fit_at_once(monkeypatch):
    monkeypatch.setattr(cuda, "_limits", lambda index: (72, LEAST_SHARED))
    w = on_gpu(cases.make("shift", 2048, 11008, groups=344))
    assert cuda.Multiplication(cuda.prepare(w.operands()))._at_once(torch.bfloat16, "exact") < cuda.MOST_TOKENS
    for tokens in (1, 9, 16, 21):
        laws.law_int8(kernels(), w, torch.bfloat16, "cuda", tokens=tokens)
        laws.law_random(kernels(), w, torch.bfloat16, "cuda", tokens=tokens)


@gpu
@needs_gpu
def test_halves_times_input_scales_do_not_overflow():
    w = on_gpu(
        BinaryWeight.from_signs(
            torch.randn(24, 128), torch.full((1, 24, 1), 1e-3), in_scale=torch.full((1, 128), 100.0)
        )
    )
    x = torch.full((3, 128), 1000.0, device="cuda", dtype=torch.float16)
    got, want = (op(x, w.operands(), "exact") for op in (cuda.binary_linear, reference.binary_linear))
    assert bool(got.isfinite().all()) and torch.allclose(got, want, rtol=1e-3)


@gpu
@needs_gpu
@pytest.mark.parametrize("where", [[], [0], [5, 700]])
def test_rows_without_salient_values(where):
    mask = torch.zeros(40, 1000, dtype=torch.bool)
    mask[3, where] = True
    salient = Salient.from_mask(mask, torch.full((40, 1000), 200), torch.rand(40), torch.full((40,), 17), 8)
    w = on_gpu(BinaryWeight.from_signs(torch.randn(40, 1000), torch.rand(1, 40, 1), salient=salient))
    for tokens in (1, 5, 40):
        laws.law_random(kernels(), w, torch.bfloat16, "cuda", tokens=tokens)
        laws.law_int8(kernels(), w, torch.bfloat16, "cuda", tokens=tokens)


# Rows beyond the tiles that lie in shared memory at once, columns beyond what fits there, odd sizes of both.
@gpu
@needs_gpu
@pytest.mark.parametrize(("n", "k"), [(5000, 96), (40000, 256), (17, 30000), (300, 11008), (33, 20000), (129, 999)])
@pytest.mark.parametrize("kind", ["row", "group", "salient_bitmap", "shift", "in_scale", "in_shift", "planes", "all"])
def test_sizes(kind, n, k):
    if kind == "group" and k % 128:
        pytest.skip("groups of other widths are left to the reference")
    if kind not in ("row", "group") and n * k > 5_000_000:
        pytest.skip("takes long")
    w = on_gpu(cases.make(kind, n, k, groups=None if kind == "group" else 1))
    for tokens in (1, 5, 16):
        laws.law_random(kernels(), w, torch.bfloat16, "cuda", tokens=tokens)
        laws.law_int8(kernels(), w, torch.float16, "cuda", tokens=tokens)


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_dense_matrix_is_that_of_the_definition(kind):
    for n, k, groups in ((24, 128, 4), (40, 1056, 3), (17, 333, 1) if kind in cases.TERMS else (20, 352, 1)):
        w = on_gpu(cases.make(kind, n, k, groups=groups))
        if cuda.unsupported(w.operands()):
            assert kind not in cases.TERMS
            continue
        made = cuda.Multiplication(cuda.prepare(w.operands())).dense(torch.float32)
        assert torch.equal(made, w.to_dense())


@gpu
@needs_gpu
@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_stored_form_comes_back(kind):
    w = on_gpu(cases.make(kind, 40, 1024))
    again = cuda.prepare(w.operands()).stored()
    for one, other in zip(w.operands(), again, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@gpu
@needs_gpu
@pytest.mark.parametrize("rows", [1003, 1008])  # the second are as torch's product of integers takes them
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_head(mode, tokens, dtype, rows, monkeypatch):
    codes = torch.randint(-127, 128, (rows, 1040), dtype=torch.int8, device="cuda")
    scale = torch.rand(rows, device="cuda")
    x = torch.randn(tokens, 1040, device="cuda").to(dtype)
    with monkeypatch.context() as patched:
        if tokens <= 16 or (mode == "int8" and rows % 8 == 0):
            patched.setattr(reference, "int8_linear", lambda *given: pytest.fail("left to the reference"))
        got = cuda.int8_linear(x, codes, scale, mode)
    want = reference.int8_linear(x.double() if mode == "exact" else x.float(), codes, scale, mode)
    assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["exact", "int8"])
@pytest.mark.parametrize("tokens", [1, 40, 330])
@pytest.mark.parametrize("kind", ["row", "group", "in_scale", "salient_bitmap", "all"])
def test_a_graph_replays_it_and_the_same_comes_out(kind, tokens, mode):
    layers = [PackedLinear(cases.make(kind, 512, 512), torch.randn(512)).cuda() for _ in range(4)]
    for layer in layers:
        layer.activations = mode
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)

    def run():
        y = x
        for layer in layers:
            y = layer(y / y.abs().amax())
        return y

    want = run()
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for _ in range(3):
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, want)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, run())


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("kind", ["group", "all"])
def test_compiled(kind, mode):
    layer = PackedLinear(cases.make(kind, 64, 256), torch.randn(64)).cuda()
    layer.prepare()
    x = torch.randn(2, 256, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x).clone(), layer(x))
        if mode is not None:
            from torch._inductor.cudagraph_trees import get_manager

            manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
            assert manager is not None and any(True for _ in manager.get_roots())
            assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped


@gpu
@needs_gpu
def test_norms_bias_and_gradients():
    stored = PackedLinear(cases.make("all", 40, 1024), torch.randn(40), "rms", norm_out="layer")
    layer = PackedLinear(stored.weights, stored.bias, "rms", norm_out="layer").cuda()
    x = torch.randn(3, 1024)
    assert layer.prepare() is None
    assert (layer(x.cuda()).cpu() - stored(x)).abs().max() <= 1e-4
    upstream = torch.randn(3, 40)
    u = x.cuda().requires_grad_()
    layer(u).backward(upstream.cuda())
    v = x.clone().requires_grad_()
    stored(v).backward(upstream)
    assert (u.grad.cpu() - v.grad).abs().max() <= 1e-4 * v.grad.abs().max()
    assert torch.equal(layer.cpu()(x), stored(x))


@gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 2, 40, 330])
@pytest.mark.parametrize("kind", ["row", "group", "in_scale", "salient_bitmap", "all"])
def test_what_is_not_finite_shows(kind, tokens):
    layer = cuda.Multiplication(cuda.prepare(on_gpu(cases.make(kind, 24, 128)).operands()))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, 128, device="cuda", dtype=dtype)
        for bad in (float("nan"), float("inf"), -float("inf")):
            x[0, 5] = bad
            for way in ("slices", "dense"):
                y = layer(x, "int8", way)
                assert bool(y[0].isnan().all()) and bool(y[1:].isfinite().all())


@gpu
@needs_gpu
def test_a_kernel_first_met_inside_a_capture_says_so(monkeypatch):
    w = cuda.prepare(on_gpu(cases.make("row", 24, 128)).operands())
    x = torch.randn(1, 128, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(cuda, "_kernel", cuda._kernel.__wrapped__)
    monkeypatch.setattr(cuda, "_module", cuda._module.__wrapped__)
    with pytest.raises(SignbitError, match="call the layer once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cuda.Multiplication(w)(x, "exact")
    cuda.Multiplication(w)(x, "exact")


@gpu
@needs_gpu
def test_what_moves_by_data_is_found_again():
    w = cuda.prepare(on_gpu(cases.make("all", 24, 128)).operands())
    multiply, x = cuda.Multiplication(w), torch.randn(3, 128, device="cuda", dtype=torch.bfloat16)
    for tensor in w[:-1]:
        if tensor is not None:
            tensor.data = tensor.data * 2 if tensor.is_floating_point() else tensor.data.clone()
            assert torch.equal(multiply(x, "exact"), cuda.Multiplication(w)(x, "exact"))


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_a_model_generates_with_a_static_cache(mode):
    model = families.llama()
    signbit.quantize_(model, signbit.SignbitConfig("absmean", group=32, head="int8"))
    ids = torch.arange(1, 6, device="cuda")[None]
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to("cuda", dtype)
        signbit.set_activations(model, mode)
        layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert layers and all(layer.prepare() is None for layer in layers)
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        eager = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        static = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **options)
        assert static.shape == eager.shape == (1, 17)
        if dtype is torch.float32:
            assert torch.equal(static, eager)
        # In halves two tokens may be as likely: each is one that the eager model, given the same text, calls so.
        with torch.no_grad():
            logits = model(static[:, :-1]).logits[0, 4:].float()
        chosen = logits.gather(1, static[0, 5:, None])[:, 0]
        assert bool((logits.amax(1) - chosen <= 0.1 * logits.std(1)).all())


@gpu
@needs_gpu
def test_doctor_says_what_multiplies():
    assert {c.backend for c in explain("cuda")} == {"cuda"}


@gpu
@needs_gpu
def test_compiled_code_is_kept_and_errors_are_nvrtcs(tmp_path, monkeypatch):
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, str(tmp_path / "kept"))
    code = nvrtc.compiled(cuda._SOURCES / "dense.cu", (), "sm_90")
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.read_bytes() == code and kept.name.startswith("dense-sm_90-")
    monkeypatch.setattr(nvrtc, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert nvrtc.compiled(cuda._SOURCES / "dense.cu", (), "sm_90") == code
    monkeypatch.undo()
    monkeypatch.setenv(nvrtc.CACHE_VARIABLE, "/proc/nowhere")
    assert nvrtc.compiled(cuda._SOURCES / "dense.cu", (), "sm_90") == code
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void f() { nothing; }")
    with pytest.raises(SignbitError, match=r"broken\.cu does not compile with .*\n.*nothing"):
        nvrtc.compiled(broken, (), "sm_90")
