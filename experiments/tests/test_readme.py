"""The page of experiment 6: its links, files and flags are there."""

import re

import pytest
from conftest import EXPERIMENTS, script
from sae_analysis.rows import columns
from sae_analysis.settings import parser_of

TEXT = (EXPERIMENTS / "README.md").read_text()


def test_flags_belong_to_a_command(capsys):
    known = {flag for action in parser_of("", True)._actions for flag in action.option_strings}
    for name in ("benchmark_versions.py", "visualize_comprehensive.py"):
        with pytest.raises(SystemExit):
            script(name).main(["--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", TEXT)) <= known


def test_files_and_columns_are_there_and_lines_are_short():
    names = re.findall(r"^\| `(\w+\.(?:py|sh)|\w+/)[` ]", TEXT, re.MULTILINE)
    assert len(names) > 5 and all((EXPERIMENTS / name).exists() for name in names)
    assert "BENCHMARK" not in TEXT
    known = {re.sub(r"^l\d+_(fact|hall)_", "lL_T_", name) for name in columns((5, 12, 20))}
    for name in re.findall(r"`(lL_T_\w+|\w+_\*)`", TEXT):
        assert any(column.startswith(name.rstrip("*")) for column in known), name
    assert max(len(line) for line in TEXT.splitlines() if not line.startswith("|")) <= 110
