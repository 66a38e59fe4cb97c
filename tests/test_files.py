"""Files cut in the middle, disks that are full, folders that two processes want."""

import os
import resource
import subprocess
import sys
import threading

import pytest

from fedrag_jax import files
from fedrag_jax.data import cache
from fedrag_jax.data.cache import recall, remember
from fedrag_jax.errors import ConfigError, DataError

HOLDS = (
    "import sys, pathlib; from fedrag_jax.files import hold; held = hold(pathlib.Path(sys.argv[1]))"
)


def in_another_process(code: str, *words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def test_a_folder_is_held_by_one_process_and_let_go_when_it_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS + "; print('held', flush=True); sys.stdin.read()", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"{folder} is held by another process"):
        files.hold(folder)
    holder.kill()
    holder.communicate()
    with files.hold(folder), files.hold(folder):  # again by the same process
        refused = in_another_process(HOLDS, folder)
        assert refused.returncode == 1 and "is held by another process" in refused.stderr
    assert in_another_process(HOLDS, folder).returncode == 0


@pytest.fixture
def small_disk():
    """No file of this process grows beyond 4,096 bytes; a disk that is full fails in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_cannot_be_written_is_named_and_stays_as_it_was(tmp_path, small_disk):
    path = tmp_path / "config.json"
    files.write_json(path, {"rounds": 5})
    with pytest.raises(ConfigError, match=f"{path} cannot be written .*: make room for it"):
        files.write_json(path, ["x" * 100] * 100)
    assert files.read_json(path) == {"rounds": 5}
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_block_that_fails_writes_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.whole(tmp_path / "table.md") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path, values = tmp_path / "config.json", [[0] * 20_000, [1] * 20_000]
    files.write_json(path, values[0])
    writer = threading.Thread(
        target=lambda: [files.write_json(path, values[i % 2]) for i in range(50)]
    )
    writer.start()
    while writer.is_alive():
        assert files.read_json(path) in values
    writer.join()


def test_what_is_damaged_is_named_and_can_be_made_again(tmp_path, capsys):
    path = tmp_path / "rates.json"
    assert files.kept(files.read_json, path) is None and not capsys.readouterr().err
    with pytest.raises(DataError, match=f"{path} cannot be read .No such file"):
        files.read_json(path)
    for content in (b"", b'{"chosen": 0.', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(files.DamagedError, match=f"{path} is damaged .*: delete it"):
            files.read_json(path)
        assert files.kept(files.read_json, path) is None
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{path} is damaged") and line.endswith("it is made again")


def test_what_is_remembered_survives_a_damaged_or_full_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEDRAG_CACHE", str(tmp_path))
    (tmp_path / "sizes.json").write_text('{"a": ')
    assert recall("sizes.json", "a") is None
    remember("sizes.json", "a", 3)
    assert recall("sizes.json", "a") == 3
    assert capsys.readouterr().err.count("is damaged") == 2
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(cache, "cache_folder", lambda: tmp_path / "file")
        remember("sizes.json", "a", 4)
    (line,) = capsys.readouterr().err.splitlines()
    assert "not kept for the next run" in line and "sizes.json cannot be written" in line
