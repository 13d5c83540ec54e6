"""The project's root and its commands on the path, and the fixtures that run the program."""

import gc
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import build_dataset  # noqa: E402
import hypothesis  # noqa: E402
import pytest  # noqa: E402
from builders import lora_dataset  # noqa: E402
from running import FAST  # noqa: E402

import visual_ablation_experiment as experiment  # noqa: E402

hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any speed")


# Files that take long, the longest first: begun last they would leave a core idle at the end.
LONGEST = (
    "test_check_device.py",
    "test_report.py",
    "test_endurance.py",
    "test_folds.py",
    "test_inference.py",
    "test_processes.py",
    "test_surroundings.py",
    "test_resuming.py",
    "test_training.py",
    "test_nothing_left.py",
    "test_experiment.py",
    "test_reading.py",
)
assert all((ROOT / "tests" / name).is_file() for name in LONGEST)


def pytest_collection_modifyitems(items):
    """The files of LONGEST first, the others as they were found."""
    place_of = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place_of.get(item.path.name, len(LONGEST)))


def pytest_collection_finish():
    """The collector of garbage need not look at modules and tests again: they stay to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def saved_loras(tmp_path_factory):
    """A data set of 40 rows whose attn2 layers know the class, as `save_to_disk` wrote it."""
    folder = tmp_path_factory.mktemp("saved") / "loras"
    lora_dataset(n=40, signal=True).save_to_disk(folder)
    return folder


@pytest.fixture
def place(saved_loras, tmp_path, monkeypatch):
    """A folder to work in with a data set `loras` of 40 rows whose attn2 layers know the class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    shutil.copytree(saved_loras, "loras")
    return tmp_path


@pytest.fixture
def run(place, capsys):
    """Run the program in this process: (exit status, log)."""

    def run(*flags, dataset="./loras", fast=FAST):
        capsys.readouterr()
        status = experiment.main(["--dataset", dataset, *fast, *flags])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def build(place, capsys):
    """Run the builder in this process: (exit status, what it said)."""

    def build(*flags, output="out"):
        capsys.readouterr()
        status = build_dataset.main([*map(str, flags), "--output", output])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return build
