"""Two output folders, cell by cell."""

import compare_runs
import numpy as np
from running import folder

from checkpointing import ResultStore


def test_cells_of_two_folders_are_compared_row_by_row(run, place, capsys):
    chosen = ("--representations", "stats", "simple_stats", "--layer-sets", "all_layers")
    run(*chosen, "--output-dir", "a")
    run(*chosen[:2], "--layer-sets", "all_layers", "--output-dir", "b", "--seed", "9")
    capsys.readouterr()
    assert compare_runs.main([str(folder(place, output=name)) for name in "ab"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["all_layers_stats", "mean"]
    a, b = (ResultStore(folder(place, output=name)).load_predictions("all_layers_stats") for name in "ab")
    right = [np.mean(x["test_predictions"] == x["test_labels"]) for x in (a, b)]
    assert [float(x) for x in lines[2].split()[1:3]] == [round(100 * x, 1) for x in right]
    assert float(lines[2].split()[3]) == round(100 * (right[0] - right[1]), 2)
    assert compare_runs.main([str(folder(place, output="a")), str(place)]) == 2
