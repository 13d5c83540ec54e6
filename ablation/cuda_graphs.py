"""Training steps recorded as CUDA graphs and replayed."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

WARM_UP = 2  # ordinary steps before one is recorded


class Replayed:
    """A function of tensors that returns nothing, recorded as a CUDA graph and replayed.

    Launching the hundred kernels of a step takes longer than their work. The first WARM_UP calls are
    ordinary, on the stream that is recorded later. After them the arguments are copied to where the recorded
    kernels read them. A function that cannot be recorded runs kernel by kernel, with the same numbers and a
    warning.
    """

    def __init__(
        self,
        function: Callable[..., None],
        record: Callable[[Callable[[], None], torch.device], Callable[[], None]],
    ):
        self.function, self.record = function, record
        self.calls = 0
        self.places: list[Tensor] = []
        self.replay: Callable[[], None] | None = None

    def __call__(self, *arguments: Tensor) -> None:
        """Run the function, or replay it, on these tensors."""
        self.calls += 1
        device = arguments[0].device
        if self.calls <= WARM_UP:
            with side_stream(device):
                self.function(*arguments)
            return
        if self.replay is None:
            self.places = [argument.clone() for argument in arguments]
            run = functools.partial(self.function, *self.places)
            try:
                self.replay = self.record(run, device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # recording runs no kernel, so nothing has to be undone
                warnings.warn(
                    f"a training step is not recorded as a CUDA graph and runs kernel by kernel: {error}",
                    stacklevel=2,
                )
                self.replay = run
        for place, argument in zip(self.places, arguments, strict=True):
            place.copy_(argument)
        self.replay()


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that records:
    each stream of a device that multiplies matrices keeps memory for itself.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a GPU's recording stream,
    after all earlier work and before all later work; no effect on a CPU.
    """
    if device.type != "cuda":
        yield
        return
    stream, present = recording_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(present)
    with torch.cuda.stream(stream):  # makes its device the present one, too
        yield
    present.wait_stream(stream)


def record_graph(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record the kernels of a function as a CUDA graph; returns the function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with side_stream(device), warnings.catch_warnings():
        warnings.simplefilter("error")  # an empty graph, which would train nothing, is only warned of
        with torch.cuda.graph(graph, stream=recording_stream(device)):
            function()
    return graph.replay
