"""What is the CPU kernels' own: their layout, the choice of an instruction set, sizes beyond a tile, threads, forks."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.laws import cases, laws

from signbit import bits
from signbit.errors import OptionError, ShapeError
from signbit.ops import BACKENDS, binary_linear, cpu, explain, int8_linear, layout, native, prepared_linear, reference

needs_kernels = pytest.mark.skipif(isinstance(native.library(), str), reason=f"no CPU kernels: {native.library()}")
KERNELS = [name for name, backend in BACKENDS.items() if backend.device == "cpu"]


def in_process(code, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 1000, 1024, 1025, 2304])
def test_the_layout_loses_nothing(rows, columns):
    signs = bits.pack_signs(torch.randn(2, rows, columns))
    laid = layout.lay_signs(signs, columns)
    assert torch.equal(layout.stored_signs(laid, 2, rows, columns), signs)
    values = torch.randn(2, rows, 3)
    assert torch.equal(layout.stored_rows(layout.lay_rows(values), rows), values)


def test_a_word_of_the_layout_is_32_columns_of_one_row():
    signs = torch.full((1, 18, 1100), -1.0)
    signs[0, 17, 1024 + 35] = 1  # chunk 1, word 1 of its 3, block 1 of 2, lane 1, bit 3
    laid = layout.lay_signs(bits.pack_signs(signs), 1100)
    place = 2 * 32 * 16 + (1 * 3 + 1) * 16 + 1
    assert laid.nonzero().tolist() == [[place]]
    assert laid[place] == 1 << 3


@needs_kernels
@pytest.mark.parametrize("kind", cases.TERMS)
def test_prepared_operands_come_back(kind):
    w = cases.make(kind, 40, 1100)
    stored = cpu.prepare(w.operands()).stored()
    for name, before, after in zip(stored._fields, w.operands(), stored, strict=True):
        if name == "signs" and w.salient is not None:
            continue  # bits under salient positions mean nothing and become 0
        same = torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
        assert same, name
    assert torch.equal(bits.dense(stored), w.to_dense())


@needs_kernels
@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("kind", ["row", "group", "salient_bitmap", "all"])
def test_sizes_beyond_a_tile(isa, kind):
    w = cases.make(kind, 70, 2304)
    for tokens in (1, 2, 3, 7, 12, 29):
        laws.law_random(BACKENDS[isa], w, torch.float32, tokens=tokens)
        laws.law_int8(BACKENDS[isa], w, torch.bfloat16, tokens=tokens)


@needs_kernels
@pytest.mark.parametrize("isa", KERNELS)
def test_norms_and_bias_are_those_of_torch(isa):
    w, bias = cases.make("group", 40, 128), torch.randn(40)
    prepared = cpu.prepare(w.operands())
    for magnitude in (1, 1e-3):  # of the small ones an eps is a good part
        x = torch.randn(5, 128) * magnitude
        for norm_in in ("none", "rms", "layer"):
            for norm_out in ("none", "layer"):
                u = x
                if norm_in == "rms":
                    u = torch.nn.functional.rms_norm(x, (128,), eps=1e-5)
                elif norm_in == "layer":
                    u = torch.nn.functional.layer_norm(x, (128,), eps=1e-5)
                want = u @ w.to_dense().T
                if norm_out == "layer":
                    want = torch.nn.functional.layer_norm(want, (40,), eps=1e-4)
                got = cpu.Multiplication(prepared, None, norm_in, 1e-5, norm_out, 1e-4, isa)(x, "exact")
                assert (got - want).abs().max() <= 1e-5 * want.abs().max()
                got = cpu.Multiplication(prepared, bias, norm_in, 1e-5, norm_out, 1e-4, isa)(x, "exact")
                assert (got - want - bias).abs().max() <= 1e-5 * (want + bias).abs().max()


# A norm of halves is rounded to halves, as torch's own is: what it feeds then differs where float32 does, by the last bit.
@needs_kernels
@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_norm_of_halves_is_rounded(isa, dtype, norm):
    prepared, x = cpu.prepare(cases.make("row", 40, 128).operands()), torch.randn(50, 128).to(dtype)
    apply = torch.nn.functional.rms_norm if norm == "rms" else torch.nn.functional.layer_norm
    for mode in ("exact", "int8"):
        want = cpu.Multiplication(prepared, isa=isa)(apply(x, (128,), eps=1e-5), mode)
        got = cpu.Multiplication(prepared, None, norm, 1e-5, isa=isa)(x, mode)
        assert (got == want).double().mean() > 0.9, mode


@needs_kernels
@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_shows(isa, bad):
    x = torch.randn(2, 128)
    x[0, 5] = bad
    y = BACKENDS[isa].binary_linear(x, cases.make("row").operands(), "int8")
    assert bool(y[0].isnan().all()) and bool(y[1].isfinite().all())


@needs_kernels
@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("kind", ["row", "group"])
def test_activations_near_the_largest_float(isa, kind):
    w = cases.make(kind, 24, 128)
    for tokens in (1, 5):
        laws.law_int8(BACKENDS[isa], w, torch.float32, magnitude=2e36, tokens=tokens)  # 127 times some is infinite


# Terms at sizes that the laws' own cases leave to the reference: groups of every width, one group of an odd width, a
# bitmap whose rows end inside a word, and scales of every type.
@needs_kernels
@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize(
    "kind", ["group", "planes", "shift", "in_scale", "shared_parts", "salient_offsets", "salient_bitmap", "all"]
)
@pytest.mark.parametrize(("n", "k", "groups"), [(24, 1000, 1), (17, 172, 1), (40, 768, 12), (24, 768, 6), (24, 768, 3)])
def test_terms_beyond_the_laws(isa, kind, n, k, groups):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        w = cases.make(kind, n, k, dtype, groups)
        assert cpu.unsupported(w.operands()) is None
        for tokens in (1, 9):
            laws.law_random(BACKENDS[isa], w, torch.float32, tokens=tokens)
            laws.law_int8(BACKENDS[isa], w, torch.float32, tokens=tokens)


# Where a lookup takes 16 blocks of rows together, four, and some that are not there; an odd number of words; more tokens
# and rows than matrix units take at once.
@needs_kernels
@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("kind", ["group", "planes", "in_scale", "salient_bitmap"])
@pytest.mark.parametrize(("n", "k", "groups"), [(300, 960, 3), (230, 1000, 1), (530, 576, 9)])
def test_several_tokens_of_many_rows(isa, kind, n, k, groups):
    w = cases.make(kind, n, k, torch.float16, groups)
    assert cpu.unsupported(w.operands()) is None
    for tokens in (3, 16, 33, 70, 150):
        for dtype in (torch.float32, torch.bfloat16):
            laws.law_int8(BACKENDS[isa], w, dtype, tokens=tokens)


@needs_kernels
@pytest.mark.parametrize(
    ("default", "around"),
    [
        (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
        (torch.float32, lambda: torch.device("meta")),
        (torch.float32, torch.inference_mode),
        (torch.float64, torch.no_grad),
        (torch.bfloat16, torch.no_grad),
        (torch.float16, torch.no_grad),
    ],
)
def test_the_check_at_load_does_not_depend_on_its_caller(default, around, chosen_anew):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.no_grad(), around():
            assert "checked against the reference at load" in cpu.selected()[1]
    finally:
        torch.set_default_dtype(before)


@needs_kernels
@pytest.mark.parametrize("kind", ["salient_offsets", "salient_bitmap"])
def test_a_damaged_salient_weight_is_refused(kind):
    w = cases.make(kind, 24, 300 if kind == "salient_offsets" else 301, groups=1).operands()
    damaged = {"salient_codes": w.salient_codes[:-1]}
    if kind == "salient_bitmap":
        positions = w.salient_positions.clone()
        positions[3, -1] |= 0x80  # column 303
        damaged["salient_positions"] = positions
    else:
        counts = w.salient_counts.clone()
        counts[2, 0] += 1
        damaged |= {"salient_positions": w.salient_positions.flip(0), "salient_counts": counts}
    assert cpu.prepare(w) is not None
    for name, tensor in damaged.items():
        with pytest.raises(ShapeError, match="do not fit together; the weight is damaged"):
            cpu.prepare(w._replace(**{name: tensor}))


@needs_kernels
def test_operands_that_do_not_fit_are_refused():
    w, x = cpu.prepare(cases.make("row").operands()), torch.randn(2, 128)
    with pytest.raises(ShapeError, match=r"a bias is .* \[24\], not torch.float32 \[1\]"):
        prepared_linear(x, w, bias=torch.ones(1))
    with pytest.raises(ShapeError, match=r"not torch\.float64"):
        prepared_linear(x, w, bias=torch.ones(24, dtype=torch.float64))
    with pytest.raises(ShapeError, match="contiguous"):
        prepared_linear(x, w, bias=torch.ones(48)[::2])
    with pytest.raises(ShapeError, match="the input is on meta"):
        cpu.Multiplication(w)(x.to("meta"), "exact")
    with pytest.raises(ShapeError, match=r"a scale \[N\] on the input's device"):
        int8_linear(x, torch.ones(24, 128, dtype=torch.int8), torch.ones(2))


@needs_kernels
def test_as_many_threads_as_torch_has_and_they_sleep():
    code = """
import os, time, torch
from signbit.ops import cpu
from tests.laws import cases
multiply = cpu.Multiplication(cpu.prepare(cases.make("row", 400, 1024).operands()))
x = torch.randn(1, 1024)
threads = lambda: len(os.listdir("/proc/self/task"))
def after(count):
    torch.set_num_threads(count)
    before = threads()
    multiply(x, "int8")
    return threads() - before
print(after(1), after(3), after(2), after(4), flush=True)
multiply(x, "int8")
time.sleep(0.05)
began = time.process_time()
time.sleep(0.5)
print("asleep" if time.process_time() - began < 0.1 else "busy")
"""
    done = in_process(code)
    assert done.stdout.split() == ["0", "2", "0", "1", "asleep"], done.stdout + done.stderr


@pytest.fixture
def four_threads():
    """What runs all tests gives each process one thread, with which nobody waits for the pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@needs_kernels
def test_other_python_threads_run_meanwhile(four_threads):
    multiply = cpu.Multiplication(cpu.prepare(cases.make("row", 4096, 4096).operands()))
    x, counted, done = torch.randn(512, 4096), 0, []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: done.append(multiply(x, "exact")))
        while not running.done():
            counted += 1
    # With the lock held throughout, this thread would be let in only before and after.
    assert len(done) == 1 and counted > 1000


# So many that a dense matrix is unpacked for the call: three planes, or many salient values.
@needs_kernels
@pytest.mark.parametrize("kind", ["pbllm_4bit", "salient_bitmap", "row"])
def test_many_tokens(kind):
    w = cases.make(kind)
    multiply = cpu.Multiplication(cpu.prepare(w.operands()), torch.randn(24))
    many = torch.randn(cpu.MANY_TOKENS, 128)
    for mode in ("exact", "int8"):
        few = torch.cat([multiply(x, mode) for x in many.split(8)])
        assert (multiply(many, mode) - few).abs().max() <= 1e-5 * few.abs().max()


@needs_kernels
def test_many_tokens_of_a_head():
    codes, scale = torch.randint(-127, 128, (cpu._HEAD_ROWS + 9, 40), dtype=torch.int8), torch.rand(cpu._HEAD_ROWS + 9)
    many = torch.randn(cpu.MANY_TOKENS_OF_A_HEAD, 40)
    few = torch.cat([cpu.int8_linear(x, codes, scale, "exact") for x in many.split(4)])
    assert (cpu.int8_linear(many, codes, scale, "exact") - few).abs().max() <= 1e-5 * few.abs().max()


@needs_kernels
def test_python_threads_agree(four_threads):
    # Inputs of their own: memory that nobody wrote may hold the results of a call before.
    multiply = cpu.Multiplication(cpu.prepare(cases.make("group", 1000, 2304).operands()), isa=KERNELS[0])
    inputs = [torch.randn(3, 2304) for _ in range(200)]
    want = [multiply(x, "int8") for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: multiply(x, "int8"), inputs))
    assert all(map(torch.equal, results, want))


@needs_kernels
@pytest.mark.parametrize("isa", KERNELS)
def test_threads_share_rows_and_tokens(isa, four_threads):
    multiply = cpu.Multiplication(cpu.prepare(cases.make("group", 200, 1024).operands()), isa=isa)
    codes, scale = torch.randint(-127, 128, (300, 1024), dtype=torch.int8), torch.rand(300)
    for tokens in (1, 3, 47, 48, 300):  # by rows below 12 a thread, by tokens from there; more than pass a head at once
        x = torch.randn(tokens, 1024)
        for mode in ("exact", "int8"):
            found = {}
            for threads in (1, 4):
                torch.set_num_threads(threads)
                head = x[:30] if mode == "exact" else x  # of more in exact torch makes floats
                found[threads] = multiply(x, mode), cpu.int8_linear(head, codes, scale, mode, isa)
            for alone, shared in zip(*found.values(), strict=True):
                assert (shared - alone).abs().max() <= 1e-5 * alone.abs().max()


@needs_kernels
def test_a_fork_while_threads_are_inside():
    code = """
import os, threading, torch
torch.set_num_threads(3)
from signbit.ops import cpu
from tests.laws import cases
multiply = cpu.Multiplication(cpu.prepare(cases.make("row", 300, 1088).operands()))
x = torch.randn(1, 1088)
want, stop = multiply(x, "int8"), threading.Event()
def work():
    while not stop.is_set():
        assert torch.equal(multiply(x, "int8"), want)
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(multiply(x, "int8"), want) else 3)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
[t.join() for t in threads]
"""
    done = in_process(code)
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_modes_dtypes_and_sizes_that_there_are_not():
    w, x = cpu.prepare(cases.make("row").operands()), torch.randn(2, 128)
    codes, scale = torch.ones(24, 128, dtype=torch.int8), torch.ones(24)
    for call in (
        lambda mode: binary_linear(x, cases.make("row").operands(), mode),
        lambda mode: int8_linear(x, codes, scale, mode),
        lambda mode: prepared_linear(x, w, mode),
        lambda mode: cpu.Multiplication(w)(x, mode),
    ):
        with pytest.raises(OptionError, match="activations are 'int4'; allowed: exact, int8"):
            call("int4")
    with pytest.raises(ShapeError, match=r"the input is torch\.float64; the kernels take torch\.float32"):
        cpu.Multiplication(w)(x.double(), "exact")
    with pytest.raises(ShapeError, match=r"not those of a matrix of shape \[48, 128\]"):
        prepared_linear(x, w._replace(shape=[48, *w.shape[1:]]))


@needs_kernels
def test_a_view_that_is_to_be_negated():
    w, x = cases.make("row").operands(), torch.randn(2, 128)
    codes, scale, negated = torch.ones(24, 128, dtype=torch.int8), torch.ones(24), torch._neg_view(x)
    assert negated.is_neg()
    assert torch.equal(cpu.binary_linear(negated, w, "exact"), cpu.binary_linear(-x, w, "exact"))
    assert torch.equal(cpu.int8_linear(negated, codes, scale, "exact"), cpu.int8_linear(-x, codes, scale, "exact"))


@needs_kernels
def test_a_forked_child_multiplies():
    # The parent's threads are not there: it needs some of its own.
    code = """
import os, torch
torch.set_num_threads(2)
from signbit.ops import cpu
from tests.laws import cases
multiply = cpu.Multiplication(cpu.prepare(cases.make("row", 300, 1088).operands()))
x = torch.randn(3, 1088)
want = multiply(x, "exact")
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    threads = lambda: len(os.listdir("/proc/self/task"))
    before = threads()
    os._exit(0 if torch.equal(multiply(x, "exact"), want) and threads() == before + 1 else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(multiply(x, "exact"), want)
"""
    done = in_process(code)
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_the_variable_names_the_instruction_set(chosen_anew, monkeypatch):
    for isa in (*KERNELS, "reference"):
        monkeypatch.setenv("SIGNBIT_CPU", isa)
        cpu.selected.cache_clear()
        choice = explain()[0]
        said = "asks for it; checked" if isa in KERNELS else "=reference asks for plain torch"
        assert choice.backend == isa and said in choice.reason
    monkeypatch.setenv("SIGNBIT_CPU", "sse9")
    cpu.selected.cache_clear()
    with pytest.raises(OptionError, match=rf"SIGNBIT_CPU is 'sse9'; this processor runs .*{KERNELS[-1]}"):
        explain()


@needs_kernels
def test_a_kernel_that_fails_its_check_is_not_chosen(chosen_anew, monkeypatch):
    monkeypatch.setenv(cpu.VARIABLE, KERNELS[0])
    monkeypatch.setattr(reference, "binary_linear", lambda x, w, mode: torch.ones(3, 40))
    name, reason = cpu.selected()
    assert name is None and "failed their check at load" in reason


@needs_kernels
@pytest.mark.parametrize(("groups", "tokens"), [(1, 3), (2, 1), (2, 3)])
def test_the_check_at_load_sees_every_way(groups, tokens, monkeypatch):
    right = cpu.binary_linear

    def wrong(x, w, mode, isa):
        fault = mode == "int8" and (w.scale.shape[2] > 1, len(x)) == (groups > 1, tokens)
        return right(x, w, mode, isa) * (1.01 if fault else 1)

    monkeypatch.setattr(cpu, "binary_linear", wrong)
    assert f", int8, {tokens} tokens: off by " in cpu.check(KERNELS[0])


def test_without_kernels_a_name_is_refused(chosen_anew, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: "built without a compiler")
    monkeypatch.setenv(cpu.VARIABLE, "avx2")
    with pytest.raises(OptionError, match="built without a compiler"):
        cpu.selected()


@needs_kernels
def test_what_the_kernels_leave_to_the_reference_has_a_reason():
    odd = cases.make("group", 24, 96).operands()
    assert "no multiple of 32" in cpu.unsupported(odd)
    assert cpu.unsupported(cases.make("group", 24, 128).operands()) is None
    x = torch.randn(2, 96)
    assert torch.equal(BACKENDS[KERNELS[0]].binary_linear(x, odd, "int8"), reference.binary_linear(x, odd, "int8"))
