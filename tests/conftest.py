"""The project's root and its commands on the path, and the fixtures that run the program."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from builders import lora_dataset  # noqa: E402
from running import FAST  # noqa: E402

import visual_ablation_experiment as experiment  # noqa: E402

hypothesis.settings.register_profile(
    "any speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any speed")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in with a data set `loras` of 40 rows whose attn2 layers know the class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    lora_dataset(n=40, signal=True).save_to_disk("loras")
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
