"""Two processes: divided blocks hold half of their parameters each, and compute what they did."""

import torch
from torch import nn

from signbit.train.divided import divide_, is_divided, local

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)) for _ in range(2)).requires_grad_(False)
    x = torch.randn(3, 16)
    want = blocks[1](blocks[0](x))
    entries = sum(parameter.numel() for parameter in blocks.parameters())
    divide_(blocks)
    assert all(map(is_divided, blocks.parameters()))
    for _ in range(2):
        assert torch.equal(blocks[1](blocks[0](x)), want)
        assert sum(local(parameter).numel() for parameter in blocks.parameters()) == entries // 2
    torch.distributed.destroy_process_group()
