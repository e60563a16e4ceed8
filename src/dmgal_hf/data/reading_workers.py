"""Workers that read videos, in the hands of the process they read for."""

import multiprocessing
import os
import signal
import threading


def obey_main_process(_worker: int):
    """
    The `worker_init_fn` of a `DataLoader` whose workers end with the process they read for, and not before it: Ctrl-C
    and the SIGTERM of `timeout`, Slurm or Kubernetes reach a whole group of processes, and the main one of them is to
    finish its step and to save a state.

    A SIGTERM of the main process itself still ends them. It sends one at its exit and then waits for each: one that
    ignored this as well would be waited for without end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, which does not say who has sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_request, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _end_on_request(main_process: int):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
