"""The layer that partially binarized training has: its weights, gradients and packed form beside the paper's formulas."""

import pytest
import torch

from signbit.errors import OptionError
from signbit.linear import PackedLinear
from signbit.methods import OnebitLinear, OnebitOptions, PbllmLinear, PbllmOptions
from signbit.methods.pbllm import two_sided_mask
from signbit.weight import BinaryWeight

RTN = {"gptq": False, "saliency": "magnitude"}


def options(**values):
    return PbllmOptions(**{**PbllmOptions.training_defaults(), **values})


def weight(n=24, k=64):
    return torch.randn(n, k) * 0.02


@pytest.mark.parametrize("saliency", ["magnitude", "quantiles"])
def test_salient_codes_turn_no_sign(saliency):
    """The published function turns half of them (methods.md 5.4)."""
    w = weight(64, 256)
    layer = PbllmLinear.start(w, None, options(salient=0.1, saliency=saliency))
    got, mask = layer.effective_weight().detach(), layer.salient
    assert torch.equal(got[mask].sign(), w[mask].sign())
    step = (w.amax(1) - w.amin(1))[:, None] / 255
    assert ((got - w).abs() <= 1.01 * step)[mask].all(), (
        "half a step, and one at an end where the zero point is rounded"
    )
    assert {-1.0, 1.0} == set(got[mask].sign().tolist())


def test_the_published_function_would_turn_half_of_them():
    """What the test above is there for: a zero point rounded from the minimum itself, and codes that wrap."""
    w = weight(64, 256)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    step, zero = (high - low) / 255, low.round()
    wrapped = (w / step).round().to(torch.int64) % 256
    published = wrapped * step + zero
    assert 0.4 < float((published.sign() != w.sign()).float().mean()) < 0.6


def test_masks_are_those_of_a_sorted_list():
    w = weight(20, 50)
    layer = PbllmLinear.start(w, None, options(salient=0.1))
    # Distinct scores: n − floor(n·(1 − share)) − 1, as the published quantizing has it.
    assert int(layer.salient.sum()) == 99
    assert w[layer.salient].abs().min() > w[~layer.salient].abs().max()
    mask = two_sided_mask(w, 0.1, 1)
    order = w.flatten().argsort()
    want = torch.zeros(1000, dtype=torch.bool)
    want[order[:50]] = want[order[-50:]] = True
    assert torch.equal(mask.flatten(), want)
    skewed = w.abs()  # where |w| and quantiles differ: the least are small ones
    assert not torch.equal(
        two_sided_mask(skewed, 0.1, 1), PbllmLinear.start(skewed, None, options(salient=0.1)).salient
    )


def test_quantiles_at_their_ends_and_in_groups():
    w = weight(4, 8)
    assert not two_sided_mask(w, 0.0, 1).any() and two_sided_mask(w, 1.0, 1).all()
    assert not two_sided_mask(w, 0.01, 1).any(), "a share of less than one entry, on which the published code fails"
    grouped = two_sided_mask(w, 0.25, 2)
    assert grouped[:, :4].sum() == grouped[:, 4:].sum() == 4
    assert torch.equal(grouped[:, :4], two_sided_mask(w[:, :4], 0.25, 1))


@pytest.mark.parametrize("scale", ["row", "matrix", "learned"])
@pytest.mark.parametrize("more", [{}, {"group": 16}, {"salient": 0.0}, {"saliency": "quantiles", "salient_bits": 5}])
def test_the_layer_packs_to_itself(scale, more):
    layer = PbllmLinear.start(weight(), torch.randn(24), options(**{"salient": 0.2, "scale": scale, **more}))
    layer.weight.data[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    assert torch.equal(layer.binary().to_dense(), layer.effective_weight())
    x = torch.randn(5, 64)
    packed = layer.pack()
    assert (packed(x) - layer(x)).abs().max() <= 1e-5 * layer(x).abs().max()
    assert (packed.weights[0].salient is None) == (more.get("salient") == 0.0)
    packed.weights[0].check()


def test_the_scales_are_the_optimal_ones():
    """α* = ‖w‖₁/n over the binarized weights: no other scale of the row, or of the matrix, is nearer."""
    w = weight()
    for scale in ("row", "matrix"):
        layer = PbllmLinear.start(w, None, options(scale=scale))
        inside = ~layer.salient
        want = torch.stack([row[at].abs().mean() for row, at in zip(w, inside, strict=True)])
        if scale == "matrix":
            want = w[inside].abs().mean().expand(24)
        got = layer.effective_weight().detach()
        assert torch.allclose(got[inside].abs(), want[:, None].expand_as(w)[inside])
        for factor in (0.98, 1.02):
            worse = torch.where(inside, got * factor, got)
            assert (w - worse).square().sum() > (w - got).square().sum()
    learned = PbllmLinear.start(w, None, options(scale="learned"))
    assert torch.allclose(learned.shift[0, 0], w[0][~learned.salient[0]].mean())


@pytest.mark.parametrize("scale", ["row", "matrix", "learned"])
def test_gradients_are_the_papers(scale):
    w = weight(6, 8)
    layer = PbllmLinear.start(w, torch.zeros(6), options(salient=0.3, scale=scale)).double()
    layer.train_parts_()
    x, out = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    (layer(x) * out).sum().backward()
    g, inside = out.T @ x, (~layer.salient).double()
    s = layer._scale().detach()
    assert torch.allclose(layer.weight.grad, g * s * inside) and not layer.weight.grad[layer.salient].any()
    assert torch.allclose(layer.bias.grad, out.sum(0))
    if scale == "learned":
        signs = torch.where(layer.weight >= 0, 1.0, -1.0).double()
        assert torch.allclose(layer.scale.grad, (g * signs * inside).sum(1, keepdim=True))
        assert torch.allclose(layer.shift.grad, (g * inside).sum(1, keepdim=True))
    else:
        assert layer.scale is None and layer.shift is None


def test_salient_weights_stay_whatever_the_optimizer_does():
    layer = PbllmLinear.start(weight(), None, options(salient=0.2))
    before = layer.effective_weight().detach()[layer.salient].clone()
    layer.weight.data.mul_(-0.5)
    assert torch.equal(layer.effective_weight()[layer.salient], before)


def ptq(w, **values):
    """A packed layer with all that a directory has: 10 % salient, scale, shift, a bias."""
    return PackedLinear(PbllmOptions(**{**RTN, "scale_over": "binarized", **values}).binarize(w), torch.randn(len(w)))


@pytest.mark.parametrize("more", [{}, {"group": 16}, {"salient_bits": 6}, {"low": "sign"}, {"salient": 0.0}])
@pytest.mark.parametrize("source", [True, False])
def test_a_packed_layer_goes_on_as_it_is(more, source):
    w = weight()
    packed = ptq(w, **more)
    stored = packed.weights[0].to_dense()
    layer = PbllmLinear.from_packed(packed, w if source else None, PbllmOptions(**{**RTN, **more}, scale="learned"))
    assert torch.equal(layer.effective_weight(), stored) and torch.equal(layer.bias, packed.bias)
    again = layer.pack().weights[0]
    assert torch.equal(again.signs, packed.weights[0].signs) and torch.equal(again.to_dense(), stored)
    shift = packed.weights[0].shift.float().repeat_interleave(64 // packed.weights[0].groups, dim=1)
    scale = packed.weights[0].scale[0].float().repeat_interleave(64 // packed.weights[0].groups, dim=1)
    want, latent = (size.abs()[~layer.salient] for size in (w - shift if source else scale, layer.weight.detach()))
    assert latent.mean() == pytest.approx(0.02, rel=1e-5)
    assert torch.allclose(latent, want * (0.02 / want.mean()), rtol=1e-5, atol=0)
    natural = PbllmOptions(**{**RTN, **more}, scale="learned", latent_size=0.0)
    layer = PbllmLinear.from_packed(packed, w if source else None, natural)
    assert torch.equal(layer.weight.abs()[~layer.salient], want) and torch.equal(layer.effective_weight(), stored)


def test_a_learned_scale_starts_alike_whatever_the_size_of_the_weights():
    """The latents' too, so that one learning rate suits; a computed scale is their size, which stays."""
    w = weight()
    one = PbllmLinear.start(w, None, options(scale="learned"))
    for factor in (0.125, 8):
        layer = PbllmLinear.start(factor * w, None, options(scale="learned"))
        assert layer.weight.detach().abs()[~layer.salient].mean() == pytest.approx(0.02, rel=1e-5)
        assert torch.allclose(layer.scale, factor * one.scale) and torch.equal(layer.weight > 0, one.weight > 0)
        assert torch.equal(PbllmLinear.start(factor * w, None, options()).weight, factor * w)
    with pytest.raises(OptionError, match="latent_size is -1"):
        options(latent_size=-1)


def test_a_sign_of_minus_one_lasts_where_the_magnitude_is_zero():
    """sign(0) is +1, and a solver may have chosen −1 there."""
    w = torch.tensor([[0.5, 0.5, -0.5, 0.5]])
    packed = PackedLinear(
        BinaryWeight.from_signs(
            torch.tensor([[-1.0, 1.0, -1.0, 1.0]]), torch.ones(1, 1, 1), shift=torch.full((1, 1), 0.5)
        )
    )
    layer = PbllmLinear.from_packed(packed, w, options(scale="learned", salient=0.0))
    assert torch.equal(layer.effective_weight(), packed.weights[0].to_dense())


def test_a_layer_without_shifts_goes_on_with_a_computed_scale():
    trained = PbllmLinear.start(weight(), torch.randn(24), options())
    layer = PbllmLinear.from_packed(trained.pack(), None, options())
    assert layer.scale is None
    assert torch.allclose(layer.effective_weight(), trained.effective_weight(), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (lambda w: ptq(w, low="4bit"), {"scale": "learned"}, "pbllm cannot hold it"),
        (lambda w: ptq(w, low="prune"), {"scale": "learned"}, "there are no signs"),
        (lambda w: ptq(w, group=16), {"scale": "learned"}, "has 4 groups a row"),
        (lambda w: ptq(w, salient_bits=4), {"scale": "learned"}, "salient codes of 4 bits"),
        (ptq, {"scale": "row"}, "--scale learned"),
        (lambda w: PbllmLinear.start(w, None, options(scale="row")).pack(), {"scale": "matrix"}, "has a scale a row"),
        (lambda w: OnebitLinear.start(w, None, OnebitOptions()).pack(), {"scale": "learned"}, "pbllm cannot hold it"),
    ],
)
def test_what_cannot_go_on_is_refused(make, values, message):
    with pytest.raises(OptionError, match=message):
        PbllmLinear.from_packed(make(weight()), None, options(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"saliency": "hessian"}, "give --masks PTQ_DIR"),
        ({"low": "sign"}, "low sign is not trained"),
        ({"group": 7}, "does not divide 64"),
    ],
)
def test_what_cannot_be_trained_is_refused(values, message):
    with pytest.raises(OptionError, match=message):
        PbllmLinear.start(weight(), None, options(**values))
    with pytest.raises(OptionError, match="scale is 'column'; allowed: row, matrix, learned"):
        options(scale="column")


def test_a_blank_layer_has_the_parts_of_one_that_is_started():
    for more in ({}, {"scale": "learned", "group": 16}, {"salient": 0.0}):
        made = PbllmLinear.start(weight(), torch.zeros(24), options(**more))
        blank = PbllmLinear.blank(weight().to("meta"), torch.zeros(24, device="meta"), options(**more))
        assert {n: (p.shape, p.dtype) for n, p in made.state_dict().items()} == {
            n: (p.shape, p.dtype) for n, p in blank.state_dict().items()
        }
    share = PbllmLinear.blank(weight(), None, options(salient=0.3)).salient.float().mean()
    assert float(share) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("scale", ["row", "learned"])
def test_compiled_whole_it_is_the_same(scale):
    layer = PbllmLinear.start(weight(), torch.randn(24), options(scale=scale, group=16))
    x = torch.randn(5, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (layer, compiled):
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
        if run is layer:
            want, of = y.detach(), grads
    assert torch.allclose(y, want) and all(torch.allclose(grads[name], grad) for name, grad in of.items())
