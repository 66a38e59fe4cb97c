"""Files that are written whole or not at all, and folders that one process writes into at a time."""

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
    """A file that was cut or overwritten, and can be made again.

    Attributes:
      why: for people.
    """

    def __init__(self, path: pathlib.Path, why: object):
        super().__init__(
            f"{path} is damaged ({why}): delete it, and the same command makes it again"
        )
        self.path, self.why = path, why


def hold(folder: pathlib.Path) -> filelock.AcquireReturnProxy:
    """Takes a folder, made if absent, for this process; others are refused until it is let go.

    It is let go at the end of a `with` block over what is returned, when that is garbage, and when the
    process ends, killed or not. The same process may take it more than once.

    Raises:
      ConfigError: another process holds it; it cannot be written.
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
    """Says which file or folder it is that cannot be written.

    Raises:
      ConfigError: what is done inside raised an OSError, or what safetensors makes of one.
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
    """Opens a file for writing under another name: it takes its place when the block ends.

    A block that fails, a full disk or a kill leave what was there before.

    Args:
      how: options of `open`; text is UTF-8.

    Raises:
      ConfigError: it cannot be written.
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
    """A text file, as `whole` does it."""
    with whole(path) as file:
        file.write(text)


def write_json(path: pathlib.Path, value: Any, indent: int | None = None) -> None:
    """A JSON file, as `whole` does it."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds.

    Raises:
      DataError: it cannot be read.
      DamagedError: it is not whole.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DamagedError(path, error) from error


def kept(read: Callable[[pathlib.Path], Result], path: pathlib.Path) -> Result | None:
    """What a file holds that can be made again; None if there is none or, as is told, a damaged one."""
    if not path.exists():
        return None
    try:
        return read(path)
    except DamagedError as error:
        print(f"{error.path} is damaged ({error.why}): it is made again", file=sys.stderr)
        return None
