"""What of torch.cuda a capture needs, on the CPU: a graph reads and writes the memory it was captured with."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


class Slot:
    """A tensor that an operation of the graph made."""

    def __init__(self, number):
        self.number = number


class Recording(TorchDispatchMode):
    """Operations and the memory they read, to be run again whatever has become of the modules that called them."""

    def __init__(self):
        super().__init__()
        self.operations, self.slots, self.alive, self.outputs = [], {}, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def seen(tensor):  # of one from outside only its memory: it may be given another
            return self.slots[id(tensor)] if id(tensor) in self.slots else tensor.detach()

        read = tree_map_only(torch.Tensor, seen, (args, kwargs or {}))
        results = func(*args, **(kwargs or {}))
        made = [one for one in tree_flatten(results)[0] if torch.is_tensor(one)]
        outside = [one for one in tree_flatten((args, kwargs or {}))[0] if torch.is_tensor(one)]
        for one in made:
            if id(one) not in map(id, outside):  # else it was changed in place
                self.slots[id(one)] = Slot(len(self.alive))
                self.alive.append(one)  # no other tensor gets its id
        slots = [self.slots.get(id(one)) for one in made]
        self.operations.append((func, read, slots))
        if func is torch.ops.aten.detach.default:  # so a function's outputs are given away
            self.outputs += zip(made, slots, strict=True)
        return results

    def replay(self):
        made = {None: None}
        for func, read, slots in self.operations:
            args, kwargs = tree_map_only(Slot, lambda slot: made[slot], read)
            results = [one for one in tree_flatten(func(*args, **kwargs))[0] if torch.is_tensor(one)]
            made.update(zip(slots, results, strict=True))
        for output, slot in self.outputs:
            output.data.copy_(made[slot])


def pretend_card(monkeypatch):
    """Counts what is captured and replayed."""
    counts = {"captured": 0, "replayed": 0}

    class Graph:
        def replay(self):
            counts["replayed"] += 1
            with torch.no_grad():
                self.recording.replay()

        def pool(self):
            return ()

        def capture_end(self):
            generator.capturing = False

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        counts["captured"], generator.capturing = counts["captured"] + 1, True
        with Recording() as graph.recording:
            yield
        graph.capture_end()
        for output, _ in graph.recording.outputs:  # what is captured has not run
            if output.is_floating_point():
                output.data.fill_(torch.nan)

    generator = SimpleNamespace(
        capturing=False,
        clone_state=torch.default_generator.clone_state,
        set_state=torch.default_generator.set_state,
        graphsafe_set_state=lambda other: setattr(generator, "capturing", False),
    )
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: counts["captured"],
        "mem_get_info": lambda device: (1, 1),
        "default_generators": {None: generator},
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return counts
