"""The least memory that a configuration needs, by arithmetic, compared with the machine's before anything is built."""

from mezzotint.data.config import DataConfig
from mezzotint.errors import ConfigError
from mezzotint.hardware.host import memory_bytes
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.training.config import RunConfig

_FLOAT32, _INT64 = 4, 8


def check_size(config: RunConfig) -> None:
    """Raise ConfigError, with both numbers, where the run needs more than all memory that this process may use."""
    available = memory_bytes()
    if available is None:
        return
    weights = num_parameters(config.model, _least_vocabulary(config.data)) * _FLOAT32  # drawn on the CPU in float32
    batch = 2 * config.train.batch_size * config.model.block_size * _INT64  # input and target ids
    parts = {"model": weights, "train.batch_size and model.block_size": batch}
    for keys, needed in parts.items():
        if needed > available:
            raise ConfigError(
                f"{keys} need at least {_gib(needed)} GiB of memory, this machine has {_gib(available)} GiB; make them "
                "smaller"
            )


def num_parameters(model: GPTConfig, vocab_size: int) -> int:
    """Return the number of parameters of the reference model, its norms left out."""
    layer = 4 * model.dim * model.dim + 3 * model.dim * model.ffn_dim
    return vocab_size * model.dim * (1 if model.is_head_tied else 2) + model.num_layers * layer


def _least_vocabulary(data: DataConfig) -> int:
    return 256 if data.tokenizer == "bytes" else data.vocab_size


def _gib(num_bytes: int) -> str:
    if num_bytes > 10**30:
        return "more than 10**20"
    return f"{num_bytes / 2**30:,.1f}"
