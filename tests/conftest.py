import multiprocessing
import os

# Before anything imports a library: no chatter, and processes that share the cores.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

# What the processes of a forkserver start with: to import it takes longer than most of what they do.
multiprocessing.set_forkserver_preload(["dmgal_hf.training.training"])


@pytest.fixture(autouse=True)
def usual_priority():
    """Where root runs it, the SVT-AV1 encoder makes its caller a real-time thread, and all others on a core wait."""
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
