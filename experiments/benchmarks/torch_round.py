"""The PyTorch side of `federated_round`: one model in memory, clients trained in it one after another.

It is as fast as we could make it: scaled-dot-product attention without a mask, gradients only for the
adapters, fused AdamW, one thread per core. Adapters are by PEFT or written by hand, eager or compiled,
whichever is fastest on this machine.
"""

import itertools
import re
import time

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from fedrag_jax.models.peft import TENSORS


class LowRank(nn.Module):
    """x W + x A B by hand: the last product adds itself to the first."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float):
        super().__init__()
        self.weight, self.scale = linear.weight, scale
        self.lora_A, self.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        low, y = functional.linear(rows, self.lora_A), functional.linear(rows, self.weight)
        y = torch.addmm(y, low, self.lora_B.t(), alpha=self.scale)
        return y.view(*x.shape[:-1], -1)


class Merged(LowRank):
    """x (W + A B): the sum is made once a step, and serves the backward pass too."""

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        y = _Merged.apply(rows, self.weight, self.lora_A, self.lora_B, self.scale)
        return y.view(*x.shape[:-1], -1)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b, scale):
        merged = torch.addmm(weight, b, a, alpha=scale)
        ctx.save_for_backward(x, merged, a, b)
        ctx.scale = scale
        return x @ merged.t()

    @staticmethod
    def backward(ctx, dy):
        x, merged, a, b = ctx.saved_tensors
        da = (dy @ b).t() @ x
        db = dy.t() @ (x @ a.t())
        return dy @ merged, None, ctx.scale * da, ctx.scale * db, None


BY_HAND = {"low rank": LowRank, "merged": Merged}
LAYERS = ("peft", *BY_HAND)


class Round:
    """A round of federated averaging.

    Args:
      layer: of `LAYERS`.
      mode: of `torch.compile`, or None for eager.
      folder, adapters: of a decoder and of its adapters in the PEFT format.
      scored: whether to compute logits for the answer tokens alone.
      answer: how many there are, at the end of every sequence.
      optimizer: hyperparameters of AdamW.
    """

    def __init__(self, layer, mode, folder, adapters, scored, answer, **optimizer):
        self.name = f"{layer}, {f'compiled ({mode})' if mode else 'eager'}"
        model = _adapted(layer, folder, adapters)
        self.trained = {
            re.sub(r"^base_model\.model\.|\.default|\.weight", "", name): p
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self.start = [p.detach().clone() for p in self.trained.values()]
        self.loss = _of_answers(model, answer) if scored else _of_all_logits(model, answer)
        if mode is not None:
            self.loss = torch.compile(self.loss, mode=mode, dynamic=False)
        self.optimizer = torch.optim.AdamW(self.trained.values(), fused=True, **optimizer)

    def __call__(self, batches: np.ndarray) -> tuple[dict[str, np.ndarray], list[float]]:
        """The mean of the clients' adapters, by name, and the loss of each, a mean over its steps.

        Args:
          batches: tokens [K, S, B, T].
        """
        params = list(self.trained.values())
        mean, losses = [torch.zeros_like(p) for p in params], []
        for client in torch.from_numpy(batches.astype(np.int64)):
            with torch.no_grad():
                torch._foreach_copy_(params, self.start)
            self.optimizer.state.clear()
            for tokens in client:
                loss = self.loss(tokens)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(loss.detach())
            with torch.no_grad():
                torch._foreach_add_(mean, params, alpha=1 / len(batches))
        means = {name: x.numpy() for name, x in zip(self.trained, mean, strict=True)}
        return means, torch.stack(losses).view(len(batches), -1).mean(1).tolist()


def fastest(modes, batches, say, **settings) -> tuple[Round, dict[str, float]]:
    """The fastest of all layers and modes on one client, and the seconds a step takes in each.

    Args:
      say: is told what is tried.
    """
    best, seconds = None, {}
    for layer, mode in itertools.product(LAYERS, modes):
        run = Round(layer, mode, **settings)  # one more model in memory beside the best
        say(f"PyTorch, {run.name}: six runs of a client")
        seconds[run.name] = _seconds(run, batches[:1]) / batches.shape[1]
        if best is None or seconds[run.name] < seconds[best.name]:
            best = run
    return best, seconds


def peak(sizes: tuple[int, ...]) -> float:
    """Floating-point operations a second of the best square float32 product."""
    matrices = [torch.randn(n, n) for n in sizes]
    return max(2 * len(x) ** 3 / _seconds(lambda _, x=x: x @ x, None, 8) for x in matrices)


def _seconds(run, inputs, repeats: int = 4) -> float:
    """Returns the seconds of the fastest run after the first two."""
    times = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        run(inputs)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _adapted(layer: str, folder, adapters) -> nn.Module:
    """The decoder with frozen weights and adapters to train."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).requires_grad_(False)
    config = peft.LoraConfig.from_pretrained(adapters)
    if layer == "peft":
        return peft.PeftModel.from_pretrained(model, adapters, is_trainable=True).train()
    tensors = load_file(adapters / TENSORS)
    for name in sorted({name.partition(".lora_")[0] for name in tensors}):
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        parent, _, child = name.removeprefix("base_model.model.").rpartition(".")
        module, scale = model.get_submodule(parent), config.lora_alpha / config.r
        setattr(module, child, BY_HAND[layer](getattr(module, child), a, b, scale))
    return model.train()


def _of_all_logits(model, answer):
    """Loss as users write it, by transformers: labels of -100 outside the answer."""

    def loss(tokens):
        labels = tokens.clone()
        labels[:, :-answer] = -100
        out = model(
            input_ids=tokens, labels=labels, use_cache=False, num_items_in_batch=len(tokens)
        )
        return out.loss

    return loss


def _of_answers(model, answer):
    """Returns the same loss, from the logits at answer positions alone."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def loss(tokens):
        hidden = inner.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = inner.lm_head(hidden[:, -answer - 1 : -1]).flatten(0, 1)
        targets = tokens[:, -answer:].flatten()
        return functional.cross_entropy(logits, targets, reduction="sum") / len(tokens)

    return loss
