"""Several cards on paper: what a ring moves, what is sharded, and what must hold."""

import json
from pathlib import Path

import pytest

from mezzotint.auditing.planning import config_target, plan_target
from mezzotint.errors import PlanError
from mezzotint.hardware.devices import device_specs
from mezzotint.hardware.gpus import find_gpu
from mezzotint.hardware.links import links_of
from mezzotint.plan.distributed import distribute
from mezzotint.plan.plan import Plan
from mezzotint.plan.precision import find_precision

pytest.importorskip("transformers")
CONFIG = {
    "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "intermediate_size": 4096, "vocab_size": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(CONFIG))
    target = config_target(path, batch=4, length=512, is_checkpointed=False)
    (found,) = plan_target(target, [find_gpu("A100")], lambda _card: [find_precision("bf16")])
    return found


def parameters(plan: Plan) -> int:
    total = 0
    for one in plan.run.trace.parameters:
        count = 1
        for size in one.shape:
            count *= size
        total += count
    return total


def test_an_all_reduce_moves_all_gradients_nearly_twice(plan: Plan):
    found = distribute(plan, 8, "ddp")
    nbytes = 4 * parameters(plan)  # float32 gradients
    ring = 2 * 7 / 8 * nbytes / (0.8 * 300e9)
    assert ring < found.communication < 1.3 * ring + 2e-3
    assert found.exposed < found.communication
    assert found.peak_allocated == plan.memory.peak_allocated + nbytes


def test_shards_divide_weights_gradients_and_states(plan: Plan):
    peaks = [distribute(plan, world, "fsdp").peak_allocated for world in (2, 4, 8, 64)]
    assert peaks == sorted(peaks, reverse=True)
    state = 16 * parameters(plan)  # weight, gradient, two moments; some gradients are not there yet at the peak
    saved = peaks[0] - peaks[3]
    assert 0.7 * state * (1 / 2 - 1 / 64) < saved < 1.05 * state * (1 / 2 - 1 / 64)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", [2, 8, 16, 512])
def test_what_must_hold(plan: Plan, strategy: str, world: int):
    found = distribute(plan, world, strategy)
    assert found.low <= found.seconds <= found.high
    assert 0 < found.exposed <= found.communication
    assert found.peak_allocated <= found.peak_reserved
    assert found.items_per_second == pytest.approx((plan.items or 0) * world / found.seconds)


def test_machines_talk_slower_than_cards_in_one(plan: Plan):
    within, between = distribute(plan, 8, "ddp"), distribute(plan, 16, "ddp")
    assert between.communication > within.communication
    assert between.seconds > within.seconds


@pytest.mark.parametrize(
    ("world", "strategy", "said"), [(1, "ddp", "at least 2"), (8, "zero9", "ddp or fsdp"), (0, "fsdp", "at least 2")]
)
def test_refused(plan: Plan, world: int, strategy: str, said: str):
    with pytest.raises(PlanError, match=said):
        distribute(plan, world, strategy)


def test_every_cuda_card_has_links_with_a_source(tmp_path: Path):
    for card in device_specs():
        if card.compute_capability is not None:
            links = links_of(card)
            assert links.within >= links.between > 0
            assert links.source
    with pytest.raises(PlanError, match="links"):
        links_of(next(card for card in device_specs() if card.compute_capability is None))
    own = tmp_path / "mine.toml"
    own.write_text('base = "H100"\nmemory_gib = 96\n')
    assert links_of(find_gpu(str(own))).within == 450e9
