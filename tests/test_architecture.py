"""Imports point one way, rooms stay small, and nothing heavy or forbidden sneaks in."""

import ast
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "fedrag_jax"
# Each room may import from itself and from those after it.
ORDER = ["cli", "server", "integrations", "systems", "strategies", "evaluation", "tracking",
         "rag", "rag_async", "rag_folder", "label_free", "federated", "objectives", "retrieval",
         "generation", "models", "data", "files", "clock", "errors"]  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_imports_point_down():
    for path in PACKAGE.rglob("*.py"):
        here = room(path)
        if here == "__init__":
            continue
        for module in imports(path):
            assert not module.startswith(("experiments", "tests", "torch")), f"{path}: {module}"
            if module.startswith("fedrag_jax."):
                there = module.split(".")[1]
                assert ORDER.index(there) >= ORDER.index(here), f"{path} imports {module}"


def test_federated_knows_neither_tracking_nor_evaluation():
    for name in (
        "label_free",
        "federated",
        "objectives",
        "retrieval",
        "generation",
        "models",
        "data",
    ):
        for path in (PACKAGE / name).rglob("*.py"):
            for module in imports(path):
                assert not module.startswith(("fedrag_jax.tracking", "fedrag_jax.evaluation"))


def test_modules_are_short():
    rooms = PACKAGE, ROOT / "experiments", ROOT / "configs", ROOT / "tests"
    for path in (path for room in rooms for path in room.rglob("*.py")):
        assert len(path.read_text().splitlines()) <= 400, path


def test_nothing_unpickles():
    pickling = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        assert not pickling & {module.split(".")[0] for module in imports(path)}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if node.func.attr == "load" and getattr(node.func.value, "id", "") in ("np", "jnp"):
                assert options.get("allow_pickle") is False, f"{path}:{node.lineno}"
            assert not options.get("trust_remote_code"), f"{path}:{node.lineno}"


def test_help_does_not_import_jax():
    code = (
        "import sys; import experiments.__main__, experiments.choose_learning_rates; "
        "assert 'jax' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_people_import_first_is_at_the_top_and_lazy():
    """Editors read the imports under TYPE_CHECKING; what comes when it runs must be the same."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    shown = {
        alias.asname or alias.name: [node.module, alias.name]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fedrag_jax.")
        for alias in node.names
    }
    code = (
        "import importlib, json, sys, fedrag_jax; assert 'jax' not in sys.modules; "
        "shown = json.loads(sys.argv[1]); "
        "assert {*fedrag_jax.__all__} == {*shown} <= {*dir(fedrag_jax)}; "
        "wrong = [name for name, (module, there) in shown.items() if getattr(fedrag_jax, name) "
        "is not getattr(importlib.import_module(module), there)]; "
        "assert not wrong, wrong; "
        "assert not hasattr(fedrag_jax, 'nothing'); "
        "from fedrag_jax.federated import fit; assert callable(fit.fit)"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(shown)], check=True, cwd=ROOT)
