"""Blocks of features on disk: made by any number of processes, merged into the cache's files by the last.

A block has the features of BLOCK_ROWS rows in one file. Whoever makes a block holds its lock; the others go
on with other blocks and wait at the end. Memory holds one block, whatever the number of rows.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from ablation.extraction import Block, OnLayers, Request, Seconds, keep_block
from ablation.quantised import Scale, bounds_of, encode, scale_between
from ablation.reading import BLOCK_ROWS
from ablation.stopping import end_if_stopped
from checkpointing import FeatureCache, Held, Unfinished, locked

log = logging.getLogger("visual_ablation")


@dataclass
class BlockPass:
    """A pass over the weights, block by block, that other processes may take part in.

    `kept` has the blocks, `cache` gets the whole. `errors` has the representations that failed.
    """

    request: Request
    kept: Unfinished
    cache: FeatureCache
    on_layers: OnLayers = lambda layers: None
    errors: dict[str, Exception] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)

    @property
    def names(self) -> list[str]:
        """The representations that have not failed."""
        return [name for name in self.request.widths if name not in self.errors]

    @property
    def starts(self) -> range:
        """The first row of each block."""
        return range(0, self.request.data.num_rows, BLOCK_ROWS)

    def has(self, start: int) -> bool:
        """True if a block is there, as far as the head of its file says."""
        return self.kept.names_in(part_name(start)) >= set(self.names)

    def is_merged(self) -> bool:
        """True if another process merged the blocks."""
        return self.cache.is_there(self.names)

    def make(self, rows: range) -> None:
        """Make the blocks whose first row is among `rows`, or wait until other processes have.

        Raises CannotWrite.
        """
        self.kept.prepare()
        waiting = deque(start for start in self.starts if start in rows)
        held: set[int] = set()
        while waiting and self.names:
            end_if_stopped()
            start = waiting.popleft()
            try:
                if not self.has(start) and not self.is_merged():
                    with locked(self.kept.path(part_name(start)), wait=start in held):
                        if not self.has(start) and not self.is_merged():
                            self.make_block(start)
                            continue
            except Held:
                held.add(start)
                waiting.append(start)
                continue
            self.on_layers(len(self.request.data.layers) / len(self.starts))

    def make_block(self, start: int) -> None:
        """Make one block and keep it beside what an earlier command made of it."""
        widths = {name: self.request.widths[name] for name in self.names}
        stop = min(start + BLOCK_ROWS, self.request.data.num_rows)
        block = Block(replace(self.request, widths=widths), start, stop, self.seconds)
        block.extract(lambda layers: self.on_layers(layers / len(self.starts)))
        self.errors |= block.errors
        keep_block(self.kept, block, self.kept.load(part_name(start)) or {})

    def merge(self) -> None:
        """Write the cache's files from the blocks. A block that is damaged or gone is made again.

        Raises CannotWrite.
        """
        while self.names and not self.is_merged():
            if self.write_files():
                return
            self.make(range(self.request.data.num_rows))

    def write_files(self) -> bool:
        """Write a file for each representation from the blocks. Returns False if one of them is not whole."""
        rows, dtype = self.request.num_rows, self.cache.dtype
        with contextlib.suppress(BlockMissing), contextlib.ExitStack() as stack:
            scales = self.scales() if dtype != "float32" else {}
            files = {}
            for name in self.names:
                shape = (rows, self.request.count(name) * self.request.widths[name])
                first = scales[name]._asdict() if name in scales else {}
                files[name] = stack.enter_context(self.cache.growing(name, shape, first))
            for features in self.blocks():
                for name, file in files.items():
                    x = features[name]
                    file.append("features", encode(x, scales[name], dtype) if name in scales else x)
            return True
        return False

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """The features (n, P*k) of each block, by representation. Raises BlockMissing."""
        names = self.names
        for start in self.starts:
            arrays = self.kept.load(part_name(start))
            if arrays is None or not arrays.keys() >= set(names):
                raise BlockMissing
            widths = {name: self.request.count(name) * self.request.widths[name] for name in names}
            yield {name: arrays[name].reshape(-1, widths[name]) for name in names}

    def scales(self) -> dict[str, Scale]:
        """The scale of each representation, from a reading of all blocks. Raises BlockMissing."""
        bounds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for features in self.blocks():
            for name, x in features.items():
                low, high = bounds_of(x)
                before = bounds.get(name, (low, high))
                bounds[name] = np.minimum(low, before[0]), np.maximum(high, before[1])
        return {name: scale_between(low, high) for name, (low, high) in bounds.items()}


class BlockMissing(Exception):
    """A block is not there, or not whole."""


def part_name(start: int) -> str:
    """The name of the block that begins with a row."""
    return f"rows{start}"


def remove_merged(cache: FeatureCache, kept: Unfinished) -> None:
    """Remove the blocks all of whose representations are in the cache, and the folder if it is empty then.

    Blocks of other representations may be another process's, which is at work.
    """
    with contextlib.suppress(OSError):  # another user's stay
        for path in kept.folder.glob("rows*.safetensors"):
            names = kept.names_in(path.stem)
            if names and cache.is_there(names):
                path.unlink(missing_ok=True)
        if not any(kept.folder.glob("rows*.safetensors")):
            kept.remove()
