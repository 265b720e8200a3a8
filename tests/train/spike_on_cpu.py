"""signbit whose loss spikes at its tenth step, unless chunk 2 of its data is left out; with FSDP2 on CPUs where asked for."""

import os
import sys

from accelerate.state import AcceleratorState

from signbit.cli import main
from signbit.train import DistillTrainer
from tests.train.fsdp_on_cpu import _with_fsdp

_step = DistillTrainer.training_step


def _spiking(self, *given):
    loss = _step(self, *given)
    return 10 * loss if self.state.global_step == 9 and 2 not in self.skipped else loss


if __name__ == "__main__":
    DistillTrainer.training_step = _spiking
    if "ACCELERATE_USE_FSDP" in os.environ:
        AcceleratorState.__init__ = _with_fsdp
    sys.exit(main())
