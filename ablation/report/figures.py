"""Every figure of a report: its title, its rows, how it is drawn, its caption.
A further figure is one entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ablation.catalogue import MAIN_COMPARISON
from ablation.report import (
    accuracy_figures,
    comparison_figures,
    control_figures,
    null_figures,
    rows,
    training_figures,
)


@dataclass(frozen=True)
class Drawing:
    """A figure of one run's results, or of several runs'.

    `rows` gives the figure's data for tables/<name>.csv, `draw` the figure, or None where there is nothing
    for it.
    """

    title: str
    caption: str
    rows: Callable[[Any], list[dict[str, Any]]]
    draw: Callable[[Any], Figure | None]
    is_narrow: bool = False  # on the page
    leads: bool = False  # stands above the table
    is_of_all_splits: bool = False  # other figures are of the first split


def no_rows(results: Any) -> list[dict[str, Any]]:
    """No table of its own."""
    return []


FIGURES = {
    "halves": Drawing(
        "Compared with any other half of the layers",
        "Each random half has as many modules of each block as the visual layers. If the text layers held no "
        "more than others, the visual half would be one of these. A closed-form reader reads all sets.",
        rows.halves_rows,
        null_figures.halves,
        is_narrow=True,
        leads=True,
        is_of_all_splits=True,
    ),
    "accuracy": Drawing(
        "Test accuracy",
        "Points: mean test accuracy; lines: 95 % intervals for new examples and runs; broken line: chance.",
        rows.accuracy_rows,
        accuracy_figures.accuracy,
        is_narrow=True,
        leads=True,
        is_of_all_splits=True,
    ),
    "drop": Drawing(
        f"The drop without {MAIN_COMPARISON.removed}",
        "Accuracy with all layers less that with the visual layers alone, with 95 % intervals for new "
        "examples and runs; filled: p < 0.05, corrected for all; band: the margin within which the two "
        "count as equal.",
        rows.drop_rows,
        accuracy_figures.drop,
        is_narrow=True,
        leads=True,
        is_of_all_splits=True,
    ),
    "class_drop": Drawing(
        "The drop by class",
        "Recall of the class with all layers less that with the visual ones. Intervals are for new examples "
        "and runs, paired by row, of whole groups where there are groups, and one at a time.",
        rows.class_drop_rows,
        accuracy_figures.class_drop,
        is_narrow=True,
    ),
    "retention": Drawing(
        "What is retained",
        "What a layer set keeps of the accuracy above chance with all layers, where that is shown to be "
        "above chance.",
        rows.retention_rows,
        accuracy_figures.retention,
        is_narrow=True,
        is_of_all_splits=True,
    ),
    "learning_curves": Drawing(
        "Learning curves",
        "Validation accuracy of every run (faint), their mean while half of them go on (bold), and best "
        "epochs (points).",
        rows.learning_curves_rows,
        training_figures.learning_curves,
    ),
    "confusion": Drawing(
        "Confusion matrices",
        "Test rows of all runs; lines are true classes and add up to one, empty where no test row is of a "
        "class.",
        rows.confusion_rows,
        training_figures.confusion,
    ),
    "confusion_all": Drawing(
        "Confusion matrices of every representation",
        "The same for every representation; classes in the same order.",
        no_rows,
        training_figures.confusion_all,
    ),
    "gaps": Drawing(
        "Training, validation and test", "Means over runs.", rows.gaps_rows, training_figures.gaps
    ),
    "precision_recall": Drawing(
        "Precision against recall",
        "Macro averages over the classes, means over runs.",
        rows.scatter_rows,
        training_figures.precision_recall,
        is_narrow=True,
    ),
    "cost": Drawing(
        "Columns and seconds against accuracy",
        "Columns before constant ones are left out; seconds are a run's own (of a packed run: its part).",
        rows.scatter_rows,
        training_figures.cost,
    ),
    "controls": Drawing(
        "Controls",
        "What is not, or only a part of, the weights. Strokes: chance; for shuffled labels what is due to "
        "their frequencies, and in grey the range of 95 % of orders of the test labels, for each cell alone. "
        "All cells share their labels and rows, so they err together.",
        rows.controls_rows,
        control_figures.controls,
        is_narrow=True,
        is_of_all_splits=True,
    ),
    "audits": Drawing(
        "Audits",
        "Predictions of the trained runs that stay the same when the test rows' weights are changed.",
        rows.audits_rows,
        control_figures.audits,
    ),
    "blocks": Drawing(
        "Where in the model",
        "One block's layers of one kind alone.",
        rows.blocks_rows,
        control_figures.blocks,
        is_narrow=True,
    ),
}
COMPARISON_FIGURES = {  # of several runs
    "scaling": Drawing(
        "Accuracy and size",
        "Lines join runs of equal settings, classes and layers; sizes are drawn a little apart where runs "
        "stand beside each other.",
        rows.scaling_rows,
        comparison_figures.scaling,
        leads=True,
    ),
    "scaling_drop": Drawing(
        "The drop and size",
        "All layers less visual only, with 95 % intervals.",
        no_rows,
        comparison_figures.scaling_drop,
        leads=True,
    ),
    "scaling_retention": Drawing(
        "What is retained, and size",
        "Test accuracy of a layer set over that with all layers.",
        no_rows,
        comparison_figures.scaling_retention,
        leads=True,
    ),
}
