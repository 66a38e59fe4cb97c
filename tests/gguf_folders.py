"""Small decoders of every family that GGUF files know, as the folders such files are made of."""

import dataclasses
import functools
import pathlib

import jax

from fedrag_jax.models import hub
from fedrag_jax.models.decoder import Decoder, DecoderConfig
from fedrag_jax.models.network import Network
from fedrag_jax.models.rotary import LinearScaling, Llama3Scaling

TINY = DecoderConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=128,
)
LLAMA3 = Llama3Scaling(8.0, 1.0, 4.0, 8192)
FAMILIES = {
    "llama": TINY,
    "llama3": dataclasses.replace(TINY, rope_theta=5e5, rope_scaling=LLAMA3, tie_embeddings=True),
    "llama_stretched": dataclasses.replace(
        TINY, rope_theta=1e4, rope_scaling=Llama3Scaling(4.0, 1.0, 16.0, 64)
    ),
    "linear": dataclasses.replace(TINY, rope_scaling=LinearScaling(4.0), head_dim=32),
    "mistral": dataclasses.replace(TINY, family="mistral", windows=(16, 16)),
    "qwen2": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, norm_epsilon=1e-6),
    "qwen3": dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=128),
    "gemma3": dataclasses.replace(
        TINY,
        family="gemma3_text",
        num_layers=7,
        num_heads=2,
        num_kv_heads=1,
        head_dim=256,
        qk_norm=True,
        tie_embeddings=True,
        rope_theta=1e6,
        windows=(16, 16, 16, 16, 16, 0, 16),
        activation="gelu_tanh",
        embed_scale=16.0,
        attention_scale=256**-0.5,
        centred_norms=True,
        post_norms=True,
        local_rope_theta=1e4,
    ),
}  # fmt: skip


def byte_level(count: int = 512):
    """A tokenizer of a few merges, as Qwen's."""
    import gguf_writer
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=count,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(gguf_writer.lines([], 200), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
    )


def folder_of(config: DecoderConfig, path: pathlib.Path) -> pathlib.Path:
    network = Network.of(Decoder, config)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), network.init(jax.random.key(0))
    )
    tokenizer = byte_level(config.vocab_size)
    hub.save(hub.Pretrained(network, params, tokenizer, "made"), path)
    return path


def folders_below(path: pathlib.Path):
    """The folder of a family's model, by its name: made below `path` when it is first asked for."""
    return functools.cache(lambda name: folder_of(FAMILIES[name], path / name))
