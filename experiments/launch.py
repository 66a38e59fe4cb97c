"""The command line of an experiment: a config that flags override, and one-line errors."""

import json
import os
import pathlib
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.pages import keep_pages
from fedrag_jax import files
from fedrag_jax.errors import ConfigError, FedragError


def settled_config(
    config, folder: pathlib.Path, free: tuple[str, ...], defined: tuple[str, ...] = ()
) -> None:
    """Locks the folder and writes the resolved config; refuses a folder with another config.

    Args:
      free: settings that may differ between calls that share a folder.
      defined: settings that define names, such as those of variants: calls may add or omit names, but
        not change a definition, because cells are stored by name.

    Raises:
      ConfigError: another process uses the folder, or settings differ; the error names all of them.
      DataError: the config in the folder is damaged.
    """
    if folder not in _held:
        _held[folder] = files.hold(folder)
    path, now = folder / "config.json", json.loads(config.to_json_best_effort())
    if path.exists():
        before = kept_config(path)
        settings = {k: (before.get(k), now[k]) for k in now if k not in (*free, *defined)}
        for k in defined:
            old = before.get(k, {})
            settings |= {f"{k}.{name}": (old[name], now[k][name]) for name in old if name in now[k]}
            now[k] = old | now[k]  # the definitions of names that this call omits
        changed = {name: both for name, both in settings.items() if both[0] != both[1]}
        if changed:
            what = "; ".join(f"config.{k} was {old}, is {new}" for k, (old, new) in changed.items())
            raise ConfigError(f"{folder} holds other results: {what}. Choose another --config.name")
    files.write_json(path, now, indent=2)


def kept_config(path: pathlib.Path) -> dict[str, Any]:
    """Returns the config of a run; also reads configs of versions that called regimes settings.

    Raises:
      DataError: the file is damaged.
    """
    config = files.read_json(path)
    return {"regimes" if name == "settings" else name: value for name, value in config.items()}


_held = {}  # folders that this process works in, until it ends
INTERRUPTED = 130  # exit code of a command that was stopped by SIGINT
DEVICES = 8  # virtual ones of a CPU, at most


def launch(run, config: str) -> None:
    """Calls `run(config, runs)` with the flags' config and folder of runs.

    Args:
      config: path of the config file used where none is given.
    """
    keep_pages()
    # FAISS's threads would spin while they wait, and keep JAX's from the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    virtual_devices(min(cores(), DEVICES))
    logging.set_verbosity(logging.WARNING)  # libraries tell a lot about themselves
    define_flags(config)

    def main(_):
        runs = flags.FLAGS.runs
        try:
            if flags.FLAGS.distributed or flags.FLAGS.coordinator:
                runs = _one_of_several(runs, flags.FLAGS.config)
            run(flags.FLAGS.config, runs)
        except FedragError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
        except OSError as error:
            if error.filename is None:
                raise
            raise SystemExit(str(error)) from error  # which names the file
        except KeyboardInterrupt:
            # The traceback tells nothing: everything finished is on disk, wherever this came.
            print("stopped; run the same command to resume", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None

    app.run(main)


def define_flags(config: str, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags that all experiments have.

    Args:
      config: path of the config file used if `--config` is not given.
      flag_values: where the flags are defined.
    """
    where = {"flag_values": flag_values}
    config_flags.DEFINE_config_file("config", config, **where)
    flags.DEFINE_string("runs", "runs", "folder of all runs", **where)
    flags.DEFINE_bool(
        "distributed",
        False,
        "run as one of several processes, each with its own folder; the first one prints and logs",
        **where,
    )
    # On a TPU pod slice and other clusters that JAX knows, nothing of this need be said.
    flags.DEFINE_string("coordinator", None, "host:port of the first process", **where)
    flags.DEFINE_integer("processes", None, "number of processes", lower_bound=1, **where)
    flags.DEFINE_integer("process", None, "number of this process, from 0", lower_bound=0, **where)


def _one_of_several(runs: str, config) -> str:
    """Joins the other processes and returns this process's folder of runs; only the first prints."""
    import jax

    f = flags.FLAGS
    jax.distributed.initialize(f.coordinator, f.processes, f.process)
    number = jax.process_index()
    if number == 0:
        return runs
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if "wandb" in config:
        config.wandb.mode = "disabled"
    return f"{runs}/process{number}"


def cores() -> int:
    """Returns the number of cores this process may use; `taskset` and containers limit them."""
    affinity = getattr(os, "sched_getaffinity", None)  # on Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def virtual_devices(count: int) -> None:
    """Sets the number of JAX's CPU devices, unless XLA_FLAGS sets it.

    To be called before JAX is used. Fits and clients are dealt out over devices, which keeps cores
    busier than products of small matrices do.
    """
    option, given = "--xla_force_host_platform_device_count", os.environ.get("XLA_FLAGS", "")
    if option not in given:
        os.environ["XLA_FLAGS"] = f"{given} {option}={count}".strip()
