"""signbit with accelerate's FSDP2 on CPUs: torch shards there too, only accelerate's choice of an engine leaves it out."""

import sys

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from signbit.cli import main

_choose = AcceleratorState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _choose(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type is DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if self.distributed_type is DistributedType.MULTI_CPU and getattr(self, "fsdp_plugin", None) is not None:
        self.distributed_type = DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = _with_fsdp
    status = main()
    if torch.distributed.is_initialized():  # at the interpreter's end gloo's threads may abort the process
        torch.distributed.destroy_process_group()
    sys.exit(status)
