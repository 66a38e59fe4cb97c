"""Resources that a compiled program needs of its chips, and the bound on its speed."""

import dataclasses
import re
import time

import jax

from experiments.benchmarks import hlo
from experiments.benchmarks.chips import Chip
from experiments.benchmarks.operations import operations

_USED = re.compile(r"Used ([\d.]+)([KMGT])i?B? of [\d.]+[KMGT]i?B? hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled program; bytes, operations and seconds are per chip.

    Attributes:
      fits: whether the compiler found room for it.
      arguments, results, scratch, aliased: bytes; results that take the place of arguments are
        aliased. 0 where it does not fit.
      peak: bytes at once, as far as the compiler tells where it does not fit.
      sent: collectives by kind.
      operations: of products, in one run.
      moved: bytes read from memory and written to it, in one run; 0 where it does not fit.
      useful: those of the operations that the model's formula counts, or None.
    """

    name: str
    fits: bool
    chip: Chip
    compile_seconds: float
    operations: float
    peak: float
    arguments: int = 0
    results: int = 0
    scratch: int = 0
    aliased: int = 0
    moved: int = 0
    sent: dict[str, hlo.Sent] = dataclasses.field(default_factory=dict)
    useful: float | None = None

    @property
    def seconds(self) -> float:
        """A run at least, by the roofline (Williams et al. 2009): whichever takes longer, products at
        peak or memory at full bandwidth. What chips send each other is not in it."""
        return max(self.operations / self.chip.peak, self.moved / self.chip.bandwidth)

    @property
    def bound(self) -> str:
        """The longer of the two: "products" or "memory"."""
        products = self.operations / self.chip.peak
        return "products" if products >= self.moved / self.chip.bandwidth else "memory"

    @property
    def mfu(self) -> float | None:
        """The model's operations over what the chip could do in that time (Chowdhery et al. 2022)."""
        if not self.useful or not self.fits:
            return None
        return self.useful / (self.seconds * self.chip.peak)

    def all_gathers(self) -> int:
        """Number of all-gathers in one run."""
        return self.sent["all-gather"].count if "all-gather" in self.sent else 0


def compiled(name: str, traced, chip: Chip, chips: int, steps: int = 1, useful=None):
    """Compiles a traced program.

    Args:
      chips: that share its products.
      steps: see `hlo.Program`.
      useful: operations of the model on all chips.

    Returns:
      `(Report, the compiled program or None if it does not fit)`.
    """
    each = operations(traced.jaxpr, steps) / chips
    useful = None if useful is None else useful / chips
    start = time.perf_counter()
    try:
        program = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = _USED.search(str(error))
        if found is None:
            raise
        seconds, used = time.perf_counter() - start, float(found[1]) * _UNITS[found[2]]
        return Report(name, False, chip, seconds, each, used, useful=useful), None
    seconds = time.perf_counter() - start
    memory, read = program.memory_analysis(), hlo.Program(program.as_text(), steps)
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes
    scratch, aliased = memory.temp_size_in_bytes, memory.alias_size_in_bytes
    peak = arguments + results + scratch - aliased + memory.generated_code_size_in_bytes
    report = Report(
        name, True, chip, seconds, each, peak, arguments, results, scratch, aliased,
        read.moved(), read.collectives(), useful,
    )  # fmt: skip
    return report, program
