"""Who may import whom, so that the tree stays what it says it is."""

import ast
import shutil
from pathlib import Path

import pytest

import dmgal_hf
from dmgal_hf.hub.upload import collect_files

PACKAGE = Path(dmgal_hf.__file__).parent
BELOW = {
    "model": set(),
    "data": {"model"},
    "hub": {"model", "data"},
    "inference": {"model", "data"},
    "training": {"model", "data", "hub"},
}


def imported_rooms(path):
    """Folders of dmgal_hf that a module imports from; "dmgal_hf" for the package itself."""
    own = path.parent.relative_to(PACKAGE.parent).parts
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = own[: len(own) - node.level + 1] if node.level else ()
            module = [*above, *(node.module.split(".") if node.module else [])]
            names = [module] if len(module) != 1 or not node.level else [[*module, alias.name] for alias in node.names]
        for name in names:
            if name[0] == "dmgal_hf":
                yield name[1] if len(name) > 1 else "dmgal_hf"
            elif name[0] in ("scripts", "tests"):
                yield name[0]


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_from_the_floors_below_alone(room):
    modules = sorted((PACKAGE / room).glob("*.py"))
    assert len(modules) > 3
    for module in modules:
        assert set(imported_rooms(module)) <= BELOW[room] | {room}, module.name


def test_all_rooms_are_known_and_say_what_lives_there():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == BELOW.keys()
    for room in rooms:
        assert len(ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())).splitlines()) >= 2


def test_a_checkpoint_ships_exactly_the_room_of_the_model(tmp_path):
    shutil.copytree(Path(__file__).parent / "fixtures" / "checkpoint_v1", tmp_path / "run")
    shipped = {name for name in collect_files(tmp_path / "run") if name.endswith(".py")}
    assert shipped == {path.name for path in (PACKAGE / "model").glob("*.py")} - {"__init__.py"}
