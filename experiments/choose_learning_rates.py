"""Learning rates of the comparison, chosen on validation questions alone.

    python -m experiments.choose_learning_rates --config=configs/compare_strategies.py

As in Lawton et al. 2025: retriever, generator and the two phases search a grid each, in every
regime by itself; joint training reuses the rates of the two phases. So do the two parts of RA-DIT.
What none of the config's strategies trains is not searched. The retriever is judged by its MRR, the
others by F1 of answers in the config's mode, over the first two pairs of seeds. A grid begins with
rates that are a factor of 4 apart, goes on beyond an end that is best, and is refined to a factor of 2
around the best. Prints what to put into the config and writes runs/<name>-rates/learning_rates.json;
a search that is finished is not made again.
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
