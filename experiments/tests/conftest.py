"""The toy that the tests of experiment 6 read with, and both versions as functions."""

import importlib.util
import os
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(EXPERIMENTS)]

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from sae_analysis import dashboard, program  # noqa: E402
from sae_analysis.language_model import load  # noqa: E402
from sae_analysis.samples import read_samples  # noqa: E402
from sae_analysis.settings import parse_settings, parser_of  # noqa: E402
from sae_analysis.toy import Effort, make_toy  # noqa: E402

DATA = EXPERIMENTS / "data"
LAYERS = (1, 2, 3)
# Tests that take long, the longest first: begun last they would leave a core idle at the end.
LONGEST = (
    "test_two_workers_give_the_bytes_of_one_process",
    "test_a_run_that_failed_goes_on_where_it_stopped",
    "test_gemma_and_gemma_scope_are_found_in_the_hubs_cache",
    "test_a_run_that_was_killed_goes_on_where_it_stopped",
    "test_the_benchmark_compares_versions_and_recommends_a_size",
)


def pytest_collection_modifyitems(items):
    """The tests of LONGEST first, the others as they were found."""
    place_of = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place_of.get(item.name, len(LONGEST)))


def script(name):
    """A command's module; the names of two begin with a digit."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), EXPERIMENTS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """The folder of a toy that is trained for seconds, the same for all processes of the test command."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return tmp_path_factory.getbasetemp().parent / "toys"
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="session")
def toy(toys):
    texts = [text for sample in read_samples(DATA) for text in sample.texts]
    toys.mkdir(exist_ok=True)
    with FileLock(toys / "lock"):  # one process makes it
        return make_toy(toys, texts, LAYERS, Effort(model=20, sae=60))


@pytest.fixture(scope="session")
def flags(toy):
    """The flags that name the toy as a local model."""
    return ["--model", str(toy), "--sae-release", str(toy), "--layers", *map(str, LAYERS), "--device", "cpu"]


@pytest.fixture(scope="session")
def settings(flags):
    return parse_settings(parser_of("", batched=True), flags, {})


@pytest.fixture(scope="session")
def reader(settings):
    return load(settings, None)


@pytest.fixture
def tiny(toy, toys, monkeypatch):
    """`--model tiny` with the toy that the tests trained."""
    monkeypatch.setattr(program, "make_toy", lambda folder, texts, layers: toy)


def undrawn(monkeypatch):
    """Runs have no figure, which takes seconds."""
    monkeypatch.setattr(dashboard, "draw", lambda *_: None)


@pytest.fixture
def run(flags, tmp_path, capsys):
    """Run a version in this process: (exit status, folder of the new run or None, what it printed)."""

    def run(name, *more, model=flags, drawn=False):
        runs = tmp_path / "runs"
        before = set(runs.glob("*"))
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            if not drawn:
                undrawn(patch)
            status = script(name).main([*model, "--output-dir", str(runs), *more])
        captured = capsys.readouterr()
        new = set(runs.glob("*")) - before
        return status, (new.pop() if new else None), captured.out + captured.err

    return run
