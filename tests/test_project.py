"""What the files of the project say of each other holds."""

import configparser
import pathlib
import re

import yaml

import fedrag_jax

ROOT = pathlib.Path(__file__).parent.parent


def setup() -> configparser.ConfigParser:
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg")
    return read


def test_one_version_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == fedrag_jax.__version__
    assert cited["license"] == setup()["metadata"]["license"]
    assert f"\n## {fedrag_jax.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_tests_the_versions_that_are_promised():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    classifiers = setup()["metadata"]["classifiers"]
    assert tested == re.findall(r"Python :: (3\.\d+)", classifiers)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    asked = {step["run"].split()[1] for step in steps if step.get("run", "").startswith("make ")}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert asked == {"lint", "pytest", "docs"} <= {*targets}


def test_extras_that_pages_name_are_there():
    known = {*setup()["options.extras_require"]}
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        extra
        for page in pages
        for given in re.findall(r"'\.\[([\w,-]+)\]'", page.read_text())
        for extra in given.split(",")
    }
    assert named and named <= known
    # What the suite checks is installed for it.
    tested = setup()["options.extras_require"]["test"]
    for extra in known - {"docs", "test", "tpu", "flower"}:
        for line in setup()["options.extras_require"][extra].split("\n"):
            assert line in tested, f"{extra}: {line}"


def test_templates_and_hooks_are_read():
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(path.read_text()), path
