"""Running statistics of batch norms in training: the same on all processes, and untouched by steps left out."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchStatistics:
    """
    Every process sees its own episodes, so its batch norms gather statistics of their own. Averaged once a step they
    hold all episodes, every process validates the same model, and no broadcast before every forward pass is needed.
    As each of N processes then makes one of N updates, an update weighs as much as N of one process.

    `model` is as accelerate has prepared it.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self.accelerator = accelerator
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        if accelerator.num_processes > 1:  # one process keeps its momentum to the last bit
            for norm in norms:
                norm.momentum = 1 - (1 - norm.momentum) ** accelerator.num_processes
        self.buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self.kept = self._flat()

    def average(self):
        """Averages over the processes and keeps the result."""
        self.kept = self._flat()
        if self.kept is not None and self.accelerator.num_processes > 1:
            self.kept = self.accelerator.reduce(self.kept, "mean")
            self.restore()

    @torch.no_grad()
    def restore(self):
        """Back to what was kept: a forward pass that was not finite has spoilt them."""
        if self.kept is not None:
            parts = self.kept.split([buffer.numel() for buffer in self.buffers])
            torch._foreach_copy_(self.buffers, list(parts))

    def _flat(self) -> torch.Tensor | None:
        return torch.cat([buffer.flatten() for buffer in self.buffers]) if self.buffers else None
