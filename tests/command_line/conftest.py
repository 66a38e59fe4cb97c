"""The folder that `fedrag index` makes, for the commands that only read it."""

import pytest
from documents import write_documents

from fedrag_jax.cli.command_line import main


@pytest.fixture(scope="session")
def system(tmp_path_factory):
    """The folder of a system over documents."""
    folder = tmp_path_factory.mktemp("cli")
    documents = write_documents(folder / "documents")
    assert main(["index", str(documents), "--to", str(folder / "system"), "--quiet"]) == 0
    return folder / "system"
