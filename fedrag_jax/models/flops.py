"""Operation counts of networks by formula: a product of [m, n] and [n, p] counts 2mnp."""

from itertools import pairwise

from fedrag_jax.models.causal_encoder import CausalEncoderConfig
from fedrag_jax.models.decoder import DecoderConfig
from fedrag_jax.models.encoder import EncoderConfig
from fedrag_jax.models.lora import LoraConfig


def decoder_flops(
    config: DecoderConfig, lora: LoraConfig, tokens: int, answer: int, trained: bool
) -> float:
    """Operations of one sequence of T `tokens`, read at `answer` positions.

    A product of [m, n] and [n, p] counts 2mnp. With `trained` adapters over a frozen base, each frozen
    product is computed once more for the gradient of its input, and each product of two trained
    operands (attention, adapters) twice more. The last layer needs only keys and values at all
    positions. Softmax, norms and activations are not counted.
    """
    d, f = config.hidden_size, config.intermediate_size
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "q_proj": (d, heads), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (heads, d),
        "gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d),
    }  # fmt: skip
    ranks = {n: r for n, r in lora.widths(config.num_layers).items() if n in shapes}
    frozen = moving = 0
    for read in [tokens] * (config.num_layers - 1) + [answer]:
        rows = {name: tokens if name in ("k_proj", "v_proj") else read for name in shapes}
        frozen += sum(2 * rows[name] * m * n for name, (m, n) in shapes.items())
        moving += sum(2 * rows[name] * ranks[name] * sum(shapes[name]) for name in ranks)
        moving += 4 * tokens * read * heads
    frozen += 2 * answer * d * config.vocab_size
    moving += 2 * answer * lora.widths(None).get("lm_head", 0) * (d + config.vocab_size)
    return frozen * (2 if trained else 1) + moving * (3 if trained else 1)


def encoder_flops(config: EncoderConfig | CausalEncoderConfig, tokens: int, trained: bool) -> float:
    """Operations of one sequence of T `tokens`; full training costs three forward passes."""
    d, f, t = config.hidden_size, config.intermediate_size, tokens
    heads, linear = d, 4 * d * d + 2 * d * f
    if isinstance(config, CausalEncoderConfig):
        heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        linear = 2 * d * (heads + kv) + 3 * d * f
    forward = config.num_layers * (2 * t * linear + 4 * t * t * heads)
    sizes = [d, *(projection.size for projection in config.projections)]
    forward += sum(2 * m * n for m, n in pairwise(sizes))
    return forward * (3 if trained else 1)
