"""Commands that pages, the Makefile and docstrings print are parsed by the programs that they call."""

import argparse
import configparser
import contextlib
import importlib
import json
import pathlib
import re
import shlex
import sys

import pytest
from absl import flags
from printed import ROOT, blocks_of, pages

from experiments import launch
from experiments.__main__ import COMMANDS, CONFIGS
from fedrag_jax.cli.command_line import parser

# Of ml_collections, which loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
DEFAULT = "configs/compare_strategies.py"
WITH_CONFIGS = {"experiments.choose_learning_rates", "experiments.benchmarks.compile_for"}
WITH_ARGPARSE = {"experiments.report": 1, "experiments.redraw": 2}  # and how many paths they take


def joined(text: str) -> str:
    """Returns text without the line breaks that a backslash continues."""
    return re.sub(r"\\\n\s*", "", text)


def lines_of(page: str) -> list[str]:
    """Returns the lines of a page's shell blocks, and its code within sentences."""
    blocks = [block for block in blocks_of(page) if not block.language]
    lines = [line for block in blocks for line in joined(block.text).splitlines()]
    prose = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return lines + [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]


def lines_of_others() -> dict[str, list[str]]:
    """Returns the lines of the Makefile, configs and docstrings, by file."""
    makefile = joined((ROOT / "Makefile").read_text())
    makefile = makefile.replace("$(COMPARE)", "python -m experiments compare_strategies")
    makefile = makefile.replace("$(REAL)", makefile.partition("REAL := ")[2].partition("\n")[0])
    found = {"Makefile": makefile.splitlines()}
    for folder in ("configs", "experiments", "fedrag_jax/cli"):
        for path in (ROOT / folder).rglob("*.py"):
            told = joined(path.read_text())
            found[str(path.relative_to(ROOT))] = re.sub(r"(?<=\S)   *", "  # ", told).splitlines()
    return found


PLACES = {page: lines_of(page) for page in pages()} | lines_of_others()


def words(line: str) -> list[str]:
    """Returns the words of a shell line up to a comment, a placeholder or the next command."""
    line = re.split(r" #|  #| \.\.\.| &|`|; ", line)[0]
    for quote in "\"'":
        if line.count(quote) % 2:  # of a command around this one, or an apostrophe
            line = line.rpartition(quote)[0]
    return [word for word in shlex.split(line) if not re.search(r"=(\.\.\.|N|\$i)$", word)]


def printed(pattern: str) -> list[tuple[str, str]]:
    """Returns what follows a pattern on a line, and the file that has it."""
    hits = [(place, re.search(pattern, line)) for place in PLACES for line in PLACES[place]]
    return [(place, hit.group(1)) for place, hit in hits if hit]


FEDRAG = printed(r"(?:^|[ /;])fedrag ((?:demo|index|ask|eval|train|serve|federate)\b.*)")
EXPERIMENTS = printed(r"python -m (experiments[ .].*)")


def refused(line: str) -> list[str]:
    """Returns the options of a line that `fedrag` does not know."""
    given = words(line)
    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    known, own = {"--help"}, [commands.choices[given[0]]]
    while own:
        known |= {option for action in own[0]._actions for option in action.option_strings}
        deeper = [a for a in own[0]._actions if isinstance(a, argparse._SubParsersAction)]
        own = own[1:] + [choice for action in deeper for choice in action.choices.values()]
    named = {word.partition("=")[0] for word in given if word.startswith("--")}
    return sorted(named - known)


def test_whole_lines_for_fedrag():
    lines = [
        command.group(1)
        for page in pages()
        for block in blocks_of(page)
        if not block.language
        for line in joined(block.text).splitlines()
        if (command := re.search(r"(?:^|/|PYTHONPATH=\. )fedrag (\w.*)", line))
    ]
    assert len(lines) > 15
    for line in lines:
        parser().parse_args(words(line))


def test_installs_have_the_extras_that_their_block_needs():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    known = {*setup["options.extras_require"]}
    blocks = [block.text for page in pages() for block in blocks_of(page) if not block.language]
    notebooks = (ROOT / "notebooks").glob("*.ipynb")
    blocks += ["\n".join(cells_of(path)) for path in notebooks]
    installs = 0
    for text in blocks:
        named = re.findall(r"pip install [^\n#]*\[([\w,-]+)\]", text)
        extras = {extra for one in named for extra in one.split(",")} - {"cuda12", "tpu"}
        assert extras <= known, text
        installs += bool(extras)
        if extras and "smollm2" in text:
            assert "gguf" in extras, text
        if extras and re.search(r"fedrag serve", text):
            assert "serve" in extras, text
    assert installs > 5


def cells_of(path: pathlib.Path) -> list[str]:
    """Returns the text of a notebook's cells."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]


def test_options_for_fedrag():
    assert len(FEDRAG) > 30
    wrong = {(place, line): why for place, line in FEDRAG if (why := refused(line))}
    assert not wrong


@contextlib.contextmanager
def parsed(line: str, monkeypatch):
    """The flags of a line of experiments, read as its program reads them.

    Raises:
      absl.flags.Error, AttributeError, KeyError, ValueError: a flag, a setting or a value is unknown.
    """
    first, *rest = words(line)
    if first == "experiments":
        name = rest.pop(0)
        assert name in COMMANDS, name
        config = f"configs/{CONFIGS.get(name, name)}.py"
    else:
        config = DEFAULT if first in WITH_CONFIGS else ""
    values = flags.FlagValues()
    if first != "experiments":
        for flag in flags_of(first):
            values[flag.name] = flag
    monkeypatch.setattr(sys, "argv", [first, *rest])  # where overrides of the config are found
    if config:
        launch.define_flags(config, values)
    left = values(sys.argv)
    assert left == [first], left[1:]
    yield values


TAKEN: dict[str, list[flags.Flag]] = {}  # by module


def take_flags() -> None:
    for name, found in flags.FLAGS.flags_by_module_dict().items():
        if name.startswith("experiments") and found:
            TAKEN[name] = [*found]
            flags.FLAGS.remove_flag_values([flag.name for flag in TAKEN[name]])


def flags_of(program: str) -> list[flags.Flag]:
    """Returns the flags of a program and of modules it uses; takes them from those of this process,
    because two programs may have flags of the same name."""
    take_flags()  # of programs that other tests have imported
    module = importlib.import_module(program)
    take_flags()
    used = {getattr(value, "__module__", "") for value in vars(module).values()}
    return [flag for name in {program, *used} for flag in TAKEN.get(name, ())]


@pytest.fixture
def own_flags():
    """Puts back what `flags_of` took, for tests that come later in this process."""
    yield
    for flag in (flag for found in TAKEN.values() for flag in found):
        if flag.name not in flags.FLAGS:
            flags.FLAGS[flag.name] = flag


@pytest.mark.usefixtures("own_flags")
def test_lines_for_experiments(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(EXPERIMENTS) > 90
    wrong = {}
    for place, line in EXPERIMENTS:
        first, *rest = words(line)
        if rest[:1] == ["--help"] or re.search(r"<\w+>|NAME\b|\$\(", line):
            continue
        if first in WITH_ARGPARSE:
            assert len(rest) >= WITH_ARGPARSE[first], line
            continue
        try:
            with parsed(line, monkeypatch):
                pass
        except (flags.Error, AssertionError, AttributeError, KeyError, ValueError) as error:
            wrong[place, line] = f"{type(error).__name__}: {error}"
    assert not wrong


@pytest.mark.usefixtures("own_flags")
@pytest.mark.parametrize(
    "line",
    [
        "experiments compare_strategies --config.nme=mine",
        "experiments compare_strategies --config.federated.clients=many",
        "experiments compare_strategies --distribute",
        "experiments compare_strategy",
        "experiments.choose_learning_rates --reader=1e-4",
    ],
)
def test_a_broken_line_is_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with (
        pytest.raises((flags.Error, AssertionError, AttributeError, KeyError, ValueError)),
        parsed(line, monkeypatch),
    ):
        pass


def test_a_broken_option_of_fedrag_is_found():
    assert refused("train system/ own.jsonl --to tuned/ --regimen=federated") == ["--regimen"]
