"""Puts the project's root on the module path, so that a command runs from any folder.
Every command imports it first.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
