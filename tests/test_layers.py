"""The rooms: who imports whom, what files are called, and what an import costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("wan_finetune", "data", "train")  # each may import itself and those before it
HEAVY = ("torch", "diffusers", "peft", "transformers")


def room_files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def imported_names(source: str, package: str) -> Iterator[str]:
    """Absolute dotted name of everything that a module of `package` imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, *filter(None, [base])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("__import__", "import_module", "importlib.import_module"):
                yield str(node.args[0].value)


def imports_of(path: Path) -> set[str]:
    return set(imported_names(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parent.parts)))


def test_the_import_reader_sees_every_form_of_import():
    source = """
import train.plan as plan
from . import names
from ..pocket import world
def late():
    from data import clips
    importlib.import_module("train.trainer")
"""
    assert set(imported_names(source, "wan_finetune.formats")) == {
        "train.plan",
        "wan_finetune.formats",
        "wan_finetune.formats.names",
        "wan_finetune.pocket",
        "wan_finetune.pocket.world",
        "data",
        "data.clips",
        "train.trainer",
    }


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_downward_only(room):
    above = ROOMS[ROOMS.index(room) + 1 :]
    files = room_files(room)
    assert files, f"{room}/ holds no Python file"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imports_of(path))
        if name.split(".")[0] in above
    ]
    assert not wrong, wrong


def test_only_the_resolver_knows_the_pocket_model():
    # The pocket model is one base among others: code that knew it would work for it alone.
    pocket = ROOT / "wan_finetune" / "pocket"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in room_files(*ROOMS)
        if not path.is_relative_to(pocket) and path != ROOT / "wan_finetune" / "experts.py"
        for name in sorted(imports_of(path))
        if name == "wan_finetune.pocket" or name.startswith("wan_finetune.pocket.")
    ]
    assert not wrong, wrong


def test_no_file_is_named_after_nothing():
    names = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [path for path in room_files(*ROOMS, "tests", "benchmarks") if path.stem in names]


def test_nothing_is_left_for_later():
    mark = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    files = [*room_files(*ROOMS, "tests", "benchmarks"), *(ROOT / "configs").rglob("*.toml")]
    files += [ROOT / "launch.sh", ROOT / ".ci" / "run", ROOT / "pyproject.toml"]
    assert not [path for path in files if mark.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    "modules",
    [
        "wan_finetune, wan_finetune.settings",
        "wan_finetune.cli",
        "train.config",
        "train.plan, train.plan_view",
        "data.check",
    ],
)
def test_what_answers_at_once_imports_nothing_heavy(modules):
    # torch takes 2 s to import, peft and diffusers' Wan classes about 10 s each: --help waits for none.
    code = f"import sys, {modules}; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
