"""The command line of an experiment: a config that flags override, and errors in one line."""

from absl import app, flags, logging
from ml_collections import config_flags

from fedrag_jax.errors import FedragError


def launch(run, config: str) -> None:
    """Calls `run(config, runs)` with the flags' config and folder of runs.

    Args:
      config: path of the config file used where none is given.
    """
    logging.set_verbosity(logging.WARNING)  # libraries tell a lot about themselves
    config_flags.DEFINE_config_file("config", config)
    flags.DEFINE_string("runs", "runs", "folder that holds the runs")

    def main(_):
        try:
            run(flags.FLAGS.config, flags.FLAGS.runs)
        except FedragError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error

    app.run(main)
