"""Seeded kernel bugs: each must break a law, and the honest backend none."""

import pytest
import torch

from signbit.ops import BACKENDS
from signbit.ops.dispatch import Backend
from tests.laws import cases, laws

HONEST = BACKENDS["reference"]


def negated_row(x, w, mode):
    y = HONEST.binary_linear(x, w, mode).clone()
    y[..., w.signs.shape[1] // 2] *= -1
    return y


def unwritten_row(x, w, mode):
    y = HONEST.binary_linear(x, w, mode)
    out = torch.empty_like(y)
    out[..., :-1] = y[..., :-1]
    return out


def one_wrong_bit(x, w, mode):
    signs = w.signs.clone()
    signs[-1, 3, 1] ^= 1 << 4
    return HONEST.binary_linear(x, w._replace(signs=signs), mode)


def reversed_bits(x, w, mode):
    signs = torch.zeros_like(w.signs)
    for bit in range(8):
        signs |= (w.signs >> bit & 1) << (7 - bit)
    return HONEST.binary_linear(x, w._replace(signs=signs), mode)


def skipped_last_byte(x, w, mode):
    x = x.clone()
    x[..., (w.in_features - 1) // 8 * 8 :] = 0
    return HONEST.binary_linear(x, w, mode)


def scale_off_by_one_percent(x, w, mode):
    return HONEST.binary_linear(x, w._replace(scale=w.scale.float() * 1.01), mode)


def swapped_groups(x, w, mode):
    return HONEST.binary_linear(x, w._replace(scale=w.scale.flip(-1)), mode)


def shift_forgotten(x, w, mode):
    return HONEST.binary_linear(x, w._replace(shift=None), mode)


def salient_added_not_replaced(x, w, mode):
    empty = w._replace(salient_codes=None)
    only = w._replace(scale=torch.zeros_like(w.scale), shift=None)
    return HONEST.binary_linear(x, empty, mode) + HONEST.binary_linear(x, only, mode)


FAULTS = {
    negated_row: "row",
    unwritten_row: "row",
    one_wrong_bit: "row",
    reversed_bits: "row",
    skipped_last_byte: "group",
    scale_off_by_one_percent: "row",
    swapped_groups: "group",
    shift_forgotten: "shift",
    salient_added_not_replaced: "salient_bitmap",
}


def broken_laws(backend, kind, dtype):
    w = cases.make(kind)
    broken = []
    for law in (laws.law_identity, laws.law_random, laws.law_int8, laws.law_shapes):
        try:
            law(backend, w, dtype)
        except AssertionError:
            broken.append(law.__name__)
    return broken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_breaks_a_law(fault, dtype):
    faulty = Backend("faulty", fault, HONEST.int8_linear)
    broken = broken_laws(faulty, FAULTS[fault], dtype)
    assert "law_identity" in broken
    assert {"law_random", "law_int8"} & set(broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", sorted(set(FAULTS.values())))
@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.device != "cuda"])
def test_an_honest_backend_breaks_none(name, kind, dtype):
    assert broken_laws(BACKENDS[name], kind, dtype) == []


def test_rounding_away_from_even_breaks_the_int8_law():
    def half_up(x, w, mode):
        if mode == "exact":
            return HONEST.binary_linear(x, w, mode)
        a = x.float().abs().amax(-1, keepdim=True)
        q = torch.floor(127 * x.float() / a + 0.5)
        signs = cases.bits_to_signs(w)
        return (q @ signs.T * (w.scale[0, :, 0].float() * a / 127)).to(x.dtype)

    with pytest.raises(AssertionError):
        laws.law_int8_ties(Backend("faulty", half_up, HONEST.int8_linear))
    for backend in BACKENDS.values():
        if backend.device != "cuda":
            laws.law_int8_ties(backend)
