"""Flower's programs as a federation starts them: SuperLink, SuperNodes, and what is told to them.

TLS and the authentication of nodes are always on. No program installs what an app asks for, and none
reports to Flower's makers.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fedrag_jax.errors import ConfigError, FedragError
from fedrag_jax.files import write_text, writing
from fedrag_jax.integrations.flower.certificates import CA, CERTIFICATE, KEY

PORT, NODE_PORT = 9092, 9094
LINK = "fedrag-link"  # the SuperLink, in Flower's own configuration
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


class FlowerError(FedragError):
    """A program of Flower's that failed."""


def environment(home: pathlib.Path) -> dict[str, str]:
    """That of Flower's programs; what they keep is in `home`."""
    programs = str(pathlib.Path(sys.executable).parent)
    path = os.pathsep.join([programs, os.environ.get("PATH", "")])
    return os.environ | QUIET | {"FLWR_HOME": str(home), "PATH": path}


def superlink(
    certificates: pathlib.Path, database: pathlib.Path, host: str, port: int
) -> list[str]:
    """The command line of a SuperLink: the server's side, which runs the ServerApp as well."""
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
    config: Mapping[str, int | str],
    port: int = NODE_PORT,
) -> list[str]:
    """The command line of a SuperNode: a party's side, which runs the ClientApp for each message.

    Args:
      address: `host:port` of the SuperLink.
      config: of the node, which stays with it.
      port: on this machine's loopback, where the ClientApp finds its node; every node another.
    """
    told = " ".join(f'{n}="{v}"' if isinstance(v, str) else f"{n}={v}" for n, v in config.items())
    return [
        program("flower-supernode"),
        *("--superlink", address),
        *("--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(key)),
        *("--node-config", told),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def connect(home: pathlib.Path, address: str, ca: pathlib.Path) -> None:
    """Tells Flower's command line where the SuperLink is."""
    with writing(home):
        home.mkdir(parents=True, exist_ok=True)
    write_text(
        home / "config.toml",
        f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress = "{address}"\n'
        f'root-certificates = "{ca.absolute()}"\n',
    )


def register(home: pathlib.Path, public_key: pathlib.Path, name: str) -> None:
    """Lets the node with a key into the federation; one that is in stays in.

    Raises:
      FlowerError: the SuperLink does not answer or refuses.
    """
    found = flwr(home, "supernode", "register", str(public_key), LINK, "--name", name)
    if found.returncode and "already in use" not in found.stdout + found.stderr:
        raise FlowerError(f"{public_key}: {(found.stderr or found.stdout).strip()}")


def flwr(home: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Flower's command line to its end, in `home`: it takes a folder of the SuperLink's name that
    is where it runs for an app of old."""
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


def wait_for_link(home: pathlib.Path, link: subprocess.Popen, patience: float = 600.0) -> None:
    """Waits until the SuperLink answers.

    Raises:
      FlowerError: it does not, or has ended.
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
    """A program that ends when the block does, with all that it has started.

    Args:
      patience: seconds to end in, before it is killed.
      how: as of `Popen`.
    """
    # A session of its own: Flower's programs start others, and leave them behind.
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
    """Where a program of Flower's is.

    Raises:
      ConfigError: not beside this Python.
    """
    path = pathlib.Path(sys.executable).parent / name
    if not path.exists():
        raise ConfigError(f"{path} is missing: install flwr where {sys.executable} is")
    return str(path)
