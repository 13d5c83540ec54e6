"""A run's table -> how facts and hallucinations differ, by domain."""

from __future__ import annotations

import numpy as np
import polars as pl

from .rows import measures

LEVEL = 0.05
COLUMNS = ("measure", "domain", "n", "mean_difference", "low", "high", "cohens_d", "p", "p_holm")


def compare(table: pl.DataFrame, layers: tuple[int, ...]) -> pl.DataFrame:
    """One row a measure and domain: the paired comparison of hallucination and fact over samples.

    Columns: measure, domain, n; mean_difference with its sign as in `_diff` (a layer's measures:
    hallucination - fact) and its 95 % interval (t); cohens_d, mean over standard deviation of the differences
    (d_z); p of the paired t test, two-sided; p_holm over all rows. Where all differences are equal nothing
    can be tested: d is 0 and p is 1. Comparisons of fewer than two samples are left out. Source: Holm (1979),
    by statsmodels; the test by SciPy.
    """
    import scipy.stats
    from statsmodels.stats.multitest import multipletests

    rows = []
    for domain in table["domain"].unique(maintain_order=True):
        own = table.filter(pl.col("domain") == domain)
        for name, (fact, hall, sign) in measures(layers).items():
            if not {fact, hall} <= set(own.columns):  # a table of the original lacks residual_consistency
                continue
            differences = sign * (own[hall].to_numpy().astype(float) - own[fact].to_numpy().astype(float))
            if len(differences) < 2:
                continue
            mean, sd = differences.mean(), differences.std(ddof=1)
            half = half_interval(differences)
            # Differences that are all equal, up to rounding, have no spread to test against.
            constant = sd <= 1e-12 * max(abs(mean), 1e-300)
            p = 1.0 if constant else scipy.stats.ttest_1samp(differences, 0).pvalue
            rows.append(
                {
                    "measure": name,
                    "domain": domain,
                    "n": len(differences),
                    "mean_difference": mean,
                    "low": mean - half,
                    "high": mean + half,
                    "cohens_d": 0.0 if constant else mean / sd,
                    "p": p,
                }
            )
    if not rows:
        return pl.DataFrame(
            schema=dict.fromkeys(COLUMNS, pl.Float64) | {"measure": pl.String, "domain": pl.String}
        )
    p_holm = multipletests([row["p"] for row in rows], method="holm")[1]
    return pl.DataFrame([row | {"p_holm": p} for row, p in zip(rows, p_holm.tolist(), strict=True)])


def half_interval(values: np.ndarray) -> float:
    """Half of the 95 % interval (t) of the mean of two or more values."""
    import scipy.stats

    return float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))


def as_text(comparison: pl.DataFrame) -> list[str]:
    """The comparison as lines: a row a measure, and for each domain the mean difference and Cohen's d."""
    if comparison.is_empty():
        return ["No domain has two samples, so nothing is compared."]
    domains = comparison["domain"].unique(maintain_order=True).to_list()
    lines = [
        "Hallucination against fact: mean difference (Cohen's d of the pairs); * p < 0.05 after Holm",
        f"{'measure':<28}" + "".join(f"{domain:>22}" for domain in domains),
    ]
    for name in comparison["measure"].unique(maintain_order=True):
        of_domain = {row["domain"]: row for row in comparison.filter(pl.col("measure") == name).to_dicts()}
        cells = [of_domain.get(domain) for domain in domains]
        lines.append(f"{name:<28}" + "".join(f"{cell_text(cell):>22}" for cell in cells))
    found = comparison.filter(pl.col("p_holm") < LEVEL).height
    plain = comparison.filter(pl.col("p") < LEVEL).height
    lines.append(
        f"{found} of {comparison.height} comparisons differ at 5 % after Holm's correction for all of them "
        f"({plain} before it; {LEVEL * comparison.height:.0f} would by chance)."
    )
    lines.append(
        "stability and the two consistencies: fact - hallucination; all others: hallucination - fact."
    )
    return lines


def cell_text(row: dict | None) -> str:
    """Mean difference, d, and a star if Holm leaves it."""
    if row is None:
        return "-"
    return f"{row['mean_difference']:+.3g} ({row['cohens_d']:+.2f}){'*' if row['p_holm'] < LEVEL else ' '}"
