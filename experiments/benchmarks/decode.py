"""Tokens per second of greedy decoding, compared with `transformers` and PyTorch on the same CPU.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.decode --batch=8
    JAX_PLATFORMS=cpu python -m experiments.benchmarks.decode --model=path/to/decoder --batch=32
    JAX_PLATFORMS=cpu python -m experiments.benchmarks.decode --model=smollm2 --prompt_tokens=448
    python -m experiments.benchmarks.decode --model=smollm2 --dtype=bfloat16 --batch=64

Both load the same folder in float32 and continue the same left-padded batch of random tokens by the
same number of tokens, without stopping early. Both must write the same tokens. They take turns; the
first turn of each (compilation, warm-up) is not counted, and the median is printed as a line of JSON.
PyTorch uses its defaults: scaled-dot-product attention, inference mode, one thread per core. Only ours
is timed if PyTorch is absent, and in bfloat16, where the two need not write the same tokens.
"""

import importlib.util
import json
import statistics
import tempfile
import time

import numpy as np
from absl import app, flags

_MODEL = flags.DEFINE_string("model", "builtin:decoder", "name, folder or file of a decoder")
_BATCH = flags.DEFINE_integer("batch", 8, "number of prompts decoded together", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 64, "tokens of the longest prompt", lower_bound=2)
_NEW = flags.DEFINE_integer(
    "new_tokens", 64, "number of tokens to generate per prompt", lower_bound=1
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type of the weights")
_REPEATS = flags.DEFINE_integer("repeats", 5, "number of turns per side", lower_bound=1)


def main(argv):
    del argv
    import jax

    from fedrag_jax.models import hub

    model = hub.load(_MODEL.value, _DTYPE.value)
    tokens, mask = prompts(_BATCH.value, _PROMPT.value, model.network.config.vocab_size)
    runs = {"ours": ours(model, tokens, mask, _NEW.value)}
    if _DTYPE.value == "float32" and importlib.util.find_spec("torch"):
        runs["transformers"] = theirs(model, tokens, mask, _NEW.value)
    written = {name: run() for name, run in runs.items()}
    same = min(np.mean(written["ours"] == other) for other in written.values())
    if same < 1:
        raise SystemExit(f"the two agree on {100 * same:.1f} % of the tokens only; nothing to time")
    seconds = {name: [] for name in runs}
    for _ in range(_REPEATS.value):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    speed = {name: tokens_per_second(s) for name, s in seconds.items()}
    report = {f"{name}_tokens_per_second": round(s, 1) for name, s in speed.items()}
    if "transformers" in speed:
        report["ratio"] = round(speed["ours"] / speed["transformers"], 2)
    report |= {
        "dtype": _DTYPE.value,
        "batch": _BATCH.value,
        "prompt_tokens": _PROMPT.value,
        "new_tokens": _NEW.value,
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(report))


def tokens_per_second(seconds: list[float]) -> float:
    """Written ones; prompts are read in that time but not counted."""
    return _BATCH.value * _NEW.value / statistics.median(seconds)


def prompts(rows: int, width: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and their mask [rows, width], padded on the left by up to half of the width."""
    rng = np.random.default_rng(0)
    padding = rng.integers(0, width // 2 + 1, rows)
    padding[0] = 0
    mask = np.arange(width) >= padding[:, None]
    return np.where(mask, rng.integers(0, vocabulary, (rows, width)), 0), mask


def ours(model, tokens, mask, count):
    """A function of no arguments that writes `count` tokens a row."""
    from fedrag_jax.generation.decoding import generate

    return lambda: generate(model.network, model.params, tokens, mask, max_new_tokens=count).tokens


def theirs(decoder, tokens, mask, count):
    """Decodes as `ours`, with transformers."""
    import torch
    import transformers

    from fedrag_jax.models import hub

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        hub.save(decoder, folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # so that nothing stops, or looks whether to stop
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask).long()}

    def run():
        with torch.inference_mode():
            written = model.generate(
                **inputs, max_new_tokens=count, do_sample=False, pad_token_id=0
            )
        return written[:, tokens.shape[1] :].numpy()

    return run


if __name__ == "__main__":
    app.run(main)
