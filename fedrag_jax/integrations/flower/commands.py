"""Starts Flower's programs for a federation: SuperLink, SuperNodes and the command line `flwr`.

TLS and the authentication of nodes are always on. No program installs an app's dependencies, and none
reports to Flower's makers.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedrag_jax.errors import ConfigError, FedragError
from fedrag_jax.files import write_text, writing
from fedrag_jax.integrations.flower.certificates import CA, CERTIFICATE, KEY

NODE_PORT = 9094
LINK = "fedrag-link"  # the SuperLink, in Flower's own configuration
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class FlowerError(FedragError):
    """One of Flower's programs failed."""


def environment(home: pathlib.Path) -> dict[str, str]:
    """Returns the environment of Flower's programs, which keep their files in `home`."""
    programs = str(pathlib.Path(sys.executable).parent)
    path = os.pathsep.join([programs, os.environ.get("PATH", "")])
    return os.environ | QUIET | {"FLWR_HOME": str(home), "PATH": path}


def superlink(
    certificates: pathlib.Path, database: pathlib.Path, host: str, port: int
) -> list[str]:
    """Returns the command line of a SuperLink, the server's side, which also runs the ServerApp."""
    return [
        program("flower-superlink"),
        *("--host", host, "--port", str(port)),
        *("--ssl-ca-certfile", str(certificates / CA)),
        *("--ssl-certfile", str(certificates / CERTIFICATE)),
        *("--ssl-keyfile", str(certificates / KEY)),
        *("--database", str(database)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
    ]


def supernode(
    address: str,
    ca: pathlib.Path,
    key: pathlib.Path,
    config: Mapping[str, bool | int | str],
    port: int = NODE_PORT,
) -> list[str]:
    """Returns the command line of a SuperNode, a party's side, which runs a ClientApp for each message.

    Args:
      address: `host:port` of the SuperLink.
      config: configuration of the node; it does not leave the party.
      port: local port at which the ClientApp reaches its node; different for each node of a machine.
    """
    told = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
    return [
        program("flower-supernode"),
        *("--superlink", address),
        *("--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(key)),
        *("--node-config", told),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def connect(home: pathlib.Path, address: str, ca: pathlib.Path) -> None:
    """Writes the address of the SuperLink into the configuration of `flwr`."""
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
    write_text(
        home / "config.toml",
        f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress = "{address}"\n'
        f'root-certificates = "{ca.absolute()}"\n',
    )


def register(home: pathlib.Path, public_key: pathlib.Path, name: str) -> None:
    """Registers the node with a public key; does nothing if it is registered already.

    Raises:
      FlowerError: the SuperLink does not answer, or refuses.
    """
    found = flwr(home, "supernode", "register", str(public_key), LINK, "--name", name)
    if found.returncode and "already in use" not in found.stdout + found.stderr:
        raise FlowerError(f"{public_key}: {(found.stderr or found.stdout).strip()}")


def flwr(home: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `flwr` to its end, in `home`: elsewhere it could take a folder with the SuperLink's name for
    an app."""
    command = [program("flwr"), *arguments]
    return subprocess.run(
        command,
        env=environment(home),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def start_run(home: pathlib.Path, folder: pathlib.Path, changes: Sequence[str] = ()) -> str:
    """Starts a run of the app in a folder; returns its number.

    Args:
      changes: `key=value` of the run's configuration.

    Raises:
      FlowerError: the app or the configuration is refused.
    """
    chosen = ["--run-config", " ".join(changes)] if changes else []
    where = str(folder.absolute())
    started = flwr(home, "run", where, LINK, "--format", "json", *chosen)
    number = _json(started).get("run-id")
    if not number:
        raise FlowerError((started.stderr or started.stdout).strip())
    return number


def status(home: pathlib.Path, run: str) -> str:
    """Returns the status of a run, such as "running" or "finished:failed"; "" if it is unknown."""
    found = _json(flwr(home, "ls", LINK, "--run-id", run, "--format", "json"))
    return found["runs"][0]["status"] if found.get("runs") else ""


def _json(done: subprocess.CompletedProcess) -> dict[str, Any]:
    try:
        return json.loads(done.stdout)
    except ValueError:
        return {}


def wait_for_link(home: pathlib.Path, link: subprocess.Popen, patience: float = 600.0) -> None:
    """Waits until the SuperLink answers.

    Raises:
      FlowerError: it does not answer in time, or has ended.
    """
    end = time.monotonic() + patience
    while (found := flwr(home, "ls", LINK)).returncode:
        if link.poll() is not None:
            raise FlowerError(f"the SuperLink ended with {link.returncode}: see its log")
        if time.monotonic() > end:
            raise FlowerError(
                f"no SuperLink answers after {patience:g} s: {(found.stderr or found.stdout).strip()}"
            )
        time.sleep(0.5)


@contextlib.contextmanager
def running(command: list[str], patience: float = 30.0, **how: Any) -> Iterator[subprocess.Popen]:
    """Runs a program until the end of the block; then ends it and all processes that it started.

    Args:
      patience: seconds that the program has to end, before it is killed.
      how: arguments of `Popen`.
    """
    # A separate session: Flower's programs start others, and leave them behind.
    process = subprocess.Popen(command, start_new_session=True, **how)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def program(name: str) -> str:
    """Returns the path of one of Flower's programs.

    Raises:
      ConfigError: the program is not beside this Python.
    """
    path = pathlib.Path(sys.executable).parent / name
    if not path.exists():
        raise ConfigError(f"{path} is missing: install flwr for {sys.executable}")
    return str(path)
