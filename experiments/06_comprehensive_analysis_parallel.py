#!/usr/bin/env python3
"""Experiment 6, batched: what SAE features tell of facts and hallucinations.

The numbers are those of 06_comprehensive_analysis.py, which reads one text at a time.
"""

import functools
import sys

from sae_analysis import program
from sae_analysis.batches import plan, rows_of
from sae_analysis.language_model import load_tokenizer, tokenise
from sae_analysis.workers import results


def measure(work: program.Work) -> None:
    """Measure the batches that have a sample which is not finished."""
    settings, run = work.settings, work.run
    with work.clock("load"):
        tokenizer = load_tokenizer(settings, work.toy)
    with work.clock("tokenise"):
        batches = plan(work.samples, functools.partial(tokenise, tokenizer), settings.batch_size)
    missing = [batch for batch in batches if any(text.sample_id not in run.rows for text in batch)]

    def counted():
        for batch, measured, seconds in results(missing, settings, work.toy):
            for stage, value in seconds.items():
                work.clock.add(stage, value)
            yield batch, measured
            progress.advance(len(run.rows) - progress.done, len(batch))

    with work.progress(sum(map(len, missing))) as progress:
        for rows in rows_of(work.samples, settings.layers, counted()):
            with work.clock("write"):
                run.add([row for row in rows if row["sample_id"] not in run.rows])


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    return program.main(argv, __doc__ or "", measure, batched=True)


if __name__ == "__main__":
    sys.exit(main())
