"""The rooms import downwards only (the table in the README's section on the house)."""
import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tinychat"

# room: the rooms it may import; errors is open to all. Order is from the ground up.
WALLS = {
    "errors": (),
    "gguf_file": ("gguf_tables", "_kernels"),
    "gguf_tables": (),
    "ops": ("_kernels", "gguf_file"),
    "images": (),
    "models": ("ops", "gguf_file", "images"),
    "engine": ("models", "ops"),
    "text": ("_kernels", "gguf_file"),
    "sse": (),
    "mcp": ("sse",),
    "contract": ("images",),
    "library": ("engine", "text", "models", "ops", "gguf_file", "images"),
    "store": ("contract",),
    "output": (),
    "chat": ("engine", "text", "mcp", "library", "store", "contract", "output"),
    "server": ("chat", "mcp", "sse", "contract", "library", "store"),
}
DOORS = {"cli", "bench", "api", "__init__", "__main__"}  # the doors for people may import everything


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path):
    """(line, room) of each import of ours, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the walls"
            names = ([f"tinychat.{alias.name}" for alias in node.names] if node.module == "tinychat"
                     else [node.module])
        else:
            continue
        for name in names:
            if name.startswith("tinychat."):
                yield node.lineno, name.split(".")[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_its_walls_allow(path):
    room = room_of(path)
    if room in DOORS:
        return
    assert room in WALLS, f"{room} is a new room: give it its walls"
    for line, other in imported_rooms(path):
        assert other in (room, "errors", *WALLS[room]), f"{path}:{line}: {room} may not import {other}"


def test_engine_and_text_never_meet():
    for room in ("engine", "text"):
        assert not {"engine", "text"} - {room} & set(WALLS[room])
