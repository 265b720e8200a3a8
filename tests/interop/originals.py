"""The layers of the original programs, from their formulas, and their checkpoints as those programs write them.

Nothing here uses signbit: it is what the importers are held against. A reference model is transformers' own LLaMA, which
is what all of them build on, with the linear layers of its blocks replaced.
"""

import json

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_latents(rows, columns):
    """Latents of which none is near 0, so that no sign depends on rounding."""
    return torch.randn(rows, columns) + torch.randn(rows, columns).sign() * 0.01


class Fbi(nn.Module):
    """FBI-LLM: W̃ᵢⱼ = αⱼ·sgn(Wᵢⱼ) + βⱼ, sgn(0) = 0; α and β by column, row, or single."""

    def __init__(self, rows, columns, pattern="column"):
        super().__init__()
        shape = {"column": (1, columns), "row": (rows, 1), "single": ()}[pattern]
        self.weight = nn.Parameter(random_latents(rows, columns) * 0.02)
        self.wscale = nn.Parameter(0.05 * torch.randn(shape))
        self.wbias = nn.Parameter(0.01 * torch.randn(shape))

    def forward(self, x):
        return linear(x, self.wscale * self.weight.sign() + self.wbias)


class OneBit(nn.Module):
    """OneBit: y = LN(((x ∘ g) sgn(W)ᵀ) ∘ h), LN without affine part; sgn(0) = 0 while it trains."""

    def __init__(self, rows, columns):
        super().__init__()
        self.weight = nn.Parameter(0.01 * random_latents(rows, columns).sign())
        self.weight_scale = nn.Parameter(torch.randn(rows))
        self.input_factor = nn.Parameter(torch.randn(columns))

    def forward(self, x):
        return layer_norm(
            linear(x * self.input_factor, self.weight.sign()) * self.weight_scale, self.weight_scale.shape
        )


def onebit_bytes(weight):
    """int8 [N, K/8]: bit t of byte k is 1 where column 8k + t is negative; a byte above 127 wraps."""
    negative = (weight < 0).reshape(len(weight), -1, 8).to(torch.int64)
    byte = sum(negative[:, :, t] * 2**t for t in range(8))
    return torch.where(byte > 127, byte - 256, byte).to(torch.int8)


class Beomi(nn.Module):
    """BitNet-Transformers: V = q·mean q, z = sgn(V − mean V) x, y = clamp(128·z/(max|z| + ε)) over the whole batch."""

    def __init__(self, rows, columns):
        super().__init__()
        self.register_buffer("quantized_weights", random_latents(rows, columns).sign().to(torch.int8))

    def forward(self, x):
        q = self.quantized_weights.float()
        v = q * q.mean()
        z = linear(x, (v - v.mean()).sign())
        limit = 128 - 1e-5
        return (z * 128 / (z.abs().max() + 1e-5)).clamp(-limit, limit)


class Ternary(nn.Module):
    """transformers' BitLinear: y = T·round(127·u/a)·(a/127)·s with u the input or its RMSNorm, a = max|u| of a token."""

    def __init__(self, rows, columns, norm=False):
        super().__init__()
        self.ternary = torch.randint(-1, 2, (rows, columns))
        self.scale = float(0.01 + 0.05 * torch.rand(()))
        self.norm = 0.5 + torch.rand(columns) if norm else None

    def forward(self, x):
        if self.norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.norm
        a = x.abs().amax(-1, keepdim=True).clamp_min(1e-5)
        return linear((x * (127 / a)).round().clamp(-128, 127), self.ternary.float()) * (a / 127) * self.scale


def ternary_bytes(ternary):
    """uint8 [N/4, K]: row r + i·N/4 lies in bits 2i and 2i + 1 of byte row r, one more than its value."""
    quarter = len(ternary) // 4
    codes = (ternary + 1).to(torch.uint8)
    return sum(codes[i * quarter : (i + 1) * quarter] << 2 * i for i in range(4))


def replaced(model, make):
    """`model` with `make(rows, columns)` in the place of each linear of its blocks."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if name in LINEARS:
                    setattr(part, name, make(child.out_features, child.in_features))
    return model.eval()


def linears(model):
    """(name, layer) of the linears of the blocks."""
    return [(n, m) for n, m in model.named_modules() if n.startswith("model.layers.") and n.endswith(LINEARS)]


def write(folder, tensors, config, kind="safetensors", shards=1, **changes):
    """A directory of `tensors` with its config.json, as save_pretrained of the time left it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    values = {**config.to_dict(), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    parts = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}.{kind}" if shards == 1 else f"{stem}-{number:05}-of-{shards:05}.{kind}"
        chosen = {name: tensors[name] for name in part}
        if kind == "safetensors":
            save_file(chosen, folder / file)
        else:
            torch.save(chosen, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
