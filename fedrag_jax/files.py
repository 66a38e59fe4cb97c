"""Atomic file writes, and folders that only one process writes to at a time."""

import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

import filelock
import safetensors

from fedrag_jax.errors import ConfigError, DataError

LOCK = ".lock"
Result = TypeVar("Result")


class DamagedError(DataError):
    """A truncated or overwritten file that can be created again.

    Attributes:
      why: the reason, as text for the user.
    """

    def __init__(self, path: pathlib.Path, why: object):
        super().__init__(
            f"{path} is damaged ({why}): delete it, and the same command makes it again"
        )
        self.path, self.why = path, why


def hold(folder: pathlib.Path) -> filelock.AcquireReturnProxy:
    """Locks a folder for this process, creating it if absent; other processes are refused.

    The lock is released at the end of a `with` block over the returned object, when that object is
    garbage-collected, and when the process ends or is killed. The same process may lock it repeatedly.

    Raises:
      ConfigError: another process holds the folder, or the folder cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.resolve() / LOCK
        lock = filelock.FileLock(path, timeout=0, thread_local=False, is_singleton=True)
        try:
            return lock.acquire()
        except filelock.Timeout as error:
            raise ConfigError(
                f"{folder} is held by another process, which writes there: wait for it to end, or "
                "choose another folder"
            ) from error


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns write errors inside the block into an error that names the file or folder.

    Raises:
      ConfigError: the block raised an OSError, or the safetensors error for one.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        where, why = getattr(error, "filename", None), getattr(error, "strerror", None)
        raise ConfigError(
            f"{where or path} cannot be written ({why or error}): make room for it, or choose another "
            "folder"
        ) from error


@contextlib.contextmanager
def whole(path: pathlib.Path, mode: str = "w", **how) -> Iterator[IO]:
    """Opens a temporary file for writing, which replaces `path` when the block ends.

    If the block fails, the disk is full or the process is killed, the old file remains.

    Args:
      how: options of `open`; text is UTF-8.

    Raises:
      ConfigError: the file cannot be written.
    """
    if "b" not in mode:
        how = {"encoding": "utf-8"} | how
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(beside, mode, **how) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # else the new name may outlive the content in a power cut
            beside.replace(path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            if getattr(error, "filename", None) == str(beside):
                error.filename = str(path)  # the name that people know
            raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file atomically, with `whole`."""
    with whole(path) as file:
        file.write(text)


def write_json(path: pathlib.Path, value: Any, indent: int | None = None) -> None:
    """Writes a JSON file atomically, with `whole`."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      DataError: the file cannot be read.
      DamagedError: the file is incomplete.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DamagedError(path, error) from error


def kept(read: Callable[[pathlib.Path], Result], path: pathlib.Path) -> Result | None:
    """Returns the content of a recomputable file; None if it is absent or, with a message, damaged."""
    if not path.exists():
        return None
    try:
        return read(path)
    except DamagedError as error:
        print(f"{error.path} is damaged ({error.why}): it is made again", file=sys.stderr)
        return None
