"""(ε, δ) of rounds with Gaussian noise and Poisson sampling of clients, computed by `dp-accounting`.

pip install 'fedrag-jax[privacy]'

Neighbouring sets of clients differ by the presence of one client. There are two accountants. "rdp" uses
Rényi differential privacy (Mironov 2017, arXiv 1702.07476; for sampled Gaussians, Mironov et al. 2019,
1908.10530). "pld" uses privacy loss distributions (Koskela et al. 2020, 1906.03049), which are slower
and tighter, especially for large ε.
"""

import functools
from typing import Any

from fedrag_jax.errors import ConfigError, missing

ACCOUNTANTS = ("rdp", "pld")
# Integer Rényi orders, for sampled Gaussians: for other orders the library sums a series that may not
# converge.
ORDERS = (*range(2, 64), 80, 96, 128, 192, 256, 384, 512, 1024)


@functools.cache
def epsilon(
    noise_multiplier: float, rate: float, rounds: int, delta: float, accountant: str = "rdp"
) -> float:
    """Returns ε after a number of rounds.

    Args:
      noise_multiplier: z, the noise's standard deviation divided by the clip norm.
      rate: q, the probability with which each client independently takes part in a round.

    Raises:
      ConfigError: no noise, an invalid rate or δ, an unknown accountant, or no dp-accounting.
    """
    if not noise_multiplier > 0:
        raise ConfigError(
            f"noise_multiplier {noise_multiplier} gives no ε, because without noise the model can "
            "reveal one client. Set it above 0, or make no claim (delta=0)"
        )
    _require(rate, delta)
    made = _accountant(accountant, rate)
    made.compose(_event(noise_multiplier, rate, rounds))
    return float(made.get_epsilon(delta))


@functools.cache
def calibrated_noise(
    target: float, rate: float, rounds: int, delta: float, accountant: str = "rdp"
) -> float:
    """Returns the smallest noise multiplier for which a number of rounds has an ε of at most `target`.

    Raises:
      ConfigError: as `epsilon`, and a target that is not above 0.
    """
    if not target > 0:
        raise ConfigError(f"epsilon must be > 0, got {target}")
    _require(rate, delta)
    _accountant(accountant, rate)
    found = _library().calibrate_dp_mechanism(
        lambda: _accountant(accountant, rate),
        lambda noise: _event(noise, rate, rounds),
        target,
        delta,
        tol=1e-4,
    )
    return float(found)


def _require(rate: float, delta: float) -> None:
    if not 0 < rate <= 1:
        raise ConfigError(f"rate must be in (0, 1], got {rate}")
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be in (0, 1), got {delta}")


def _event(noise_multiplier: float, rate: float, rounds: int) -> Any:
    library = _library()
    noise = library.GaussianDpEvent(noise_multiplier)
    return library.SelfComposedDpEvent(library.PoissonSampledDpEvent(rate, noise), rounds)


def _accountant(name: str, rate: float) -> Any:
    library = _library()
    if name == "rdp":
        return library.rdp.RdpAccountant(orders=ORDERS if rate < 1 else None)
    if name == "pld":
        return library.pld.PLDAccountant()
    raise ConfigError(f"accountant is one of {ACCOUNTANTS}, got {name!r}")


def _library() -> Any:
    try:
        import dp_accounting
        import dp_accounting.pld
        import dp_accounting.rdp
    except ImportError as error:
        raise missing("accounting for privacy needs dp-accounting", "privacy") from error
    return dp_accounting
