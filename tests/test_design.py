"""The house as docs/design.md draws it: imports run one way, and nothing grows beyond its limits."""

import ast
import re

import pytest
from conftest import ROOT

from ablation.command_line import SECTIONS
from ablation.settings import setting_fields

FILES = sorted(
    path for pattern in ("*.py", "ablation/**/*.py", "scripts/*.py") for path in ROOT.glob(pattern)
)
TOOLS = ("report", "making", "inspection", "benchmark", "endurance", "device_check")
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module):
    """The word of the plan for a module: its own name, or that of its folder."""
    parts = module.split(".")
    return parts[1] if parts[0] == "ablation" and len(parts) > 1 else parts[0]


def imports():
    """(module, imported module) for every import between files of the project, wherever it stands."""
    names = {module_name(path) for path in FILES}
    pairs = set()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                continue
            pairs |= {(module_name(path), target) for target in targets if target in names}
    return {(module, target) for module, target in pairs if target not in (module, "ablation")}


def plan():
    """Line number of every room in the plan; lower in the house is a greater number."""
    text = (ROOT / "docs" / "design.md").read_text()
    drawing = text.split("```")[1].splitlines()
    return {name: number for number, line in enumerate(drawing) for name in line[13:50].split()}


def test_the_plan_has_every_room_and_imports_never_run_up():
    floors = plan()
    rooms = {room(module_name(path)) for path in FILES} - {"ablation"}
    assert set(floors) == rooms
    up = {(a, b) for a, b in imports() if room(a) != room(b) and floors[room(a)] > floors[room(b)]}
    assert not up


def test_no_imports_run_in_a_circle():
    below = {}
    for module, target in imports():
        below.setdefault(module, set()).add(target)

    def visit(module, above):
        assert module not in above, [*above, module]
        for target in below.get(module, ()):
            visit(target, [*above, module])

    for module in below:
        visit(module, [])


def test_scripts_are_commands_and_folders_are_tools():
    for path in (ROOT / "scripts").glob("[a-z]*.py"):
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in TREES[path].body), (
            path
        )
    folders = {path.name for path in (ROOT / "ablation").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(TOOLS)


def functions():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def test_functions_have_five_arguments_and_fifty_lines_at_most():
    for path, function in functions():
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        where = f"{path.relative_to(ROOT)}: {function.name}"
        assert len(names) <= 5, where
        lines = function.end_lineno - function.lineno + 1
        assert lines <= 50 or "50 lines" in (ast.get_docstring(function) or ""), where


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_has_400_lines_at_most_unless_it_says_why(path):
    docstring = ast.get_docstring(TREES[path])
    assert docstring
    too_long = len(path.read_text().splitlines()) > 400
    assert too_long == ("400 lines" in " ".join(docstring.split()))


def test_the_script_is_short_and_knows_nothing_of_the_tools_but_the_page():
    assert len((ROOT / "visual_ablation_experiment.py").read_text().splitlines()) < 300
    used = {room(target) for module, target in imports() if module == "visual_ablation_experiment"}
    assert used & {*TOOLS, "scripts"} <= {"report"}


def test_help_has_a_section_for_every_setting():
    listed = [name for names in SECTIONS.values() for name in names]
    assert set(listed) == set(setting_fields()) - {"named_layer_sets", "layer_sides"}  # for YAML alone
    assert len(set(listed)) == len(listed)


def test_a_name_means_one_thing():
    """No public name is defined in two modules, but for a command's main, its parser and the log."""
    same = {"main", "log", "build_parser", "parse_command_line"}
    homes = {}
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [
                    name.id
                    for target in node.targets
                    for name in ast.walk(target)
                    if isinstance(name, ast.Name)
                ]
            elif isinstance(node, ast.AnnAssign):
                names = [node.target.id]
            else:
                names = []
            for name in names:
                homes.setdefault(name, set()).add(module_name(path))
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1 and name not in same}
    assert not twice, twice


def test_nothing_imports_with_a_star():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*"), path


def test_one_file_puts_the_root_on_the_path():
    changing = [path.name for path in FILES if re.search(r"sys\.path\b", path.read_text())]
    assert changing == ["_root.py"]


def test_the_page_says_where_every_module_is_tested():
    page = (ROOT / "docs" / "design.md").read_text()
    table = page[page.index("| tests | of |") : page.index("`tests/oracles.py`")]
    named = set(re.findall(r"`(\w+)`", table))
    files = set(re.findall(r"`(test_\w+\.py)`", table))
    assert all((ROOT / "tests" / name).is_file() for name in files)
    own = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    commands = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    rooms = {room(module_name(path)) for path in FILES} - {
        "ablation",
        "scripts",
        "visual_ablation_experiment",
    }
    assert rooms <= named | own and named <= rooms
    unlisted = {path.name for path in (ROOT / "tests").glob("test_*.py")} - files
    assert all(name[5:-3] in rooms | commands for name in unlisted)
