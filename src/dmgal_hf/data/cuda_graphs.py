"""Calls that a GPU repeats by itself, of training or queries: captured as CUDA graphs, one a shape, and replayed."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

MOST_GRAPHS = 8  # each holds its inputs and outputs; what comes in more shapes runs plainly
TRIALS = 2  # of a graph, beside the plain call: with the inputs it was captured with, and with others
# How far both may lie apart: in parts of a tensor's largest value, as two runs in bfloat16 may differ in the order of
# their sums, and in multiples of what lies between two plain calls, for values that are noise alone.
TOLERANCE, NOISE = 0.02, 4


class ReplayedCall:
    """
    A function of CUDA tensors, captured as a CUDA graph when it is called with inputs of the same shapes for the
    second time, and replayed from then on: one launch in place of thousands, for which the host would be waited for.
    Shapes that come once run plainly. So does everything, with one warning that says why, if a capture fails, if one
    of a graph's first two replays differs from the plain call, or if a graph would take more memory than it leaves.

    The function must do the same for all inputs of a shape and read no value of a tensor. What it changes of the
    tensors in `state()` it changes in place. Random numbers are those of the plain call: they follow the seed that the
    default generator has when the call begins.

    Args:
        function: from a `dict` of tensors to a `tuple` of tensors.
        state: lists the tensors that the function changes; trying it out leaves no trace in them.
        context: returns what a capture is good for, such as the addresses of the weights; another calls for a new one.
    """

    def __init__(
        self,
        function: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]],
        state: Callable[[], Iterable[torch.Tensor]] = tuple,
        context: Callable[[], object] = lambda: None,
    ):
        self.function, self.state, self.context = function, state, context
        self.made_for: object = None
        self.failed = False
        self._forget()

    def _forget(self):
        self.seen: set[object] = set()
        self.graphs: dict[object, _Graph] = {}
        self.memory: tuple | None = None  # which the graphs share: one replays at a time, and its outputs are copied

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if self.failed:
            return self.function(inputs)
        if (context := self.context()) != self.made_for:
            self._forget()
            self.made_for = context
        shapes = _shapes(inputs)
        if shapes not in self.graphs and (shapes not in self.seen or len(self.graphs) == MOST_GRAPHS):
            self.seen.add(shapes)
            return self.function(inputs)
        try:
            if shapes not in self.graphs:
                self.graphs[shapes] = self._capture(inputs)
            if self.graphs[shapes].trials > 0:
                self._try_out(self.graphs[shapes], inputs)
        except BaseException as error:
            self._forget()  # graphs that are whole, too: they follow the generator's state of before
            if not isinstance(error, Exception):
                raise
            self.failed = True
            logger.warning(f"No CUDA graph could be captured, so calls run without: {error}")
        # Not where the error still holds memory. If it is the function's own, this raises it.
        return self.function(inputs) if self.failed else self.graphs[shapes](inputs)

    def only_replays(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether a call with these is a replay and nothing else: of a graph that has been tried out."""
        graph = self.graphs.get(_shapes(inputs))
        return graph is not None and graph.trials == 0 and self.context() == self.made_for

    def _capture(self, inputs: dict[str, torch.Tensor]) -> "_Graph":
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        device = next(iter(held.values())).device
        stream, pool = self.memory or (torch.cuda.Stream(device), None)
        with self._leaving_no_trace(device):
            stream.wait_stream(torch.cuda.current_stream(device))
            try:
                # The outer context brings the stream of before back where the capture fails.
                with torch.cuda.device(device), torch.cuda.stream(stream):
                    self.function(held)  # what is set up at a first call must be so before the capture
                    torch.cuda.synchronize(device)
                    torch.cuda.empty_cache()
                    before, graph = torch.cuda.memory_reserved(device), torch.cuda.CUDAGraph()
                    # Not "global": the thread that pins the next batch works on.
                    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                        outputs = tuple(output.detach() for output in self.function(held))
                    taken, free = torch.cuda.memory_reserved(device) - before, torch.cuda.mem_get_info(device)[0]
            finally:
                torch.cuda.current_stream(device).wait_stream(stream)
            if taken > free:  # plain calls, as of validation, take about as much
                raise RuntimeError(f"it would take {taken / 1e9:.1f} GB of memory and leave {free / 1e9:.1f} GB")
        self.memory = stream, graph.pool()
        return _Graph(graph.replay, held, outputs)

    def _try_out(self, graph: "_Graph", inputs: dict[str, torch.Tensor]):
        """Compares a replay with two plain calls."""
        device, results = next(iter(inputs.values())).device, []
        for call in (self.function, self.function, graph):
            with self._leaving_no_trace(device) as state:
                outputs = call(inputs)
                results.append([*outputs, *(one.detach().float() - before for one, before in state)])
        if not all(map(_alike, *results)):
            raise RuntimeError("what it computes differs from the plain call")
        graph.trials -= 1

    @contextmanager
    def _leaving_no_trace(self, device: torch.device) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Gives the state with what it is before; that, and the generator, are so again afterwards."""
        state = [(one, one.detach().clone()) for one in self.state()]
        generator = torch.cuda.default_generators[device.index]
        random = generator.clone_state()
        try:
            yield state
        except BaseException:
            generator.graphsafe_set_state(random)  # a capture that broke off leaves the other one in it for ever
            raise
        finally:
            with torch.no_grad():
                for one, before in state:
                    one.copy_(before)
            generator.set_state(random.get_state())


@dataclass
class _Graph:
    """What replays, and the tensors it reads and writes."""

    replay: Callable[[], None]
    held: dict[str, torch.Tensor]
    outputs: tuple[torch.Tensor, ...]
    trials: int = TRIALS

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        for name, tensor in inputs.items():
            self.held[name].copy_(tensor)
        self.replay()
        return tuple(output.clone() for output in self.outputs)  # the next replay writes over them


def _shapes(inputs: dict[str, torch.Tensor]) -> tuple:
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())


def _alike(first: torch.Tensor, second: torch.Tensor, found: torch.Tensor) -> bool:
    if first.numel() == 0:
        return True
    first, second, found = (one.detach().double() for one in (first, second, found))
    largest, noise = (float(one.nan_to_num(0, 0, 0).abs().max()) for one in (first, second - first))
    return torch.allclose(found, first, rtol=0, atol=TOLERANCE * largest + NOISE * noise, equal_nan=True)
