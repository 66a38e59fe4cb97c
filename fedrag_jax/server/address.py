"""Listening sockets and API keys."""

import contextlib
import socket
from collections.abc import Iterator

from fedrag_jax.errors import ConfigError

KEY = "FEDRAG_API_KEY"  # of the environment: where it is set, callers must give it


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """Returns a listening socket and its address ("http://host:port").

    Args:
      port: the port; 0 for any free one.

    Raises:
      ConfigError: the address is not available.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen()  # whoever is told the address may call at once
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen on host {host!r}, port {port}: {error}; give another host or port"
            ) from error
        written = f"[{host}]" if ":" in host else host
        yield listener, f"http://{written}:{listener.getsockname()[1]}"
