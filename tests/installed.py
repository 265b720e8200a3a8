"""Checks an installed signbit outside its source tree: python -m tests.installed kernels|reference [FOLDER].

It must lie in FOLDER (this environment, unless given) and multiply by the kernels of its own wheel, or by the reference
because it was built without a compiler.
"""

import sys

import torch

import signbit
from signbit.ops import native
from tests.laws import cases


def check(backend, folder):
    """Raises AssertionError where the installation is another one."""
    assert signbit.__file__.startswith(folder), f"signbit is {signbit.__file__}, not in {folder}"
    w, x = cases.make("all"), torch.randn(3, 128)
    want = x @ w.to_dense().T
    assert (signbit.PackedLinear(w)(x) - want).abs().max() <= 1e-4 * want.abs().max(), "a layer multiplies wrongly"
    found, choices = native.library(), {(c.backend, c.reason) for c in signbit.explain()}
    if backend == "kernels":
        assert not isinstance(found, str), found
        assert found.path.startswith(folder), f"the kernels are {found.path}, not in {folder}"
        assert {name for name, _ in choices} == {next(iter(found.runs))}, choices
    else:
        assert found == "this installation was built without a C++ compiler; install one and reinstall signbit", found
        assert choices == {("reference", found)}, choices
    return choices


if __name__ == "__main__":
    for choice in check(sys.argv[1], (*sys.argv[2:], sys.prefix)[0]):
        print(*choice, sep=": ")
