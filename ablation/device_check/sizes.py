"""How much of each table is checked."""

from __future__ import annotations

from dataclasses import dataclass

# (rows, cols) of layers of Stable Diffusion 1.5, SDXL and Flux 1: `down` (rank, in) and `up` (out, rank).
SMALL_SHAPES = ((1, 1), (3, 7), (1, 320), (320, 1), (4, 320), (64, 64))
LAYER_SHAPES = {
    "SD 1.5": ((1, 1280), (768, 4), (4, 2560), (64, 320)),
    "SDXL": ((1, 640), (2048, 4), (64, 1280)),
    "Flux 1": ((1, 3072), (12288, 4), (64, 3072), (15360, 64)),
}
SMALL_MODULES = ((1, 1, 1), (3, 2, 9), (1, 64, 48), (4, 96, 64))
# (rank, in, out).
MODULE_SHAPES = {
    "SD 1.5": ((1, 320, 320), (4, 768, 320), (64, 320, 640)),
    "SDXL": ((4, 2048, 1280), (64, 1280, 1280)),
    "Flux 1": ((1, 3072, 3072), (4, 3072, 12288), (64, 3072, 3072)),
}


@dataclass(frozen=True)
class CheckSizes:
    """Sizes of the four tables. Rows of a case; data sets and settings of training; rows that are timed."""

    # table 1
    rows: int = 24  # of a case
    large_rows: int = 4  # of a case whose matrices have more than LARGE_MATRIX weights
    shapes: tuple[tuple[int, int], ...] = SMALL_SHAPES
    layers: tuple[tuple[int, int], ...] = tuple(s for shapes in LAYER_SHAPES.values() for s in shapes)
    small_modules: tuple[tuple[int, int, int], ...] = SMALL_MODULES
    modules: tuple[tuple[int, int, int], ...] = tuple(s for shapes in MODULE_SHAPES.values() for s in shapes)
    many: int = 40_000  # matrices at once, more than one call of a decomposition takes
    # table 2
    blob_rows: int = 600
    seeds: int = 10
    epochs: int = 40
    # table 3
    program_rows: int = 200
    program_runs: int = 4
    program_epochs: int = 6
    memory_rows: int = 1024  # one whole block
    memory_rank: int = 8
    # table 4
    timed_rows: tuple[int, ...] = (1_000, 10_000)
    timed_layers: int = 128
    timed_runs: int = 10
    timed_epochs: int = 3
    seconds: float = 1.0  # of each limit that is measured


TIMED_ROWS = (1_000, 10_000, 50_000)
LARGE_MATRIX = 100_000
QUICK = CheckSizes(
    rows=12,
    large_rows=2,
    shapes=((1, 1), (3, 7), (4, 320)),
    layers=((1, 1280), (64, 320), (2048, 4), (64, 3072)),
    small_modules=((3, 2, 9), (1, 64, 48), (4, 96, 64)),
    modules=((1, 320, 320), (64, 320, 640)),
    many=20_000,
    seeds=4,
    epochs=20,
    program_rows=60,
    program_runs=2,
    program_epochs=3,
    timed_rows=(1_000,),
    timed_runs=10,
    timed_epochs=2,
    seconds=0.3,
)


def sizes_for(rows: int, is_quick: bool) -> CheckSizes:
    """The sizes of a check. Without `is_quick`, `rows` are timed, and those of TIMED_ROWS that are fewer."""
    if is_quick:
        return QUICK
    return CheckSizes(timed_rows=(*(n for n in TIMED_ROWS if n < rows), rows))
