"""Learning rates of the comparison, chosen on validation questions alone.

    python -m experiments.choose_learning_rates --config=configs/compare_strategies.py

The retriever, the generator, the two phases of two_phase, RALT and LSR each search a grid, separately
in every regime. Joint training reuses the rates of the two phases, as in Lawton et al. 2025. Parts that
no strategy of the config trains are skipped. The retriever is judged by MRR, the others by F1 of
answers in the config's mode, over the first two pairs of seeds (one pair if clients train alone). A
grid starts with rates a factor of 4 apart, is extended if the best rate is at an end, and is refined to
a factor of 2 around the best. Prints the lines for the config and writes
runs/<name>-rates/learning_rates.json; a finished search is not repeated.
"""

from absl import flags

from experiments.launch import launch
from experiments.rates import SEARCHES

CONFIG = "configs/compare_strategies.py"
_GRIDS = {
    s: flags.DEFINE_list(s.name, None, f"learning rates to try for the {s.part} in {s.strategy}")
    for s in SEARCHES
}
_QUESTIONS = flags.DEFINE_integer(
    "questions", 400, "number of validation questions for scoring a system"
)


if __name__ == "__main__":

    def with_flags(config, runs):
        from experiments.search import run  # imports JAX, once the flags are right

        grids = {
            s.name: [float(rate) for rate in flag.value] for s, flag in _GRIDS.items() if flag.value
        }
        return run(config, runs, grids, _QUESTIONS.value)

    launch(with_flags, CONFIG)
