"""The pages for readers: links that lead somewhere, commands that are accepted, limits of size."""

import importlib
import re
import shlex

import pytest
import yaml
from conftest import ROOT

import visual_ablation_experiment as experiment
from ablation.command_line import parse_command_line

PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "data/*.md") for path in ROOT.glob(pattern))
BLOCK = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:scripts/(?:slurm/)?)?(\w+)\.(py|sh)$")


def ids(path):
    return str(path.relative_to(ROOT))


def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    prose = BLOCK.sub("", path.read_text())
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_link_leads_to_a_file_and_a_heading(page):
    links = LINK.findall(BLOCK.sub("", page.read_text()))
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_lines_are_short_but_for_tables(page):
    long = [line for line in page.read_text().splitlines() if len(line) > 110 and not line.startswith("|")]
    assert not long


def test_the_readme_is_short_and_leads_to_every_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 180 and max(map(len, lines)) <= 110
    text = "\n".join(lines)
    for page in PAGES:
        assert page.name == "README.md" or f"({page.relative_to(ROOT)})" in text, page
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert (ROOT / picture).stat().st_size < 150_000
    contents = text[text.index("**Contents**") :]
    assert re.findall(r"^- \[(.*)\]", contents, re.MULTILINE) == re.findall(
        r"^## (.*)", contents, re.MULTILINE
    )


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=ids)
def test_a_page_starts_with_the_question_that_it_answers(page):
    assert re.match(r"# .+: .+\?\n", page.read_text())


# --- commands


def commands(page):
    """Each command line of the page's code blocks as words, without redirections and comments."""
    found = []
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            if not re.match(r" *(nohup|python3|scripts/\w|\.venv/bin/python (?!-m)|\.ci/)", line):
                continue
            words = shlex.split(re.sub(r"\s[12]?>.*", "", line), comments=True)
            found.append(words[next(i for i, word in enumerate(words) if COMMAND.match(word)) :])
    return found


COMMANDS = [
    pytest.param(words, id=f"{page.name}: {shlex.join(words)[:70]}")
    for page in PAGES
    for words in commands(page)
]


def help_of(name, capsys):
    """What --help of a command of scripts/ prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_of_a_page_is_accepted(words, capsys):
    program, arguments = words[0], words[1:]
    name, kind = COMMAND.match(program).groups()
    assert (ROOT / program).is_file()
    if program == "visual_ablation_experiment.py" or name in ("run", "submit"):
        parse_command_line(arguments, experiment.__doc__)
    elif kind == "py":
        flags = {word for word in arguments if word.startswith("--")}
        assert flags <= set(re.findall(r"--[a-z][a-z-]*", help_of(name, capsys)))
    else:  # the rest of its arguments are pytest's
        assert name == "test" and {word for word in arguments if word.startswith("--")} <= {"--all"}


def test_every_flag_in_the_prose_belongs_to_a_command(capsys):
    names = [path.stem for path in (ROOT / "scripts").glob("[a-z]*.py")] + ["visual_ablation_experiment"]
    known = set(re.findall(r"--[a-z][a-z-]*", "".join(help_of(name, capsys) for name in names)))
    known |= {"--all", "--check"}  # of scripts/test.sh, of ruff format
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text())):
            assert set(re.findall(r"(?<!\w)--[a-z][a-z-]*", span)) <= known, (page.name, span)


# --- beside the README


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "MIT" and "MIT License" in (ROOT / "LICENSE").read_text()


def test_contributing_names_tests_and_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for name in re.findall(r"`(\w+/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
