"""PB-LLM's quantizers against loops written from methods.md 1.5."""

import pytest
import torch

from signbit.errors import OptionError
from signbit.methods import PbllmOptions
from signbit.methods.pbllm import row_codes, salient_mask

RTN = {"gptq": False, "saliency": "magnitude", "scale_dtype": "float32"}


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("groups", [1, 4])
def test_salient_count_is_the_published_one(share, groups):
    w = torch.randn(30, 64)
    mask = salient_mask(w.abs(), share, groups)
    n = w.numel() // groups
    expected = n - int(n * (1 - share)) - 1
    assert mask.reshape(30, groups, -1).sum((0, 2)).tolist() == [expected] * groups
    block = w.abs().reshape(30, groups, -1)[:, 0]
    inside = mask.reshape(30, groups, -1)[:, 0]
    assert block[inside].min() > block[~inside].max()


def test_shares_of_none_and_all():
    w = torch.randn(4, 8)
    assert not salient_mask(w.abs(), 0, 1).any()
    assert salient_mask(w.abs(), 1, 1).all()
    assert PbllmOptions(**RTN, salient=0).binarize(w).salient is None
    everything = PbllmOptions(**RTN, salient=1).binarize(w)
    assert everything.salient.count == 32
    assert (everything.to_dense() - w).abs().max() < 0.02


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_a_row(bits):
    w = torch.randn(5, 40)
    w[0] = w[0].abs() + 1  # a row without a negative value: the range still includes 0
    w[1] = 0
    step, zero = row_codes(w, bits, "float32")
    top = 2**bits - 1
    for i, row in enumerate(w.tolist()):
        low, high = min(0.0, *row), max(0.0, *row)
        s = (high - low) / top
        assert step[i].item() == pytest.approx(s or 1)
        assert int(zero[i]) == (round(-low / s) if s else 0)
    stored = PbllmOptions(**RTN, salient=1, salient_bits=bits).binarize(w).to_dense()
    for i, row in enumerate(w.tolist()):
        s, z = step[i].item(), int(zero[i])
        want = [s * (min(max(round(x / s) + z, 0), top) - z) for x in row]
        apart = [abs(a - b) > 1e-5 for a, b in zip(stored[i].tolist(), want, strict=True)]
        assert sum(apart) <= 1, "rounding of a near tie apart"


@pytest.mark.parametrize("over", ["binarized", "all"])
@pytest.mark.parametrize("group", [-1, 16])
def test_xnor_masked_and_as_published(over, group):
    w = torch.randn(6, 32)
    packed = PbllmOptions(**RTN, salient=0.25, scale_over=over, group=group).binarize(w)
    width = 32 if group == -1 else group
    mask = ~salient_mask(w.abs(), 0.25, 32 // width)
    dense = packed.to_dense()
    for i in range(6):
        for g in range(32 // width):
            cols = range(g * width, (g + 1) * width)
            inside = [w[i, j].item() for j in cols if mask[i, j]]
            if over == "binarized":
                mu = sum(inside) / len(inside)
                s = sum(abs(x - mu) for x in inside) / len(inside)
            else:
                zeroed = inside + [0.0] * (width - len(inside))
                mu = sum(zeroed) / width
                s = sum(abs(x - mu) for x in zeroed) / width
            for j in cols:
                if mask[i, j]:
                    want = mu + (s if w[i, j] >= mu else -s)
                    assert dense[i, j].item() == pytest.approx(want, abs=1e-5)


def test_the_masked_scale_has_the_lower_weight_error():
    w = torch.randn(64, 256)
    errors = {}
    for over in ("binarized", "all"):
        dense = PbllmOptions(**RTN, salient=0.5, scale_over=over).binarize(w).to_dense()
        low = ~salient_mask(w.abs(), 0.5, 1)
        errors[over] = (dense - w)[low].square().sum()
    assert errors["all"] > 1.3 * errors["binarized"]


def test_sign_is_zero_or_s():
    w = torch.randn(3, 16)
    dense = PbllmOptions(**RTN, low="sign", salient=0).binarize(w).to_dense()
    s = w.clamp_min(0).mean(1, keepdim=True)
    assert torch.allclose(dense, torch.where(w > 0, s, 0.0), atol=1e-6)


def test_prune_keeps_the_salient_alone():
    w = torch.randn(8, 64)
    packed = PbllmOptions(**RTN, low="prune", salient=0.5).binarize(w)
    mask = salient_mask(w.abs(), 0.5, 1)
    assert not packed.to_dense()[~mask].any()
    assert (packed.to_dense() - w)[mask].abs().max() < 0.02


@pytest.mark.parametrize(("low", "levels"), [("2bit", 4), ("3bit", 8), ("4bit", 16)])
def test_uniform_codes_are_planes_and_a_shift_exactly(low, levels):
    w = torch.randn(7, 200)
    packed = PbllmOptions(**RTN, low=low, salient=0).binarize(w)
    assert packed.planes == {"2bit": 2, "3bit": 3, "4bit": 4}[low]
    for i in range(7):
        row = w[i]
        lo, hi = min(0.0, row.min().item()), max(0.0, row.max().item())
        s = (hi - lo) / (levels - 1)
        z = round(-lo / s)
        want = s * ((row / s).round().add(z).clamp(0, levels - 1) - z)
        assert torch.allclose(packed.to_dense()[i], want, atol=s * 1e-4)
        assert len(set(packed.to_dense()[i].mul(1e4).round().tolist())) <= levels


def test_true_bits_are_counted_and_not_the_formula():
    w = torch.randn(256, 2048)
    ten = PbllmOptions(gptq=False, saliency="magnitude", salient=0.1).binarize(w)
    assert ten.salient.counts is not None, "offsets are smaller at 10 %"
    assert 2.6 < ten.bits_per_weight < 2.68
    thirty = PbllmOptions(gptq=False, saliency="magnitude", salient=0.3).binarize(w)
    assert thirty.salient.counts is None, "a bitmap is smaller at 30 %"
    assert 4.4 < thirty.bits_per_weight < 4.45
    four = PbllmOptions(gptq=False, saliency="magnitude", salient=0.1, salient_bits=4).binarize(w)
    assert 2.2 < four.bits_per_weight < 2.28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**RTN, "salient": 1.5}, "share from 0 to 1"),
        ({**RTN, "salient_bits": 9}, "1 to 8"),
        ({**RTN, "low": "5bit"}, "allowed: xnor, sign, prune, 2bit, 3bit, 4bit, no"),
        ({**RTN, "scale_over": "masked"}, "allowed: binarized, all"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        PbllmOptions(**options)


@pytest.mark.parametrize("options", [{}, {"gptq": False}, {"saliency": "magnitude"}])
def test_what_needs_calibration_says_so(options):
    with pytest.raises(OptionError, match=r"need calibration text.*--no-gptq --saliency magnitude"):
        PbllmOptions(**options).binarize(torch.randn(4, 8))
