"""JSON files -> samples: a prompt, its true completion, and a false one.

A file is a list of objects with the keys KEYS. Its domain is the one that its name says, whatever the
objects' own `domain` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from . import InputError

FILES = {
    "entity": "bench_entity_swaps.json",
    "temporal": "bench_temporal_shifts.json",
    "logical": "bench_logical_inversions.json",
    "adversarial": "bench_adversarial_traps.json",
}
KEYS = ("id", "domain", "complexity", "prompt", "fact", "hallucination")
TEXTS = ("prompt", "fact", "hallucination")


class Sample(NamedTuple):
    """A prompt with a true and a false completion."""

    id: str
    domain: str
    complexity: str | int | float  # as the file has it
    prompt: str
    fact: str
    hallucination: str

    @property
    def texts(self) -> tuple[str, str, str]:
        """The prompt alone, with the fact, and with the hallucination."""
        return self.prompt, f"{self.prompt} {self.fact}", f"{self.prompt} {self.hallucination}"


def read_samples(folder: Path, domains: Iterable[str] = FILES) -> list[Sample]:
    """The samples of some domains, file by file. Raises InputError."""
    by_domain = [read_domain(folder, domain) for domain in domains]
    seen: dict[str, str] = {}
    for samples in by_domain:
        for index, sample in enumerate(samples):
            if sample.id in seen:
                raise InputError(
                    f"{FILES[sample.domain]}, index {index}: id '{sample.id}' stands in "
                    f"{FILES[seen[sample.id]]} too: give every sample an id of its own"
                )
            seen[sample.id] = sample.domain
    return [sample for samples in by_domain for sample in samples]


def spread(samples: list[Sample], most: int) -> list[Sample]:
    """At most `most` samples, taken from the domains in turn, in the order given; all if `most` is 0."""
    count: dict[str, int] = {}  # samples of a domain so far
    rank: dict[str, int] = {}  # of a sample within its domain
    for sample in samples:
        rank[sample.id] = count[sample.domain] = count.get(sample.domain, -1) + 1
    in_turn = sorted(samples, key=lambda sample: rank[sample.id])
    chosen = {sample.id for sample in in_turn[: most or None]}
    return [sample for sample in samples if sample.id in chosen]


def read_domain(folder: Path, domain: str) -> list[Sample]:
    """The samples of a domain's file. Raises InputError."""
    path = folder / FILES[domain]
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot read {path}: {reason}; give --data-dir or leave out the domain") from None
    if not isinstance(rows, list):
        raise InputError(f"{path} is no list: write a list of objects with the keys {', '.join(KEYS)}")
    samples, ids = [], set()
    for index, row in enumerate(rows):
        sample = sample_of(row, domain, f"{path}, index {index}")
        if sample.id in ids:
            raise InputError(f"{path}, index {index}: id '{sample.id}' stands twice: give it another")
        ids.add(sample.id)
        samples.append(sample)
    return samples


def sample_of(row: Any, domain: str, where: str) -> Sample:
    """A sample from an object of a file. Raises InputError, which says `where`."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is no object: write one with the keys {', '.join(KEYS)}")
    missing = [key for key in KEYS if key not in row]
    if missing:
        raise InputError(f"{where} has no '{missing[0]}': add it")
    for key in ("id", *TEXTS):
        kinds = (str, int) if key == "id" else str
        if not isinstance(row[key], kinds) or isinstance(row[key], bool) or not str(row[key]).strip():
            raise InputError(f"{where}: '{key}' is empty or no text: give one")
        if not is_unicode(str(row[key])):
            raise InputError(
                f"{where}: '{key}' holds half of a surrogate pair, which is no character: remove it"
            )
    if not is_complexity(row["complexity"]):
        raise InputError(f"{where}: 'complexity' is neither a finite number nor a text: give one")
    return Sample(str(row["id"]), domain, row["complexity"], *(row[key] for key in TEXTS))


def is_unicode(text: str) -> bool:
    """True if a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_complexity(value: Any) -> bool:
    """True for a text, and for a number that a column of 64 bits holds."""
    if isinstance(value, str):
        return is_unicode(value)
    return isinstance(value, (int, float)) and abs(value) < 2**63  # false for NaN
