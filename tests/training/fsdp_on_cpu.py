"""Runs a script with FSDP2 on CPU processes: torch can do it, accelerate only looks for FSDP on accelerators.

accelerate launch --use_fsdp --fsdp_version 2 tests/training/fsdp_on_cpu.py SCRIPT [arguments]
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

take_up_state = AcceleratorState.__init__


def take_up_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    """What AcceleratorState does for GPUs."""
    take_up_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = take_up_fsdp
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
