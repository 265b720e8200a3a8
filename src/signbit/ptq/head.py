"""The embedding and the output head in int8: at 1 bit a block, they weigh as much as all the rest."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from signbit.errors import StructureError
from signbit.linear import Int8Embedding, Int8Head
from signbit.models import Decision, Report, set_module


def embedding_multiplier(embedding: nn.Embedding) -> float:
    """The constant by which an embedding scales its rows: 1 for nn.Embedding, √hidden for Gemma's subclass.

    It is probed, with a weight of ones, so that no subclass need be known. Raises StructureError if the forward of a
    subclass is not a scaled look-up.
    """
    if type(embedding) is nn.Embedding:
        return 1.0
    ones = torch.ones(1, embedding.embedding_dim, device=embedding.weight.device)
    ids = torch.zeros(1, dtype=torch.long, device=embedding.weight.device)
    rows = torch.func.functional_call(embedding, {"weight": ones}, (ids,))
    if rows.shape != ones.shape or not torch.equal(rows, rows.flatten()[0].expand_as(rows)):
        raise StructureError(
            f"the embedding is a {type(embedding).__name__} whose forward is no scaled look-up; leave out --head int8"
        )
    return float(rows.flatten()[0])


def _find(model: nn.Module) -> tuple[nn.Embedding, str, nn.Linear, str]:
    """The token embedding and the output head of a transformers model, with their names."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or not isinstance(embedding, nn.Embedding):
        raise StructureError(
            f"--head int8 needs a token embedding and a linear head; this model has {type(embedding).__name__} "
            f"and {type(head).__name__}. Leave out --head int8"
        )
    names = {id(module): name for name, module in model.named_modules()}
    return embedding, names[id(embedding)], head, names[id(head)]


def plan_head(model: nn.Module) -> list[Decision]:
    """The decisions that `quantize_head_` would return, on a model that may be on meta; raises as it does."""
    embedding, embedding_name, head, head_name = _find(model)
    if not embedding.weight.is_meta:
        embedding_multiplier(embedding)
    # On meta, tying has not happened yet: the config's word stands for it.
    tied = head.weight is embedding.weight or bool(getattr(model.config, "tie_word_embeddings", False))

    def nbytes(weight: Tensor) -> int:
        return weight.numel() + weight.shape[0] * weight.element_size()

    bias = 0 if head.bias is None else head.bias.numel()
    first = Decision(embedding_name, "int8", "token embedding", embedding.weight.numel(), nbytes(embedding.weight))
    if tied:
        return [first, Decision(head_name, "int8", "tied to the embedding", bias)]
    return [first, Decision(head_name, "int8", "output head", head.weight.numel() + bias, nbytes(head.weight))]


def with_head(report: Report, head: list[Decision]) -> Report:
    """`report` with the decisions on embedding and head replaced by `head`."""
    done = {decision.name for decision in head}
    rest = tuple(decision for decision in report.decisions if decision.name not in done)
    return replace(report, decisions=(*rest, *head))


@torch.no_grad()
def quantize_head_(model: nn.Module) -> list[Decision]:
    """Replaces the token embedding and the output head of a transformers model by int8 layers, in place.

    A tied pair stays one tensor. Returns the decisions. Raises StructureError if there is no plain nn.Linear head.
    """
    embedding, embedding_name, head, head_name = _find(model)
    decisions = plan_head(model)
    tied = head.weight is embedding.weight
    codes, scale = Int8Embedding.quantize(embedding.weight)
    new_embedding = Int8Embedding(codes, scale, embedding_multiplier(embedding))
    new_head = Int8Head(*((codes, scale) if tied else Int8Head.quantize(head.weight)), head.bias)
    if tied:
        tie_int8(model, new_head, new_embedding, head_name, embedding_name)
    set_module(model, embedding_name, new_embedding)
    set_module(model, head_name, new_head)
    return decisions


def tie_int8(model: nn.Module, head: Int8Head, embedding: Int8Embedding, head_name: str, embedding_name: str) -> None:
    """Makes both use one weight and one scale, and tells transformers, which ties (and saves) by parameter name."""
    head.weight, head.scale = embedding.weight, embedding.scale
    tied: dict[str, str] = model.all_tied_weights_keys  # type: ignore[assignment]
    tied[f"{head_name}.weight"] = f"{embedding_name}.weight"
    tied[f"{head_name}.scale"] = f"{embedding_name}.scale"
    # Where save_pretrained looks to learn which of two equal tensors it leaves out.
    head._tied_weights_keys = {"weight": "weight", "scale": "scale"}  # type: ignore[assignment]
