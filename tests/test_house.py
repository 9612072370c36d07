"""The house rules: imports point one way, files stay short, and asking for help costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "weft"
FILES = sorted(SOURCE.rglob("*.py"))
# cli > lab > serve, insight > train > plan > step, data, compat > adapters > methods, models > quant > kernels, core
LEVEL = {"core": 0, "kernels": 0, "quant": 1, "methods": 2, "models": 2, "adapters": 3, "step": 4, "data": 4, "compat": 4, "plan": 5,
         "train": 6, "serve": 7, "insight": 7, "lab": 8, "cli": 9}  # fmt: skip


def _imports(tree: ast.AST) -> list[tuple[str, int, bool]]:
    """(module, line, whether inside a function) of every import that runs; those under TYPE_CHECKING do not."""
    found: list[tuple[str, int, bool]] = []

    def walk(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((a.name, node.lineno, inside) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.extend((f"{node.module}.{a.name}", node.lineno, inside) for a in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(tree, False)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_keeps_to_its_room(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0]
    text = path.read_text(encoding="utf-8")
    most = 150 if room == "methods" else 400
    assert len(text.splitlines()) <= most, f"{path.name} has more than {most} lines"
    for module, line, inside in _imports(ast.parse(text)):
        parts = module.split(".")
        if inside:
            heavy = parts[0] in ("pyarrow", "datasets", "torch", "plotly", "tensorboard", "tensorboardX")
            assert room == "cli" or heavy, f"{path.name}:{line} imports {module} inside a function"
        if parts[0] == "weft" and len(parts) > 1 and parts[1] in LEVEL and room in LEVEL and parts[1] != room:
            lower, mine = LEVEL[parts[1]], LEVEL[room]
            assert lower < mine or (lower == mine == 0), f"{path.name}:{line}: {room}/ may not import {parts[1]}/"


@pytest.mark.parametrize("room", sorted({p.relative_to(SOURCE).parts[0] for p in FILES} - {"__init__.py", "__main__.py"}))
def test_every_room_has_its_place(room: str) -> None:
    assert room in LEVEL


def test_importing_weft_loads_nothing_heavy() -> None:
    code = "import sys, weft; print(sorted({'torch', 'transformers', 'jsonargparse', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_adapting_needs_torch_only() -> None:
    code = "import sys, weft; weft.adapt, weft.LoRA; print(sorted({'transformers', 'jsonargparse', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import weft

    for name in weft.__all__:
        assert getattr(weft, name) is not None
