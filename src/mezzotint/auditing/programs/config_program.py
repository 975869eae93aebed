"""The training script behind `mezzotint plan --from-config`: a Hugging Face model from its config, bfloat16, AdamW.

Run as a script, with the path of a config.json, the batch size, the length of sequences and whether to checkpoint. What
a model takes follows from its main input and its head.
"""

import json
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import PlanError, shortened
from mezzotint.files import read_regular
from mezzotint.process import quiet_imports

_HEADS = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForImageClassification",
    "AutoModelForSpeechSeq2Seq", "AutoModelForCTC",
)  # fmt: skip
_SIZES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "inner width": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
    "vocabulary": ("vocab_size",),
    "others": (
        "num_attention_heads", "num_key_value_heads", "n_head", "head_dim", "max_position_embeddings", "n_positions",
        "image_size", "patch_size", "num_channels", "num_labels",
    ),
}  # fmt: skip
_LARGEST = 10**9
_MOST_MODULES = 10_000  # of layers or experts, each of which is built
_TOO_MANY_PARAMETERS = 10**12
_LONGEST = 2048
_AUDIO_SECONDS = 10


def read_config(path: Path) -> Any:
    """Return the transformers config of a JSON file.

    Raises PlanError where the file is no config of a model that the installed transformers knows.
    """
    try:
        with quiet_imports():
            import transformers
    except ImportError:
        raise PlanError("--from-config needs transformers; install it: pip install transformers") from None
    try:
        body = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        raise PlanError(f"{path} is no Hugging Face config ({shortened(error)}); pass a model's config.json") from None
    kind = body.get("model_type") if isinstance(body, dict) else None
    if not isinstance(kind, str):
        raise PlanError(f"{path} has no model_type; pass a Hugging Face model's config.json")
    if kind not in transformers.CONFIG_MAPPING:
        close = get_close_matches(kind, list(transformers.CONFIG_MAPPING), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "a newer transformers may"
        raise PlanError(
            f"{path}: transformers {transformers.__version__} has no model_type {shortened(repr(kind))}; {hint}"
        )
    _check_sizes(body, path)  # some config classes make a list of all layers
    try:
        config = transformers.AutoConfig.for_model(**body)
    except Exception as error:  # whatever a config class finds wrong
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PlanError(f"{path} is no config of a {kind!r} model: {reason}") from None
    _model_class(config, path)
    return config


def _check_sizes(body: Mapping[str, Any], path: Path) -> None:
    """Raise PlanError, by arithmetic, where a config asks for a model that could not even be built."""
    for part in (body, *(value for value in body.values() if isinstance(value, dict))):
        largest = {kind: max((_count(part, key, path) for key in keys), default=0) for kind, keys in _SIZES.items()}
        for kind in ("layers", "experts"):
            if largest[kind] > _MOST_MODULES:
                raise PlanError(f"{path}: {kind} are {largest[kind]:,}; they must be at most {_MOST_MODULES:,}")
        width = largest["width"]
        layer = 4 * width**2 + 2 * width * largest["inner width"]
        parameters = largest["vocabulary"] * width + largest["layers"] * layer
        if parameters >= _TOO_MANY_PARAMETERS:
            raise PlanError(
                f"{path}: the model has at least {parameters:.1e} parameters; it must have less than "
                f"{_TOO_MANY_PARAMETERS:.0e}, so check hidden size, layers and vocabulary"
            )


def _count(part: Mapping[str, Any], key: str, path: Path) -> int:
    value = part.get(key)
    if not isinstance(value, (int, float)):
        return 0  # what is no number is for the config's class to judge
    if not 0 <= value <= _LARGEST:
        raise PlanError(f"{path}: {key} is {shortened(value)}; it must be from 0 to {_LARGEST:,}")
    return int(value)


def _model_class(config: Any, path: Path) -> Any:
    """Return the class to train: the one that the config names if it has a loss, else the usual head of its family."""
    import transformers

    architectures = config.architectures if isinstance(config.architectures, list) else []
    for name in (name for name in architectures if isinstance(name, str)):
        with quiet_imports():  # transformers imports the model's module now
            found = getattr(transformers, name, None)
        if found is not None and ("For" in name or name.endswith(("LMHeadModel", "CLIPModel"))):
            return found
    for head in _HEADS:
        mapping = getattr(transformers, head)._model_mapping
        if type(config) in mapping:
            with quiet_imports():
                return mapping[type(config)]
    raise PlanError(f"{path}: a {config.model_type} model has no head with a loss; write a script and plan that")


def default_length(config: Any) -> int:
    """Return the model's longest sequence, up to 2048."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("max_position_embeddings", "n_positions", "max_target_positions"):
        found = getattr(text, key, None)
        if isinstance(found, int) and found > 0:
            return min(found, _LONGEST)
    return 512


def inputs_of(config: Any, model: Any, batch: int, length: int) -> dict[str, Any]:
    """Return a batch that the model takes, with the labels of its head, on the CPU."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None) or 2

    def tokens(number: int = length) -> Tensor:
        return torch.randint(0, vocabulary, (batch, number))

    name, main = type(model).__name__, model.main_input_name
    if main == "pixel_values":
        inner = getattr(config, "vision_config", config)
        size = getattr(inner, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        found: dict[str, Any] = {"pixel_values": torch.randn(batch, getattr(inner, "num_channels", 3), height, width)}
        if "Classification" in name:
            found["labels"] = torch.zeros(batch, dtype=torch.long)
        elif "Segmentation" in name:
            found["labels"] = torch.zeros(batch, height, width, dtype=torch.long)
        elif "text_config" in config.to_dict():
            found |= {"input_ids": tokens(), "labels": tokens()}
        return found
    if main == "input_features":
        frames = 2 * config.max_source_positions
        return {"input_features": torch.randn(batch, config.num_mel_bins, frames), "labels": tokens()}
    if main == "input_values":
        return {"input_values": torch.randn(batch, 16000 * _AUDIO_SECONDS), "labels": tokens(16)}
    found = {"input_ids": tokens()}
    if "CLIP" in name:
        vision = config.vision_config
        images = torch.randn(batch, vision.num_channels, vision.image_size, vision.image_size)
        return found | {"pixel_values": images, "return_loss": True}
    if "QuestionAnswering" in name:
        place = torch.zeros(batch, dtype=torch.long)
        return found | {"start_positions": place, "end_positions": place}
    if "SequenceClassification" in name:
        return found | {"labels": torch.zeros(batch, dtype=torch.long)}
    if "TokenClassification" in name:
        return found | {"labels": torch.zeros(batch, length, dtype=torch.long)}
    return found | {"labels": tokens()}


def train(path: Path, batch: int, length: int, *, is_checkpointed: bool) -> None:
    """Train for as long as one is let: bfloat16 autocast, clipping, fused AdamW."""
    config = read_config(path)
    config.use_cache = False
    with torch.device("cuda"):
        model = _model_class(config, path)(config)
    model.train()
    if is_checkpointed:
        # renamed in transformers 5
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    while True:
        inputs = {
            key: value.cuda() if isinstance(value, Tensor) else value
            for key, value in inputs_of(config, model, batch, length).items()
        }
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), is_checkpointed=sys.argv[4] == "checkpointed")
