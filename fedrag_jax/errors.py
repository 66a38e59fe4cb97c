"""What can go wrong, by whose hand: each message names the value, the place and the remedy."""

import sys


class FedragError(ValueError):
    """Any error the package raises on purpose."""


class ConfigError(FedragError):
    """A setting that cannot be honoured."""


def missing(what: str, extra: str) -> ConfigError:
    """An error for what an extra of this package brings: "Markdown files need bs4".

    The line that installs it is for the Python that runs, so that it works from a clone, too.
    """
    return ConfigError(f"{what}: {sys.executable} -m pip install 'fedrag-jax[{extra}]'")


class DataError(FedragError):
    """Questions, passages or files that are not what the schema asks for."""


class CheckpointError(FedragError):
    """A folder that does not hold the model it should."""


class NotFiniteError(FedragError):
    """A model that computes NaN or infinity where an answer was to come."""


class DivergenceError(FedragError):
    """Training left the real numbers; the last good checkpoint is untouched."""
