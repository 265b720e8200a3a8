"""What a loss looks at in a model's forward pass: hidden states, and how logits are made of the last ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from signbit.errors import StructureError
from signbit.linear import BinaryLinear
from signbit.models.structure import find_blocks
from signbit.train.objectives import Head


class States:
    """The hidden states of a model's forward pass, noted by hooks around its blocks.

    As `output_hidden_states` gives them, which puts hooks inside the blocks as well, and so cuts what torch.compile makes
    of one into pieces. `blocks` are the inputs of the blocks, the embeddings' output first; `last` is what the head is
    given, behind the final norm.
    """

    def __init__(self, model: Any) -> None:
        self.blocks: list[Tensor] = []
        self.last: Tensor | None = None
        self._listening = False
        name, blocks = find_blocks(model)
        for block in blocks:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.get_submodule(name.rpartition(".")[0]).register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._listening:  # and not in the second pass of gradient checkpointing
            self.blocks.append(arguments[0] if arguments else named["hidden_states"])

    def _leave(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if self._listening:
            self.last = output.last_hidden_state

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes the states of the forward pass inside."""
        self.blocks, self.last, self._listening = [], None, True
        try:
            with one_sequence_a_row():
                yield
        finally:
            self._listening = False

    def take(self) -> tuple[list[Tensor], Tensor]:
        """What was noted: inputs of the blocks and the head's; nothing is kept here."""
        blocks, last = self.blocks, self.last
        self.blocks, self.last = [], None
        assert last is not None
        return blocks, last


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Keeps transformers from looking at positions and masks on the GPU for what blocks of text do not have.

    It looks for several sequences in a row, and waits for the GPU to see what it finds, twice a step, in which nothing is
    launched meanwhile; and where a CUDA graph is captured it makes a mask, with which attention is several times slower.
    """
    replaced = {"find_packed_sequence_indices": lambda positions: None, "is_tracing": lambda *tensors: False}
    before = {name: getattr(masking_utils, name) for name in replaced if hasattr(masking_utils, name)}
    for name in before:
        setattr(masking_utils, name, replaced[name])
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(masking_utils, name, function)


def weight_of(head: nn.Linear | BinaryLinear) -> Tensor:
    """What an output head multiplies by, [N, K]; a binary one's W̃ as its latents are now."""
    return head.effective_weight() if isinstance(head, BinaryLinear) else head.weight


def head_of(model: Any, states: States) -> Head:
    """How `model` makes logits of its last hidden states, checked on a few tokens; a binary head's weight is W̃.

    Raises StructureError where its output is something else than a head on those states.
    """
    module, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(module, (nn.Linear, BinaryLinear)):
        raise StructureError(f"{type(model).__name__} has no plain linear output head, which distillation needs")
    if isinstance(module, BinaryLinear):
        packed = module.pack()
        if packed.act_bits or (packed.norm_in, packed.norm_out) != ("none", "none"):
            raise StructureError(
                "a binary head is a product with its matrix and nothing else, and this method's layers have norms or "
                "quantized activations; leave out --head binary, or use --method pbllm"
            )
    multiplier = 1.0
    if getattr(config, "logit_scale", None) is not None:
        multiplier = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:
        multiplier = 1 / float(config.logits_scaling)
    with torch.no_grad():
        weight = weight_of(module)
    head = Head(weight, module.bias, multiplier, getattr(config, "final_logit_softcapping", None))
    was_training = model.training
    model.eval()
    with torch.no_grad(), states.listening():
        want = model(input_ids=torch.arange(1, 5, device=module.weight.device)[None], use_cache=False).logits[0].float()
    _, last = states.take()
    model.train(was_training)
    got = head(last[0])
    if got.shape != want.shape or not bool((got - want).abs().max() <= 0.02 * want.abs().max()):
        raise StructureError(
            f"{type(model).__name__} does not make its logits from its last hidden states in a way that is known here"
        )
    return head
