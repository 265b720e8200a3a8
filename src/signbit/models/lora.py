"""Low-rank adapters beside packed layers, through PEFT: importing this needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from signbit.errors import FormatError, OptionError
from signbit.extras import install
from signbit.linear import PackedLinear

try:
    from peft import LoraConfig, PeftConfig, set_peft_model_state_dict
    from peft.tuners.lora.layer import Linear
except ImportError as error:
    raise OptionError(f"adapters need PEFT ({error}): {install('lora')}") from error

#: What PEFT keeps an adapter's numbers in.
TENSORS = "adapter_model.safetensors"
#: Starts of an adapter that ask nothing of the base layer's weight, which is bits.
_STARTS = (True, False, "gaussian")


class PackedLora(Linear):
    """y = packed(x) + (α/r)·B(A(dropout(x))): PEFT's adapter beside a packed layer, which stays as it is.

    A [r, K] and B [N, r] are float and trained; x float [..., K], y [..., N] in its dtype; the packed layer passes on the
    gradient for its input, dx = dy · W. Source: LoRA (arXiv 2106.09685). Raises OptionError for kinds of adapters that
    change or look at the base's weight, and for merging: W + (α/r)·B·A has more than a bit a weight.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in _STARTS:
            raise OptionError(
                f"init_lora_weights is {config.init_lora_weights!r}; beside a packed layer, which has no float weight, "
                f"allowed: {', '.join(map(str, _STARTS))}"
            )
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> None:
        try:
            super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise OptionError(
                f"beside a packed layer there is plain LoRA alone ({error}); leave the variant out"
            ) from error

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, PackedLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise OptionError(
            "an adapter cannot be merged into a packed layer: the sum has more than a bit a weight. Load it beside the packed "
            "model (signbit.load_adapter), or merge it into the dense one (model.dequantize())"
        )


def _beside_packed(config: LoraConfig) -> LoraConfig:
    config._register_custom_module({PackedLinear: PackedLora})
    return config


def lora_config(model: nn.Module, **values: Any) -> LoraConfig:
    """PEFT's LoraConfig for `model`, which knows packed layers: for `model.add_adapter`, `peft.get_peft_model` or TRL.

    `values` are its own (r, lora_alpha, lora_dropout …); without `target_modules` an adapter stands beside every packed
    layer. Raises OptionError if `model` has none.
    """
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    if not packed:
        raise OptionError("the model has no packed layer; for adapters beside dense ones PEFT needs no help")
    return _beside_packed(LoraConfig(**{"target_modules": packed, "task_type": "CAUSAL_LM", **values}))


def read_lora(folder: str | Path) -> LoraConfig:
    """The configuration of a saved adapter, which knows packed layers; raises FormatError for one that is no LoRA."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{folder} holds no adapter that PEFT can read ({str(error).splitlines()[0]})") from error
    if not isinstance(config, LoraConfig):
        raise FormatError(
            f"{folder} holds an adapter of the kind {config.peft_type}; LoRA alone goes beside packed layers"
        )
    return _beside_packed(config)


def load_adapter(model: Any, folder: str | Path) -> Any:
    """Puts the adapter that is saved in `folder` beside the layers of `model`, in place; returns it in evaluation mode.

    `model.disable_adapters()` gives the base's outputs, `model.enable_adapters()` those with it. Raises FormatError for an
    adapter that is damaged, or of a model of another shape.
    """
    config = read_lora(folder)
    try:
        model.add_adapter(config)
    except ValueError as error:
        raise FormatError(f"the adapter {folder} is not of this model ({str(error).splitlines()[0]})") from error
    fill_adapter(model, folder)
    return model.requires_grad_(False).eval()


def fill_adapter(model: Any, folder: str | Path) -> None:
    """Gives the adapter of `model` the numbers saved in `folder`; raises FormatError unless there is one for each of its."""
    path = Path(folder) / TENSORS
    try:
        tensors = load_file(path)
        found = set_peft_model_state_dict(model, tensors)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} cannot be read ({error}); copy the adapter again") from error
    except RuntimeError as error:
        raise FormatError(f"{path} is not of this model: {str(error).strip().splitlines()[-1].strip()}") from error
    missing = [name for name in found.missing_keys if ".lora_" in name]
    if missing or found.unexpected_keys:
        name, what = (missing[0], "missing") if missing else (found.unexpected_keys[0], "not one of this model's")
        raise FormatError(f"{path}: the tensor {name} is {what}; it is damaged, or of another model")
