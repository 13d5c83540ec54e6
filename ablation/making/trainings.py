"""Which files are checkpoints of one training: by the names that trainers give, and by their own records.

Only the patterns of trainers count. `cat-1.safetensors` and `cat-2.safetensors` are two trainings.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence

CHECKPOINT_FOLDERS = re.compile(
    r"checkpoint-\d+"  # diffusers, PEFT, SimpleTuner, XLabs: run/checkpoint-500/pytorch_lora_weights
    r"|(epoch|step)-?\d+"  # diffusion-pipe and others: run/epoch3/adapter_model
)
CHECKPOINT_FILES = (  # the group is the name of the training
    re.compile(r"(.+)-00\d{4}"),  # kohya, an epoch: name-000001
    re.compile(r"(.+)-step\d{8}"),  # kohya, a step: name-step00000500
    re.compile(r"(.+)_00\d{7}"),  # ai-toolkit: name_000000250
    re.compile(r"(.*?)[-_ ]?\d{4}(?:-\d\d){2}_\d\d(?:-\d\d){2}-save-\d+-\d+-\d+"),  # OneTrainer: prefix, date
)
# Checkpoints that bear no name: DiffSynth's epoch-3 and step-500, kohya's without --output_name. Kohya calls
# the file at the end of such a training `last`.
NAMELESS_FILES = re.compile(r"(epoch|step)-\d+|at-step\d{8}")
NAMELESS = "last"


def training_by_name(parts: Sequence[str]) -> str:
    """The training that a file belongs to by its path: the path of the file that the training ends with,
    without the suffix. A file that is no checkpoint is that file.
    """
    *folders, file = parts
    stem = file.rpartition(".")[0] or file
    kept = [folder for folder in folders if not CHECKPOINT_FOLDERS.fullmatch(folder)]
    return "/".join([*kept, final_stem(stem)])


def final_stem(stem: str) -> str:
    """The name, without its suffix, of the file that a training ends with, from that of any checkpoint."""
    if NAMELESS_FILES.fullmatch(stem):
        return NAMELESS
    for pattern in CHECKPOINT_FILES:
        found = pattern.fullmatch(stem)
        if found:
            return found[1] or NAMELESS
    return stem


def group_by_training(by_name: Mapping[str, str], sessions: Mapping[str, str]) -> dict[str, str]:
    """File -> its training, for all files; {} if no training has several files.

    `by_name` is each file's training by its name, `sessions` what a trainer wrote into a file to tell its
    training: files of one session are of one training whatever they are called.
    """
    joined: dict[str, str] = {}  # training -> another name of it, nearer to the one that stands for all

    def root(training: str) -> str:
        while training in joined:
            training = joined[training]
        return training

    first_of_session: dict[str, str] = {}
    for name, session in sessions.items():
        here = root(by_name[name])
        first = root(first_of_session.setdefault(session, here))
        if here != first:
            joined[max(here, first)] = min(here, first)
    trainings = {name: root(training) for name, training in by_name.items()}
    counts = collections.Counter(trainings.values())
    return trainings if any(count > 1 for count in counts.values()) else {}
