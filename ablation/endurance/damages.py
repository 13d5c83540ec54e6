"""Every stored file damaged in every way: is it noticed, and are the results those of an undamaged folder?"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ablation.endurance.kills import Counts
from ablation.endurance.trial import OUTPUT, Ended, Trial

Damage = Callable[[Path], None]
DAMAGE_FAULTS = ("wrong results", "traceback", "wrong status", "unreadable", "not set aside")
OTHER_JSON = (
    b"[]",
    b"null",
    b"3",
    b'{"cell": 1}',
    b'{"a": NaN}',
    b"[" * 100_000,
    b'{"checksum": "0", "x": 1}',
)


def damages(size: int, truncations: int, flips: int, draw: random.Random) -> Iterator[tuple[str, Damage]]:
    """The ways to damage a file of a size, each with its kind."""

    def cut(offset: int) -> Damage:
        return lambda path: os.truncate(path, offset)

    def flip(position: int, bit: int) -> Damage:
        def change(path: Path) -> None:
            content = bytearray(path.read_bytes())
            content[position] ^= 1 << bit
            path.write_bytes(content)

        return change

    def replace(content: bytes) -> Damage:
        return in_its_place(lambda path: path.write_bytes(content))

    def in_its_place(make: Callable[[Path], object]) -> Damage:
        def change(path: Path) -> None:
            path.unlink()
            make(path)

        return change

    yield from (("truncated", cut(draw.randrange(size))) for _ in range(truncations))
    yield from (("bit flipped", flip(draw.randrange(size), draw.randrange(8))) for _ in range(flips))
    yield "emptied", cut(0)
    yield from (("other JSON", replace(content)) for content in OTHER_JSON)
    yield "a folder", in_its_place(lambda path: path.mkdir())
    yield "a link", in_its_place(lambda path: path.symlink_to("/dev/zero"))
    yield "a link to nothing", in_its_place(lambda path: path.symlink_to("nowhere"))
    yield "a pipe", in_its_place(os.mkfifo)
    yield "removed", in_its_place(lambda path: None)


def damage_rounds(
    whole: Trial, folder: Path, truncations: int, flips: int, sampled: int = 0
) -> dict[str, Counts]:
    """For each stored file how many damages there were, how the next run took them, and the faults.
    `sampled`: of all damages of all files so many, drawn at random; 0: every one.
    """
    draw = random.Random(truncations)
    template = unfinished_trial(folder)
    expected = whole.results()
    table = {name: Counts() for name in stored_files(template)}
    chosen = [
        (name, kind, damage)
        for name in table
        for kind, damage in damages((template.place / name).stat().st_size, truncations, flips, draw)
    ]
    for name, kind, damage in draw.sample(chosen, sampled) if sampled else chosen:
        trial = Trial(folder / "damaged")
        shutil.copytree(template.place, trial.place, symlinks=True)
        damage(trial.place / name)
        note(trial, (name, kind), trial.run(), expected, table[name])
        shutil.rmtree(trial.place)
    shutil.rmtree(template.place)
    return table


def note(trial: Trial, damaged: tuple[str, str], ended: Ended, expected: dict, counts: Counts) -> None:
    """Count how a run took a damage (of a file, of a kind), and print what is wrong with that."""
    name, kind = damaged
    counts["damages"] += 1
    counts["went on" if ended.status == 0 else "refused"] += 1
    wrong = {"traceback": "Traceback" in ended.text, "wrong status": ended.status not in (0, 2)}
    if ended.status == 0:
        is_cell = "/checkpoints/" in name and kind not in ("removed", "a link to nothing", "bit flipped")
        wrong |= {
            "wrong results": trial.results() != expected,
            "unreadable": bool(trial.unreadable()),
            "not set aside": is_cell and not any((trial.output / "set_aside").glob("*")),
        }
    for fault in filter(wrong.get, wrong):
        counts[fault] += 1
        print(f"{name}, {kind}: {fault}, status {ended.status}: {ended.text.strip().splitlines()[-1:]}")


def unfinished_trial(folder: Path) -> Trial:
    """An experiment that lost cells and was killed as it made them again: every kind of file is there."""
    trial = Trial.at(folder / "template")
    trial.run()
    for path in [*trial.output.glob("*/visual_only_*"), *trial.output.glob("*/all_layers_stats.*")]:
        path.unlink()
    trial.run(crash="between 1")  # in a cell all of whose runs are kept
    return trial


def stored_files(trial: Trial) -> list[str]:
    """One file of each kind that the program stores, and those of the data set."""
    wanted = (
        f"{OUTPUT}/checkpoints/*.json",
        f"{OUTPUT}/predictions/*.npz",
        f"{OUTPUT}/manifest.json",
        f"{OUTPUT}/events.jsonl",
        f"{OUTPUT}/results.json",
        f"{OUTPUT}/.unfinished/*/*.safetensors",
        "cache/*/*.safetensors",
        "cache/identities/*.json",
        "loras/*.arrow",
        "loras/state.json",
        "loras/dataset_info.json",
    )
    found = [sorted(trial.place.glob(pattern)) for pattern in wanted]
    return [str(paths[0].relative_to(trial.place)) for paths in found if paths]
