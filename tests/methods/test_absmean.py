import pytest
import torch

from signbit.errors import OptionError
from signbit.methods import METHODS, AbsmeanLinear, AbsmeanOptions
from signbit.methods.base import find_method, make_options


def test_the_scale_is_the_mean_magnitude_of_each_group():
    weight = torch.tensor([[1.0, -3.0, 0.0, 4.0], [-1.0, -1.0, 2.0, 2.0]])
    w = AbsmeanOptions(group=2).binarize(weight)
    assert w.scale.tolist() == [[[2.0, 2.0], [1.0, 2.0]]]
    assert w.to_dense().tolist() == [[2, -2, 2, 2], [-1, -1, 2, 2]]
    assert AbsmeanOptions().binarize(weight).scale.tolist() == [[[2.0], [1.5]]]


def test_no_other_scale_has_a_lower_squared_error():
    weight = torch.randn(8, 64)
    w = AbsmeanOptions(group=16, scale_dtype="float32").binarize(weight)
    best = (w.to_dense() - weight).square().sum()
    for factor in (0.97, 1.03):
        other = (w.to_dense() * factor - weight).square().sum()
        assert other > best


@pytest.mark.parametrize("group", [-1, 8])
def test_the_layer_that_is_trained_starts_as_the_binarized_matrix(group):
    weight, options = torch.randn(6, 24), AbsmeanOptions(group=group, scale_dtype="float32")
    layer = AbsmeanLinear.start(weight, None, options)
    assert torch.equal(layer.effective_weight(), options.binarize(weight).to_dense())
    assert torch.equal(layer.binary().to_dense(), layer.effective_weight())


def test_true_bits():
    assert AbsmeanOptions(group=64).binarize(torch.randn(16, 576)).bits_per_weight == 1.25
    assert AbsmeanOptions().binarize(torch.randn(16, 576)).bits_per_weight == 1 + 16 / 576


@pytest.mark.parametrize(
    ("group", "message"),
    [(128, r"does not divide 576; use one of 32, 48, 64, 72, 96, 144, 192"), (0, "does not divide"), (-2, "does not")],
)
def test_group_errors_name_the_divisors(group, message):
    with pytest.raises(OptionError, match=message):
        AbsmeanOptions(group=group).binarize(torch.randn(4, 576))
    with pytest.raises(OptionError, match=r"use one of 2, 4, 43, 86, 172"):
        AbsmeanOptions(group=64).check(172)


def test_unknown_methods_and_options():
    with pytest.raises(
        OptionError,
        match=r"there is no method 'absmeen'; there are absmean, bitnet, .*onebit, pbllm, pb-gptq \(did you mean absmean",
    ):
        find_method(METHODS, "absmeen")
    with pytest.raises(OptionError, match=r"'groups' is no option of the method absmean; it has group, scale_dtype"):
        make_options(METHODS, "absmean", {"groups": 3})
    with pytest.raises(OptionError, match="scale_dtype is 'int8'; allowed: float16"):
        AbsmeanOptions(scale_dtype="int8")
