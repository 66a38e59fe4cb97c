"""The Python of README and the site runs, a page from top to bottom, as it is printed.

Blocks that need a server, a hub model or an extra say so in a comment above them (`printed.MARK`).
Their names, attributes and arguments must exist, as those of all others.
"""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from printed import ROOT, blocks_of, pages, python_of, script

import fedrag_jax as fr

PAGES = [page for page in pages() if python_of(page)]
OF_ITS_OWN = {
    "docs/label_free.md": "tests/test_documents.py gives it passages",
    "docs/deploying.md": "tests/federation runs the same in an environment with Flower",
}
LONG = {"docs/getting-started.md", "docs/how-to.md"}  # every block takes more than seconds
SLOW = [page for page in PAGES if page in LONG or any(block.slow for block in python_of(page))]
BRIEF = {"docs/federated.md"}  # run with one round of one step
# What readers of a page know without its telling.
KNOWN = {
    "docs/deploying.md": """\
from fedrag_jax.data.examples import Example
from fedrag_jax.federated.algorithms.fed_avg import fed_avg
from fedrag_jax.integrations.flower.party import client_app
from fedrag_jax.integrations.flower.plan import Plan
from fedrag_jax.integrations.flower.server import server_app
from fedrag_jax.objectives.task import Task
task: Task = ...
my_examples: list[Example] = ...
""",
}

# What the type checker reports of a name that nothing has; other libraries may be absent.
FAULTS = {
    "missing-import", "missing-module-attribute", "missing-attribute", "unknown-name", "unbound-name",
    "unexpected-keyword", "missing-argument", "bad-argument-count",
}  # fmt: skip
OF_OTHERS = re.compile(r"Cannot find module `(?!fedrag_jax|experiments|configs)")


def run(page: str, slow: bool) -> dict:
    blocks = [block for block in python_of(page) if block.runs() and (slow or not block.slow)]
    code = script(blocks)
    if page in BRIEF:
        code = re.sub(r'\b(rounds|local_steps)(=|": )\d+', r"\g<1>\g<2>1", code)
    scope = {"__name__": "printed"}
    exec(compile(code, page, "exec"), scope)
    return scope


@pytest.mark.parametrize("page", [p for p in PAGES if p not in LONG | {*OF_ITS_OWN}])
def test_it_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = run(page, slow=False)
    if page in ("README.md", "docs/objectives.md"):
        first, last = scope["result"].history[0], scope["result"].history[-1]
        assert last["loss"] < first["loss"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated")  # by jax-privacy 2.0
@pytest.mark.parametrize("page", [p for p in SLOW if p not in OF_ITS_OWN])
def test_it_runs_with_its_slow_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = run(page, slow=True)
    if page == "docs/objectives.md":
        told = scope["result"].history[0]["metrics"]
        assert {"reward", "entropy", "searches", "malformed"} <= {*told}


def faults(folder: pathlib.Path, scripts: dict[str, str]) -> list[str]:
    """Returns what scripts use and nothing has (names, attributes, arguments), as "page:line: what"."""
    (folder / "pyrefly.toml").write_text(f'preset = "default"\nsearch-path = ["{ROOT}"]\n')
    paths = {folder / f"page_{i}.py": page for i, page in enumerate(scripts)}
    for path, page in paths.items():
        path.write_text(scripts[page])
    checked = subprocess.run(
        [sys.executable, "-m", "pyrefly", "check", "--output-format=json", *map(str, paths)]
        + [f"--python-interpreter-path={sys.executable}"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert checked.returncode in (0, 1), checked.stderr
    found = [
        f"{paths[folder / error['path']]}:{error['line']}: {error['concise_description']}"
        for error in json.loads(checked.stdout)["errors"]
        if error["name"] in FAULTS and not OF_OTHERS.search(error["concise_description"])
    ]
    # The package loads its names on demand, so that the type checker lets any pass.
    for page, code in scripts.items():
        for number, line in enumerate(code.splitlines(), 1):
            for name in {*re.findall(r"\bfr\.(\w+)", line)} - {*fr.__all__}:
                found.append(f"{page}:{number}: fedrag_jax has no {name}")
    return found


def with_what_is_known(page: str) -> str:
    """Returns the whole page as a script; what readers know is in the lines above its first block."""
    code, known = script(python_of(page)), KNOWN.get(page, "")
    above = "\n" * known.count("\n")
    assert code.startswith(above)
    return known + code.removeprefix(above)


def test_names_and_arguments_exist_even_where_a_block_does_not_run(tmp_path):
    assert faults(tmp_path, {page: with_what_is_known(page) for page in PAGES}) == []


BROKEN = """\
import fedrag_jax as fr
from fedrag_jax.federated.privacy import step
system = fr.RAGSystem.bild([])
fr.RAGSystem.build([], retriver="minilm")
fr.fed_avg(local_step=3)
fr.load_dataset()
passages
fr.fed_average()
"""


def test_a_broken_fragment_is_found(tmp_path):
    found = faults(tmp_path, {"docs/broken.md": BROKEN})
    assert [fault.split(":")[1] for fault in found] == ["2", "3", "4", "5", "6", "7", "8"], found


def test_blocks_that_do_not_run_say_why():
    """A page has no Python without the word behind its fence, and each comment is understood."""
    for page in pages():
        text = (ROOT / page).read_text()
        marks = [line for line in text.splitlines() if re.match(r"<!-- (slow|needs|not run)", line)]
        blocks = blocks_of(page)
        marked = [block for block in blocks if block.slow or block.needs or block.not_run]
        assert len(marks) == len(marked), page
        for block in blocks:
            if not block.language:
                assert not re.search(r"^(import|from) \w+", block.text, re.MULTILINE), block
