"""Error classes. Each message names the value, the place and the remedy."""

import sys


class FedragError(ValueError):
    """Any error the package raises on purpose."""


class ConfigError(FedragError):
    """A setting that cannot be honoured."""


def missing(what: str, extra: str) -> ConfigError:
    """Returns an error about a missing library of an extra, such as "Markdown files need bs4".

    The message has the install command for the running Python, so that it also works in a clone.
    """
    return ConfigError(f"{what}: {sys.executable} -m pip install 'fedrag-jax[{extra}]'")


class DataError(FedragError):
    """Questions, passages or files that do not follow the schema."""


class CheckpointError(FedragError):
    """A folder that does not contain the expected model."""


class NotFiniteError(FedragError):
    """A model that computes NaN or infinity instead of an answer."""


class DivergenceError(FedragError):
    """Training produced NaN or infinity; the last good checkpoint is untouched."""
