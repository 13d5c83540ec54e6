"""What the commands of experiment 6 share. Importing it puts the project's root on the module path too."""

import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parent.parent
ROOT = EXPERIMENTS.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for checkpointing.py: atomic files, locks


class InputError(Exception):
    """Input or settings that cannot be used: one line that names the remedy; exit status 2."""


class AnalysisError(Exception):
    """An analysis that cannot go on: one line that says why; exit status 1."""
