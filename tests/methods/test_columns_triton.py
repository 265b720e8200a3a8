"""The Triton kernel of the column loops against the loops, on a GPU or in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it comes with CUDA builds of torch)")

INTERPRETED = """
from tests.methods.test_columns_triton import compare, solve
for low in ("xnor", "sign", "prune", "3bit", "no"):
    for group in (-1, 8):
        compare("cpu", low, group)
solve("pbllm", columns=40)
"""


def compare(device, low, group):
    """Both ways on one matrix; single entries may differ where a value lies on the edge between two levels."""
    from signbit.methods import columns_triton, gptq
    from signbit.methods.pbllm import PbllmOptions, _Levels, salient_mask

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    factor = gptq.factorize(x.T @ x / 200, 0.01)
    w = torch.randn(13, 40, generator=generator) * 0.05
    grid = _Levels(PbllmOptions(low=low, group=group), w, salient_mask(w.abs(), 0.2, 1)).grid
    q = grid.nearest(w, slice(None))
    for descend in (False, True):
        for begin, end in ((0, 16), (32, 40)):
            block = slice(begin, end)
            matrix = (factor.hessian if descend else factor.upper)[block, block]
            source = ((q - w) @ factor.hessian if descend else w)[:, block].clone()
            wants, gots = (
                [source.clone(), q[:, block].clone()],
                [source.clone().to(device), q[:, block].clone().to(device)],
            )
            want = gptq._columns_by_torch(*wants, matrix, grid, begin, descend)
            moved = gptq.Grid(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(grid).items()})
            got = columns_triton.columns(*gots, matrix.to(device).contiguous(), moved, begin, descend)
            same = (gots[1].cpu() - wants[1]).abs().amax(dim=1) < 1e-5
            assert same.float().mean() > 0.8, (low, group, descend, begin)
            assert torch.allclose(got.cpu()[same], want[same], atol=1e-3), (low, group, descend, begin)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("group", [-1, 8])
@pytest.mark.parametrize("low", ["xnor", "sign", "prune", "3bit", "no"])
def test_on_the_gpu(low, group):
    compare("cuda", low, group)


def solve(method, columns):
    """A whole solve by the kernel is as good as one by the loops; where there is no GPU the kernel is interpreted."""
    from signbit.methods import METHODS, Moments, columns_triton, gptq
    from signbit.methods.gptq import output_error

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(10 * columns, columns) @ torch.randn(columns, columns) * 0.1
    hessian, cross = x.T @ x / len(x), torch.randn(columns, columns) * 0.01
    by_torch = gptq._columns
    for weight in (torch.randn(24, columns) * 0.05, (torch.randn(columns, 24) * 0.05).T):  # a Conv1D's is turned
        options = METHODS[method].options(salient=0.2, block=32)
        errors = []
        for place, columns_of in (("cpu", by_torch), (device, columns_triton.columns)):
            gptq._columns = columns_of
            try:
                moments = Moments(hessian.to(place), len(x), cross.to(place))
                dense = options.binarize(weight.to(place), moments).to_dense()
            finally:
                gptq._columns = by_torch
            errors.append(output_error(options.target(weight.to(place), moments), dense, moments.hessian))
        assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["pb-gptq", "pbllm"])
def test_a_whole_solve_on_the_gpu(method):
    solve(method, columns=320)


def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
