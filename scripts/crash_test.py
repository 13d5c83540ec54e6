"""Break the program over and over, and count what it did not keep of its promises (docs/reliability.md).

kills: processes killed at random moments and at every named moment of a write, and rerun until finished.
damage: every stored file cut, emptied, flipped, replaced. signals: TERM, INT, HUP and QUIT at random moments.
soak: random actions beside a model of what must be true. Exit status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import _root  # noqa: F401 (puts the project's root on the module path)

from ablation.endurance.damages import DAMAGE_FAULTS, damage_rounds
from ablation.endurance.interrupts import LONGEST, SIGNAL_FAULTS, signal_rounds
from ablation.endurance.kills import FAULTS, Counts, kill_rounds
from ablation.endurance.soak import SOAK_FAULTS, soak
from ablation.endurance.trial import prepared

TESTS = ("kills", "damage", "signals", "soak")


def build_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--test", nargs="+", choices=TESTS, default=["kills"], help="what to do (default: kills)")
    add("--rounds", type=int, default=200, help="rounds of kills; signals of each kind; actions of the soak")
    add("--truncations", type=int, default=20, help="places where each file is cut (default: 20)")
    add("--flips", type=int, default=50, help="bits of each file that are flipped (default: 50)")
    add("--sample", type=int, default=0, help="so many of all damages, at random; 0: all (default)")
    add("--seed", type=int, default=0, help="of all that is random but the clock (default: 0)")
    add("--folder", type=Path, help="where to make a folder to work in (default: that of temporary files)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the tests and print their tables. Returns the exit status."""
    arguments = build_parser().parse_args(argv)
    rounds, seed = arguments.rounds, arguments.seed
    folder = Path(tempfile.mkdtemp(prefix="crash-test-", dir=arguments.folder)) / "work"
    wrong = 0
    with prepared(folder) as whole:
        for test in arguments.test:
            began = time.monotonic()
            table: dict[str, Counts]
            faults: tuple[str, ...]
            if test == "kills":
                table, faults = kill_rounds(whole, folder, rounds, seed), FAULTS
            elif test == "damage":
                table = damage_rounds(whole, folder, arguments.truncations, arguments.flips, arguments.sample)
                faults = DAMAGE_FAULTS
            elif test == "signals":
                table, faults = signal_rounds(whole, folder, rounds, seed), SIGNAL_FAULTS
            else:
                table, faults = {"all": soak(folder, rounds, seed)}, SOAK_FAULTS
            print(
                f"\n{test}, {time.monotonic() - began:.0f} seconds\n{table_text(table, faults)}", flush=True
            )
            wrong += sum(counts[fault] for counts in table.values() for fault in faults)
    return 1 if wrong else 0


def table_text(table: Mapping[str, Counts], faults: tuple[str, ...]) -> str:
    """A line for each row: what was done, then every fault with its number."""
    done = dict.fromkeys(name for counts in table.values() for name in counts if name not in faults)
    headings = [*done, *faults]
    width = max(len(name) for name in [*table, "all together"]) + 2
    total: Counts = sum(table.values(), Counts())
    total[LONGEST] = max(counts[LONGEST] for counts in table.values())
    rows = {**table, "all together": total} if len(table) > 1 else dict(table)
    lines = [" " * width + "  ".join(headings)]
    for name, counts in rows.items():
        cells = "  ".join(f"{counts[heading]:>{len(heading)}}" for heading in headings)
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
