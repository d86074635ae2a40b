"""Arrows between rooms point one way, and what must be quick or free of jax to import is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ["model", "data", "inference", "train", "evals", "serve", "configs", "experiments", "benchmarks"]
MAY_IMPORT = {
    "model": set(),
    "data": set(),
    "inference": {"model", "data"},
    "train": {"model", "data", "inference"},
    "evals": {"inference", "data", "model"},
    "serve": {"inference", "evals", "data"},
    "configs": {"model", "data"},
    "experiments": set(ROOMS),
    "benchmarks": set(ROOMS),
}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / room).is_dir()])
def test_a_room_imports_only_the_rooms_it_may(room):
    assert files_of(room)
    for path in files_of(room):
        forbidden = imports(path) & (set(ROOMS) | {"tests"}) - MAY_IMPORT[room] - {room}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_data_never_imports_jax():
    for path in files_of("data"):
        assert not imports(path) & {"jax", "jaxlib", "flax", "optax", "orbax"}, path


@pytest.mark.parametrize(
    "module", ["model.config", "model.presets", "model.convert.families", "data.config", "train.config", "experiments.config"]
)
def test_configs_are_read_without_jax(module):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom experiments.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'jax', 'numpy', 'ml_collections', 'tokenizers'} & set(sys.modules)\nassert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "loam run" in result.stdout
