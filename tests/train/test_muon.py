"""Muon beside torch's own, matrix by matrix, and several optimizers as one."""

import pytest
import torch
from torch import nn

from signbit.errors import OptionError
from signbit.methods import METHODS
from signbit.ptq import Plan
from signbit.train import Muon, Together, Trained, TrainOptions, latents, orthogonalized, start_training_
from signbit.train.trainer import muon_beside_adam
from tests import families


def test_singular_values_come_near_one():
    for shape in ((3, 12, 20), (2, 20, 12)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)).float())
        assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
def test_steps_are_torchs():
    shapes = [(6, 10), (12, 5), (6, 10), (8, 8)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    one = Muon(ours, lr=0.01)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in ours]
        one.step()
        other.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            # torch's iterates in bfloat16, which is what may differ.
            assert (a - b).abs().max() <= 0.05 * (a - old).abs().max()
            assert 0.5 * 0.2 * 0.01 < (a - old).square().mean().sqrt() < 1.3 * 0.2 * 0.01
            b.data.copy_(a.data)


def test_other_shapes_than_matrices_are_refused():
    with pytest.raises(OptionError, match=r"not a tensor of shape \[3\]"):
        Muon([nn.Parameter(torch.randn(3))])


def test_together_is_its_parts_and_their_state_comes_back():
    def make():
        torch.manual_seed(1)
        matrix, vector = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))
        return matrix, vector, Together([Muon([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.1)], max_norm=1.0)

    def train(parts, steps):
        matrix, vector, optimizer = parts
        for step in range(steps):
            matrix.grad, vector.grad = torch.full_like(matrix, 1.0 + step), torch.full_like(vector, 100.0)
            norm = torch.stack([matrix.grad.norm(), vector.grad.norm()]).norm()
            optimizer.step()
            assert torch.allclose(optimizer.grad_norm, norm), "of all gradients, before the cut"
            assert float(vector.grad.norm()) == pytest.approx(1.0), "cut"
            optimizer.zero_grad()
            assert matrix.grad is None

    whole, half = make(), make()
    train(whole, 4)
    train(half, 2)
    again = make()
    with torch.no_grad():
        again[0].copy_(half[0])
        again[1].copy_(half[1])
    again[2].load_state_dict(half[2].state_dict())
    for group in again[2].param_groups:
        assert group["lr"] == 0.1
    train(again, 2)
    # The matrix's gradients depend on the step, which begins anew; only the vector must agree.
    assert torch.equal(again[1], whole[1])
    again[2].param_groups[0]["lr"] = 0.5
    assert again[2].optimizers[0].param_groups[0]["lr"] == 0.5, "a schedule reaches the parts"


def test_latents_are_muons_and_the_rest_is_adams():
    """With the settings of the run, against each optimizer by itself; gradients of AdamW's parameters alone are cut."""
    model = families.llama()
    start_training_(model, METHODS["onebit"], Plan(METHODS["onebit"].options()), Trained(train_embeddings=True))
    options = TrainOptions(learning_rate=0.02, beta1=0.7, beta2=0.8, weight_decay=0.3, max_grad_norm=0.5)
    optimizer = muon_beside_adam(model, options)
    matrices = latents(model)
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not matrix for matrix in matrices)]
    assert len(matrices) == 14 and len(rest) == 28 + 5 + 2
    copies = [[nn.Parameter(p.detach().clone()) for p in some] for some in (matrices, rest)]
    alone = Muon(copies[0], lr=0.02), torch.optim.AdamW(copies[1], lr=0.02, betas=(0.7, 0.8), weight_decay=0.3)
    for size in (1e-4, 1.0):
        for ours, theirs in zip([*matrices, *rest], [*copies[0], *copies[1]], strict=True):
            ours.grad = size * torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        nn.utils.clip_grad_norm_(copies[1], 0.5)
        for some in (optimizer, *alone):
            some.step()
    for ours, theirs in zip([*matrices, *rest], [*copies[0], *copies[1]], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_torch_without_muon_is_told(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    with pytest.raises(OptionError, match=r"muon needs torch 2\.9 or newer, this is 2\.8\.0; use --optim adamw_torch"):
        TrainOptions()
    TrainOptions(optim="adamw_torch")
