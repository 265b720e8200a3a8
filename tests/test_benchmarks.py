"""That benchmarks time nothing which is wrong."""

import pytest
import torch
from benchmarks import kernels_cpu, kernels_cuda

from signbit.ops import cpu, cuda
from signbit.weight import BinaryWeight


def two_matrices(device):
    with torch.device(device):
        return [BinaryWeight.from_signs(torch.randn(64, 256), torch.rand(1, 64, 1) + 0.1) for _ in range(2)]


@pytest.mark.skipif(cpu.selected()[0] is None, reason="no kernels for this CPU")
def test_a_wrong_product_on_the_cpu_ends_the_run():
    (isa, _), (right, wrong), x = cpu.selected(), two_matrices("cpu"), torch.randn(3, 256)
    kernels_cpu.check(right, cpu.prepare(right.operands()), isa, x)
    with pytest.raises(SystemExit, match="off the reference; nothing is timed"):
        kernels_cpu.check(right, cpu.prepare(wrong.operands()), isa, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_wrong_product_on_the_gpu_ends_the_run():
    right, wrong = two_matrices("cuda")
    kernels_cuda.check(right, cuda.Multiplication(cuda.prepare(right.operands())), 3, torch.bfloat16)
    with pytest.raises(SystemExit, match="off the reference; nothing is timed"):
        kernels_cuda.check(right, cuda.Multiplication(cuda.prepare(wrong.operands())), 3, torch.bfloat16)
