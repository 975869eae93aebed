"""Models planned from their Hugging Face configs: what they take, and what is refused."""

import json
from pathlib import Path

import pytest

from mezzotint.auditing.planning import config_target, plan_target
from mezzotint.errors import PlanError
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.precision import find_precision

pytest.importorskip("transformers")
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512, "n_positions": 64},
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "vocab_size": 512},
    "bert": {"model_type": "bert", **SMALL, "vocab_size": 512, "architectures": ["BertForSequenceClassification"]},
    "t5": {"model_type": "t5", "d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128,
           "vocab_size": 512, "decoder_start_token_id": 0},
    "vit": {"model_type": "vit", **SMALL, "image_size": 32, "patch_size": 8,
            "architectures": ["ViTForImageClassification"]},
    "resnet": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
               "layer_type": "basic", "architectures": ["ResNetForImageClassification"]},
    "whisper": {"model_type": "whisper", "d_model": 64, "encoder_layers": 1, "decoder_layers": 1,
                "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
                "decoder_ffn_dim": 128, "vocab_size": 512, "max_source_positions": 50, "max_target_positions": 32,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
}  # fmt: skip


def written(folder: Path, body: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(body))
    return path


@pytest.mark.parametrize("name", list(CONFIGS))
def test_models_are_planned_from_their_configs(tmp_path: Path, name: str):
    path = written(tmp_path, CONFIGS[name])
    target = config_target(path, batch=2, length=16, is_checkpointed=False)
    (plan,) = plan_target(target, [find_gpu("A100")], lambda _card: [find_precision("bf16")])
    assert plan.time.seconds > 0
    assert plan.memory.peak_allocated > 1 << 20
    assert plan.products_format == "bfloat16"
    phases = {one.phase for one in plan.run.trace.calls}
    assert {"forward", "backward", "optimizer"} <= phases
    if name in ("gpt2", "llama"):
        assert (plan.items, plan.unit) == (32, "tokens")


def test_checkpointing_runs_the_forward_twice(tmp_path: Path):
    path = written(tmp_path, CONFIGS["llama"])
    flops = []
    for is_checkpointed in (False, True):
        target = config_target(path, batch=2, length=64, is_checkpointed=is_checkpointed)
        (plan,) = plan_target(target, [find_gpu("A100")], lambda _card: [find_precision("bf16")])
        flops.append(plan.time.flops)
    assert 1.1 < flops[1] / flops[0] < 1.4


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([1], "no model_type"),
        ({}, "no model_type"),
        ({"model_type": "lama"}, "did you mean llama"),
        ({"model_type": "llama", "hidden_size": "wide"}, "no config of a 'llama' model"),
        ({"model_type": "sam"}, "no head with a loss"),
    ],
)
def test_refused(tmp_path: Path, body: object, said: str):
    with pytest.raises(PlanError, match=said):
        config_target(written(tmp_path, body), batch=1, length=None, is_checkpointed=False)


def test_no_file(tmp_path: Path):
    with pytest.raises(PlanError, match="no Hugging Face config"):
        config_target(tmp_path / "config.json", batch=1, length=None, is_checkpointed=False)


@pytest.mark.parametrize("named", [True, [{}], "GPT2LMHeadModel", 3])
def test_architectures_of_another_type_are_refused(named: object, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["gpt2"] | {"architectures": named}))
    with pytest.raises(PlanError, match="architectures"):
        config_target(path, batch=1, length=8, is_checkpointed=False)
