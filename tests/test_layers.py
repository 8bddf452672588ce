"""Nothing imports upwards or in a cycle; the mathematics imports no Flax, no files, no models; files are short."""

import ast
import statistics
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "twla_jax"
# What stands in one row does not import one another; each imports those of the rows before. Modules that lie in no
# folder and stand in no row come before all, but for the package's own `__init__` and `__main__`.
LAYERS = (
    ("core",),
    ("refinement_settings",),
    ("recipe",),
    ("text",),
    ("ops",),
    ("models",),
    ("storage",),
    ("reports",),
    ("quantization", "inference"),
    ("refinement", "evaluation"),
    ("allocation",),
    ("bench", "integrations", "serving"),
    ("jobs",),
    ("cli",),
)
LEVEL = {folder: level for level, folders in enumerate(LAYERS) for folder in folders}


def modules():
    """Every module by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(("twla_jax", *path.relative_to(PACKAGE).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name, *, at_once=False):
    """What a module imports, by dotted names; `at_once` leaves out imports inside functions and those for types."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found = set()

    def visit(node):
        if at_once and (
            isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def level(name):
    """The row of a module; −1 for those in none."""
    first = name.split(".")[1]
    assert first in LEVEL or not (PACKAGE / first).is_dir(), f"{first} stands in no row of LAYERS"
    return LEVEL.get(first, -1)


INSIDE = sorted(name for name in MODULES if name not in ("twla_jax", "twla_jax.__main__"))


def allowed(name, other):
    """Whether a module may import another one of the library."""
    same_folder = level(name) < 0 or other.split(".")[1] == name.split(".")[1]
    return level(other) < level(name) or (same_folder and level(other) == level(name))


def test_nothing_imports_upwards():
    upwards = [
        f"{name} imports {other}"
        for name in INSIDE
        for other in imports(name)
        if other == "twla_jax" or (other.startswith("twla_jax.") and not allowed(name, other))
    ]
    assert not upwards


def test_the_mathematics_imports_no_flax_no_files_and_no_models():
    banned = {
        "flax",
        "orbax",
        "safetensors",
        "gguf",
        "transformers",
        "tokenizers",
        "pathlib",
        "os",
        "json",
        "io",
    }
    for name in INSIDE:
        if name.split(".")[1] == "core":
            tops = {other.split(".")[0] for other in imports(name)}
            assert not tops & banned, f"{name} imports {sorted(tops & banned)}"


def test_no_module_imports_itself_through_others():
    graph = {name: {other for other in imports(name, at_once=True) if other in MODULES} for name in INSIDE}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"cycle: {' → '.join([*path[path.index(name) :], name])}"
        if name in done or name not in graph:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in INSIDE:
        visit(name)


def test_files_and_functions_are_short():
    """The median file has at most 108 lines, the median function at most 5, its docstring not counted."""
    functions = []
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0] if ast.get_docstring(node) else None
                documented = first.end_lineno - first.lineno + 1 if first else 0
                functions.append(node.end_lineno - node.lineno + 1 - documented)
    files = [len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()]
    assert statistics.median(files) <= 108
    assert statistics.median(functions) <= 5
