"""What the host needs for an operation, by phase: small models on the CPU, whose kernels take next to no time.

Says how the phases of `Host` in `plan/roofline.py` compare; a GPU's host launches kernels besides.

    PYTHONPATH=benchmarks python scripts/host_costs.py
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = frozenset(
    [
        "view",
        "transpose",
        "unsqueeze",
        "expand",
        "_unsafe_view",
        "permute",
        "select",
        "slice",
        "detach",
        "t",
        "squeeze",
        "as_strided",
        "split",
        "alias",
        "unbind",
        "_reshape_alias",
        "split_with_sizes",
    ]
)
ROUNDS = 25


class Counted(TorchDispatchMode):
    """Counts operations and views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.views = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run."""
        is_view = func._schema.name.partition("::")[2] in VIEWS
        self.views += is_view
        self.operations += not is_view
        return func(*args, **(kwargs or {}))


def report(name: str, prepare: Callable[[], Any], run: Callable[[Any], Any]) -> None:
    """Print microseconds and counts of `run(prepare())`; the lower quartile of the rounds."""
    given = prepare()
    with Counted() as counted:
        run(given)
    times = []
    for _ in range(ROUNDS):
        given = prepare()
        start = time.perf_counter()
        run(given)
        times.append(time.perf_counter() - start)
    us = sorted(times)[ROUNDS // 4] * 1e6
    sys.stdout.write(
        f"{name:24} {us:6.0f} us, {counted.operations} operations, {counted.views} views, "
        f"{us / counted.operations:.2f} us an operation\n"
    )


def study(name: str, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Print forward without and with gradients, backward, and an update."""
    optimizer = torch.optim.AdamW(model.parameters())

    def without(_none: Any) -> None:
        with torch.no_grad():
            loss()

    def fresh() -> Tensor:
        optimizer.zero_grad()
        return loss()

    report(f"{name} without gradients", lambda: None, without)
    report(f"{name} forward", lambda: None, lambda _none: loss())
    report(f"{name} backward", fresh, Tensor.backward)
    report(f"{name} update", lambda: fresh().backward(), lambda _none: optimizer.step())


def main() -> int:
    """Study three models."""
    import transformers as hf

    from plan_programs import cs336

    torch.set_num_threads(1)
    tokens = torch.randint(0, 50, (1, 8))
    model = cs336.LM(12, 16, 2, 32, 50, 8)
    nn.init.normal_(model.embedding)
    study("CS336", model, lambda: cs336.cross_entropy(model(tokens), tokens))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2}
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, vocab_size=50, use_cache=False))
    study("Llama", llama, lambda: llama(tokens).logits.float().square().mean())
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=12, n_head=2, vocab_size=50, use_cache=False))
    study("GPT-2", gpt2, lambda: gpt2(tokens).logits.float().square().mean())
    return 0


if __name__ == "__main__":
    sys.exit(main())
