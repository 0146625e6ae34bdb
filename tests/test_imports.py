"""Who imports whom: no circle, annotations and imports inside functions counted, and no arrow up."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("utils", "model", "pipeline", "scripts")
FORBIDDEN = {
    "utils": ("model", "pipeline", "scripts", "train"),
    "model": ("pipeline", "scripts", "train"),
    "pipeline": ("scripts", "train"),
    "pipeline.generate": ("pipeline.train",),
    "pipeline.data": ("pipeline.train", "pipeline.generate"),
}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
FILES |= {name: ROOT / f"{name}.py" for name in ("train", "inference_packforcing")}


def imports(path):
    """Our own modules that a file names in any import statement."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys()


GRAPH = {name: imports(path) - {name} for name, path in FILES.items()}


def below(name, package):
    return name == package or name.startswith(f"{package}.")


def test_the_graph_is_seen():
    assert len(GRAPH) > 90 and "model.rope" in GRAPH["model.kv"] and "utils.config" in GRAPH["utils.cli"]


def test_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_arrow_up(package):
    arrows = [(name, other) for name in GRAPH if below(name, package) for other in GRAPH[name]]
    assert arrows
    assert not [pair for pair in arrows if any(below(pair[1], above) for above in FORBIDDEN[package])]
