"""What the additions and multiplications of a model's matrix products cost in energy: the BitNet paper's model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: pJ of an addition and of a multiplication, by number format and process in nm. Source: BitNet (arXiv 2310.11453), table 1,
#: after Horowitz (ISSCC 2014) and Zhang et al. (2022).
PICOJOULES: dict[tuple[str, int], tuple[float, float]] = {
    ("fp32", 45): (0.9, 3.7),
    ("fp32", 7): (0.38, 1.31),
    ("fp16", 45): (0.4, 1.1),
    ("fp16", 7): (0.16, 0.34),
    ("int8", 45): (0.03, 0.2),
    ("int8", 7): (0.007, 0.07),
}
FORMS = ("fp32", "fp16", "BitNet")


@dataclass(frozen=True)
class Products:
    """The matrix products of a model: its linears, and what attention multiplies beside them."""

    linears: tuple[tuple[int, int], ...]
    """(out_features, in_features) of every linear."""
    attention_width: int
    """Blocks × heads × width of a head."""

    @classmethod
    def of_paper(cls, hidden: int, blocks: int) -> Products:
        """The paper's transformer: four attention matrices of `hidden`², and an MLP of two, four times as wide."""
        block = (*((hidden, hidden),) * 4, (4 * hidden, hidden), (hidden, 4 * hidden))
        return cls(block * blocks, hidden * blocks)


#: The paper's models of its table of energies.
PAPER = {
    "6.7B": Products.of_paper(4096, 32),
    "13B": Products.of_paper(5120, 40),
    "30B": Products.of_paper(7168, 48),
}


@dataclass(frozen=True)
class Energy:
    """Energy of the products over one text, in J."""

    form: str
    """fp32, fp16, or BitNet: signs times int8 activations, and attention in fp16."""
    process_nm: int
    multiplications_j: float
    additions_j: float


def energy(products: Products, tokens: int = 512) -> list[Energy]:
    """What a text of `tokens` costs in each form and process; embedding, head, norms and softmax are not counted.

    A product of [m, n] and [n, p] takes E_add = m(n − 1)p·ê_add and E_mul = mnp·ê_mul; by BitNet's signs E_add with the ê
    of int8, and for the scales E_mul = (mp + mn)·ê_mul with that of fp16. Attention's two products are [m, d]·[d, m] and
    [m, m]·[m, d] a head. Source: BitNet (arXiv 2310.11453), equations 15 to 17 and table 1.
    """
    rows = []
    for process in (45, 7):
        for form in FORMS:
            dense = "fp16" if form == "BitNet" else form
            add, multiply = PICOJOULES[dense, process]
            by_signs = PICOJOULES["int8", process][0]
            multiplied = added = 0.0
            for out, into in products.linears:
                if form == "BitNet":
                    added += tokens * (into - 1) * out * by_signs
                    multiplied += (tokens * out + tokens * into) * multiply
                else:
                    added += tokens * (into - 1) * out * add
                    multiplied += tokens * into * out * multiply
            products_of_attention = 2 * tokens**2 * products.attention_width
            rows.append(
                Energy(
                    form, process, 1e-12 * (multiplied + products_of_attention * multiply),
                    1e-12 * (added + products_of_attention * add),
                )
            )  # fmt: skip
    return rows


def linears_of(shapes: Iterable[tuple[int, int]], config: object) -> Products:
    """The products of a model with linears of these shapes (out, in) and a transformers configuration."""
    heads, hidden = getattr(config, "num_attention_heads", 1), getattr(config, "hidden_size", 0)
    width = getattr(config, "head_dim", None) or hidden // heads
    return Products(tuple(shapes), getattr(config, "num_hidden_layers", 1) * heads * width)
