"""Checkpoints of an earlier version stay current: nothing is computed again, and the results are equal.

`earlier_results/` holds the output folders of two runs of the program as it was before its modules were put
into `ablation/` (commit 74bf5ec), one with the defaults and one with every kind of cell. A change that makes
other numbers raises a version in `ablation/catalogue.py`; then make the stale cells anew, with the flags
below and --rerun-stale. So were those of pca and kernel_ridge at their version 2.
"""

import json
import zipfile
from pathlib import Path

import pytest
from running import never

import visual_ablation_experiment as experiment

EARLIER = Path(__file__).parent / "earlier_results"
TINY = ["--num-runs", "2", "--max-epochs", "2", "--hidden-dim", "4", "--batch-size", "2"]
COMMON = ["--dataset", "sanity-check", *TINY, "--no-report", "--no-cache-features", "--device", "cpu"]
EVERYTHING = [
    *("--config", "named.yaml", "--representations", "simple_stats", "product_sketch", "pca", "kernel_ridge"),
    *("--layer-sets", "all_layers", "visual_only", "random_half", "queries", "--random-halves", "1"),
    *(
        "--controls",
        *("shuffled", "metadata", "norms", "down", "up"),
        "--classifiers",
        "linear",
        "--audit",
        "gauge",
        "noise",
        "--split",
        "random",
        "stratified",
    ),
]
# What the inference says has versions of its own and costs no training.
REWORDED = ("verdict", "inference_check", "inference_made_from")


@pytest.mark.parametrize("name, flags, cells", [("plain", [], 18), ("everything", EVERYTHING, 107)])
def test_earlier_checkpoints_are_current_and_give_equal_results(
    name, flags, cells, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("named.yaml").write_text('named_layer_sets: {queries: ["*.to_q.*"]}\n')
    with zipfile.ZipFile(EARLIER / f"{name}.zip") as archive:
        archive.extractall(name)
    results = Path(name, "visual_ablation_sanity-check", "results.json")
    earlier = json.loads(results.read_text())
    command = [*COMMON, *flags, "--output-dir", name]

    assert experiment.main([*command, "--status"]) == 0
    assert f"{cells}/{cells} (100.0%)" in capsys.readouterr().out

    results.unlink()  # --status learns from it that a control was skipped; the run must not need it
    monkeypatch.setattr("ablation.training.train_one", never)
    monkeypatch.setattr("ablation.features.extract_features", never)
    assert experiment.main(command) == 0
    assert f"{cells}/{cells} (100.0%)" in capsys.readouterr().out
    again = json.loads(results.read_text())
    assert set(again) >= set(earlier)
    for key in earlier:
        if key not in REWORDED:
            assert_kept(earlier[key], again[key], key)


def assert_kept(earlier, again, place):
    """Everything of the earlier result is there again;
    a mapping may have gained keys, such as a new score's.
    """
    if isinstance(earlier, dict):
        assert set(earlier) <= set(again), place
        for key, value in earlier.items():
            if key != "retention":  # the inference's since: of the accuracy above chance, with its interval
                assert_kept(value, again[key], f"{place}.{key}")
    elif isinstance(earlier, list):
        assert len(earlier) == len(again), place
        for number, (one, other) in enumerate(zip(earlier, again, strict=True)):
            assert_kept(one, other, f"{place}[{number}]")
    else:
        assert earlier == again, place
