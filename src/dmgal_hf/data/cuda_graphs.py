"""Calls that a GPU repeats by itself, of training or queries: captured as CUDA graphs, one a shape, and replayed."""

import logging
from collections.abc import Callable, Iterable

import torch

logger = logging.getLogger(__name__)

MOST_GRAPHS = 8  # each holds its inputs and outputs; what comes in more shapes runs plainly
TOLERANCE = 0.02  # of a tensor's largest value: two runs in bfloat16 may differ in the order of their sums


class ReplayedCall:
    """
    A function of CUDA tensors, captured as a CUDA graph when it is called with inputs of the same shapes for the
    second time, and replayed from then on: one launch in place of thousands, for which the host would be waited for.
    Shapes that come once run plainly, and so does everything if a capture fails or a first replay differs from the
    plain call, with one warning that says why.

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
        self.seen: set[object] = set()
        self.graphs: dict[object, tuple] = {}
        self.made_for: object = None
        self.failed = False
        self.memory: tuple | None = None  # which the graphs share: one replays at a time, and its outputs are copied

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if self.failed:
            return self.function(inputs)
        if (context := self.context()) != self.made_for:
            self.made_for, self.graphs, self.seen, self.memory = context, {}, set(), None
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        if shapes not in self.graphs:
            if shapes not in self.seen or len(self.graphs) == MOST_GRAPHS:
                self.seen.add(shapes)
                return self.function(inputs)
            try:
                self.graphs[shapes] = self._capture(inputs)
            except RuntimeError as error:
                self.failed, self.graphs = True, {}
                logger.warning(f"No CUDA graph could be captured, so calls run without: {error}")
                return self.function(inputs)
        replay, held, outputs = self.graphs[shapes]
        for name, tensor in inputs.items():
            held[name].copy_(tensor)
        replay()
        return tuple(output.clone() for output in outputs)  # the next replay writes over them

    def _capture(self, inputs: dict[str, torch.Tensor]) -> tuple:
        """What replays, and the tensors it reads and writes; tried once against the plain call."""
        held = {name: tensor.clone() for name, tensor in inputs.items()}
        device = next(iter(held.values())).device
        changed = list(self.state())
        before = [tensor.detach().clone() for tensor in changed]
        generator = torch.cuda.default_generators[device.index]
        random = generator.clone_state()

        @torch.no_grad()
        def leave_no_trace():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
            generator.set_state(random.get_state())

        stream, pool = self.memory or (torch.cuda.Stream(device), None)
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            # The outer context brings the stream of before back where the capture fails.
            with torch.cuda.device(device), torch.cuda.stream(stream):
                # Also, what is set up at a first call must be so before the capture.
                expected = [tensor.clone() for tensor in (*self.function(held), *changed)]
                leave_no_trace()
                torch.cuda.synchronize(device)
                graph = torch.cuda.CUDAGraph()
                # Not "global": the thread that pins the next batch works on.
                with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                    outputs = tuple(output.detach() for output in self.function(held))
                self.memory = stream, graph.pool()
                leave_no_trace()
                graph.replay()
                if not all(map(_alike, (*outputs, *changed), expected)):
                    raise RuntimeError("what it computes differs from the plain call")
        except RuntimeError:
            generator.graphsafe_set_state(random)  # a capture that broke off leaves the other one in it for ever
            raise
        finally:
            torch.cuda.current_stream(device).wait_stream(stream)
            leave_no_trace()
        return graph.replay, held, outputs


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    found, expected = found.detach().double(), expected.detach().double()
    largest = expected.nan_to_num(0, 0, 0).abs().flatten().max() if expected.numel() else 0
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(largest), equal_nan=True)
