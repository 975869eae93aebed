"""A refused call changes no tensor, module, hook, flag or file, and says in one sentence what to do instead."""

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import mezzotint as mz
from mezzotint.errors import MezzotintError
from mezzotint.hardware.devices import find_device
from mezzotint.kernels import tensors as kernels
from mezzotint.modules.cross_entropy import LinearCrossEntropy
from mezzotint.modules.rms_norm import RMSNorm, rms_norm
from mezzotint.modules.swiglu import swiglu
from mezzotint.policy.grammar import parse_policy
from mezzotint.policy.presets import PRESETS

LOW = [name for name in PRESETS if parse_policy(name).params != "float32"]
# results and errors, which ask nothing of what they are made of
RECORDS = {"Decision", "MezzotintError", "StepResult"}


class Scene:
    """A model with an optimizer that has states and gradients, and an engine of `policy` if it is given."""

    def __init__(self, folder: Path, policy: str, **settings: Any) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
        self.other = nn.Linear(16, 16)
        self.half = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16).half())
        self.head, self.narrow = LinearCrossEntropy(16, 4), LinearCrossEntropy(4, 4)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0)
        self.inputs = torch.randn(4, 16)
        self.engine: Any = None
        if not policy:
            self.loss().backward()
            self.optimizer.step()
            return
        self.engine = mz.Engine(self.model, self.optimizer, policy=policy, scheduler=self.scheduler, **settings)
        self.engine.backward(self.forward())
        self.engine.update()
        self.state = self.engine.state_dict()

    def loss(self) -> torch.Tensor:
        return self.model(self.inputs).float().square().mean()

    def forward(self) -> torch.Tensor:
        with self.engine.forward():
            return self.loss()

    def damaged(self, *path: Any, value: Any) -> Any:
        """Return the engine's state with another value at `path`; without a value where it is `...`."""
        state = copied(self.engine.state_dict())
        at = state
        for key in path[:-1]:
            at = at[key]
        if value is ...:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        return state


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def bits(value: Any) -> Any:
    """Return a value that compares equal for equal bits, in any nesting."""
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.is_sparse:
            return (id(value), value.dtype)
        raw = value.detach().reshape(-1).view(torch.uint8)
        return (value.dtype, tuple(value.shape), value.requires_grad, raw.numpy().tobytes())
    if isinstance(value, dict):
        return {key if isinstance(key, str | int) else id(key): bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else id(value)


def module_state(module: nn.Module) -> Any:
    hooks = {
        k: [id(hook) for hook in v.values()] for k, v in vars(module).items() if "hooks" in k and hasattr(v, "values")
    }
    own = sorted(key for key in vars(module))
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    grads = [(id(t), bits(t), bits(t.grad), t.grad_dtype) for t in tensors]
    return type(module), module.training, own, hooks, grads


def optimizer_state(optimizer: torch.optim.Optimizer) -> Any:
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    settings = [{k: bits(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    hooks = [len(v) for k, v in vars(optimizer).items() if "hook" in k and hasattr(v, "__len__")]
    return groups, settings, bits(dict(optimizer.state)), hooks


def torch_state() -> Any:
    """Return the switches of torch and Python that a call might turn, and the functions that it might replace."""
    flags = [
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    ]
    flags += [
        torch.get_autocast_dtype("cpu"),
        torch.get_float32_matmul_precision(),
        torch.get_deterministic_debug_mode(),
    ]
    flags += [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark]
    flags += [torch.backends.cudnn.deterministic, torch.is_inference_mode_enabled(), torch.get_default_device()]
    patched = [torch.Tensor.backward, torch.autograd.backward, torch.cuda.is_available, torch.amp.GradScaler.step]
    patched += [nn.Module.__call__, torch.optim.Optimizer.__init__, torch.Tensor.cuda, torch.Tensor.to, print]
    return (
        [str(flag) for flag in flags],
        [id(function) for function in patched],
        bits(torch.get_rng_state()),
        random.getstate(),
        {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
    )


def snapshot(scene: Scene) -> Any:
    engine = scene.engine
    lanes = {} if engine is None else {name: bits(vars_of(lane)) for name, lane in engine.lanes().items()}
    parts = (
        {} if engine is None else {name: bits(part.state_dict()) for name, part in engine.shadowed_weights().items()}
    )
    models = [*scene.model.modules(), scene.other, *scene.half.modules()]
    files = {str(path): path.read_bytes() if path.is_file() else None for path in scene.folder.rglob("*")}
    return {
        "modules": [module_state(module) for module in models],
        "optimizer": optimizer_state(scene.optimizer),
        "scheduler": bits({k: v for k, v in scene.scheduler.state_dict().items() if k != "lr_lambdas"}),
        "engine": engine and (engine.steps, engine.skipped_steps, lanes, parts),
        "torch": torch_state(),
        "files": files,
    }


def vars_of(lane: Any) -> dict[str, Any]:
    return {name: str(getattr(lane, name)) for name in ("num_micro_batches", "num_steps", "scale", "is_compared")}


@dataclass
class Row:
    """A call that is refused; with `policy` on an engine that has made a step."""

    name: str
    call: Callable[[Scene], Any]
    policy: str = ""
    accumulate: int = 1


def engine_call(policy: str, **given: Callable[[Scene], Any]) -> Callable[[Scene], Any]:
    def call(s: Scene) -> Any:
        arguments = {"model": s.model, "optimizer": s.optimizer, "policy": policy}
        return mz.Engine(**{**arguments, **{name: make(s) for name, make in given.items()}})

    return call


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


class Hostile(nn.Module):
    """A module that refuses hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise mz.MezzotintError("hooks are refused; pass another module")


# what no policy can serve
ENGINE: list[tuple[str, dict[str, Callable[[Scene], Any]]]] = [
    ("model=None", {"model": lambda s: None}),
    ("model=[]", {"model": lambda s: []}),
    ("model=text", {"model": lambda s: "model" * 1000}),
    ("model={'a': 1}", {"model": lambda s: {"a": 1}}),
    ("model without parameters", {"model": lambda s: nn.ReLU()}),
    ("model on meta", {"model": lambda s: nn.Linear(16, 16, device="meta")}),
    ("optimizer=None", {"optimizer": lambda s: None}),
    ("optimizer=[]", {"optimizer": lambda s: []}),
    ("optimizer=[1]", {"optimizer": lambda s: [1]}),
    ("optimizer class", {"optimizer": lambda s: torch.optim.SGD}),
    ("optimizer LBFGS", {"optimizer": lambda s: torch.optim.LBFGS(s.model.parameters())}),
    ("optimizer of another model", {"optimizer": lambda s: sgd(s.other)}),
    ("optimizers that share", {"optimizer": lambda s: [s.optimizer, sgd(s.model)]}),
    ("max_grad_norm=0", {"max_grad_norm": lambda s: 0}),
    ("max_grad_norm=-1", {"max_grad_norm": lambda s: -1.0}),
    ("max_grad_norm=nan", {"max_grad_norm": lambda s: math.nan}),
    ("max_grad_norm=inf", {"max_grad_norm": lambda s: math.inf}),
    ("max_grad_norm=True", {"max_grad_norm": lambda s: True}),
    ("max_grad_norm=text", {"max_grad_norm": lambda s: "1" * 1000}),
    ("max_grad_norm=10**400", {"max_grad_norm": lambda s: 10**400}),
    ("max_grad_norm=tensor", {"max_grad_norm": lambda s: torch.ones(1000)}),
    ("accumulate=0", {"accumulate": lambda s: 0}),
    ("accumulate=1.5", {"accumulate": lambda s: 1.5}),
    ("accumulate=2**31", {"accumulate": lambda s: 2**31}),
    ("accumulate=10**5000", {"accumulate": lambda s: 10**5000}),
    ("accumulate=True", {"accumulate": lambda s: True}),
    ("accumulate=None", {"accumulate": lambda s: None}),
    ("seed=text", {"seed": lambda s: "0"}),
    ("seed=2**64", {"seed": lambda s: 2**64}),
    ("seed=1.0", {"seed": lambda s: 1.0}),
    ("scheduler=1", {"scheduler": lambda s: 1}),
    ("scheduler on a metric", {"scheduler": lambda s: ReduceLROnPlateau(s.optimizer)}),
    ("scheduler of another optimizer", {"scheduler": lambda s: LambdaLR(sgd(s.other), lambda step: 1.0)}),
]
# what is noticed last, after much was looked at or changed
LATE = ENGINE[-2:]
HOSTILE = {"model": lambda s: [s.model, Hostile(s.other)]}
POLICIES: list[tuple[str, Any]] = [
    ("unknown", "bf17-mixed"),
    ("empty", ""),
    ("long", "x" * 10_000),
    ("no text", 3),
    ("None", None),
    ("an empty part", "bf16-mixed,,"),
    ("unknown field", "bf16-mixed, speed=high"),
    ("field twice", "loss=float32, loss=float32"),
    ("unknown format", "compute=float99"),
    ("state", "params=bfloat16, state=float32"),
    ("update", "update=master"),
    ("scaling", "scaling=static(0)"),
    ("scaling text", "scaling=dynamic(floor=x)"),
    ("scaling twice", "scaling=dynamic(floor=1, floor=1)"),
    ("products", "products=float7"),
    ("products history", "products=float8_e4m3fn(history=-1)"),
    ("keep", "bf16-mixed, keep=head|head"),
]
# what the engine alone does not serve
ENGINE_POLICIES = [
    "compute=float8_e4m3fn",
    "params=float16, state=float16, compute=float16",
    "bf16-mixed, loss=bfloat16",
    "bf16-mixed, reduce=float16",
    "bf16-mixed, keep=nothing.of.this.name",
    "bf16-master, keep=0",
    "bf16-master, saved=bfloat16",
    "params=bfloat16, state=bfloat16",
]
FIELDS = ["params", "compute", "loss", "reduce", "state", "update", "saved", "keep", "products", "scaling"]
SEVERAL = ["float32", "fp16-mixed", "bf16-stochastic", "fp8-mixed"]

ROWS = [
    *(Row(f"Engine {p}: {name}", engine_call(p, **given)) for p in SEVERAL for name, given in ENGINE),
    *(Row(f"Engine {p}: {name}", engine_call(p, **given)) for p in PRESETS if p not in SEVERAL for name, given in LATE),
    *(Row(f"Engine: policy {name}", engine_call(text)) for name, text in POLICIES),
    *(Row(f"Engine: {text}", engine_call(text)) for text in ENGINE_POLICIES),
    *(Row(f"Engine {p}: hooks are refused", engine_call(p, **HOSTILE)) for p in PRESETS if parse_policy(p).is_mixed),
    *(
        Row(f"Engine {p}: a float16 layer", engine_call(p, model=lambda s: s.half, optimizer=lambda s: sgd(s.half)))
        for p in PRESETS
        if p not in LOW
    ),
    *(Row(f"Policy: parse {name}", lambda s, text=text: mz.Policy.parse(text)) for name, text in POLICIES),
    *(
        Row(f"Policy: {field}={value!r}", lambda s, f=field, v=value: mz.Policy(**{f: v}))
        for field in FIELDS
        for value in (1, "x", ["a b"])
    ),
    Row("Scaling: kind", lambda s: mz.Scaling(kind="often")),
    Row("Scaling: initial", lambda s: mz.Scaling(kind="static", initial=-1)),
    Row("Scaling: text", lambda s: mz.Scaling(kind="dynamic", floor="low")),
    Row("Outcome: unknown", lambda s: mz.Outcome("moved")),
    Row("choose: a device that is not here", lambda s: mz.choose(device="cuda:7")),
    Row("choose: no device", lambda s: mz.choose(device="no such device")),
    Row("choose: a number", lambda s: mz.choose(3)),
    Row("choose: a device twice", lambda s: mz.choose("cpu", device="cpu")),
    Row("fast_cpu: float32", lambda s: mz.fast_cpu("float32")),
    Row("fast_cpu: a number", lambda s: mz.fast_cpu(16)),
    Row("fast_cpu: a list", lambda s: mz.fast_cpu(["bfloat16"])),
    Row("audit: steps=0", lambda s: mz.audit(steps=0)),
    Row("audit: steps=text", lambda s: mz.audit(steps="3")),
    Row("audit: steps=1.5", lambda s: mz.audit(steps=1.5)),
    Row("audit: policy", lambda s: mz.audit(policy="bf17")),
    Row("audit: policy=3", lambda s: mz.audit(policy=3)),
    Row("audit: inside another", lambda s: inside_audit(mz.audit())),
    Row("assert_policy: policy", lambda s: mz.assert_policy(lambda: None, "bf17")),
    Row("assert_policy: no function", lambda s: mz.assert_policy(3, "float32")),
    Row("assert_policy: steps=0", lambda s: mz.assert_policy(lambda: None, "float32", steps=0)),
    Row("assert_policy: steps=text", lambda s: mz.assert_policy(lambda: None, "float32", steps="1")),
    Row("assert_policy: inside an audit", lambda s: inside_audit(lambda: mz.assert_policy(lambda: None, "float32"))),
    Row("watch: every=0", lambda s: mz.watch(every=0)),
    Row("watch: every=text", lambda s: mz.watch(every="50")),
    Row("watch: every=1.5", lambda s: mz.watch(every=1.5)),
    Row("watch: on_alarm", lambda s: mz.watch(on_alarm="mail")),
    Row("watch: out=3", lambda s: mz.watch(out=3)),
    Row("ghost_gpu: unknown", lambda s: mz.ghost_gpu("H999")),
    Row("ghost_gpu: a number", lambda s: mz.ghost_gpu(100)),
    Row("ghost_gpu: a CPU", lambda s: mz.ghost_gpu(find_device("MI300X"))),
    Row("ghost_gpu: inside another", lambda s: inside_ghost()),
    Row("prove: one arm", lambda s: mz.prove(s.folder / "p", arms=["float32"])),
    Row("prove: no policy", lambda s: mz.prove(s.folder / "p", arms=["float32", "fast"])),
    Row("prove: arms=text", lambda s: mz.prove(s.folder / "p", arms="float32")),
    Row("prove: arms=3", lambda s: mz.prove(s.folder / "p", arms=3)),
    Row("prove: an arm twice", lambda s: mz.prove(s.folder / "p", arms=["float32", "float32"])),
    Row("prove: seeds=1", lambda s: mz.prove(s.folder / "p", seeds=1)),
    Row("prove: seeds=text", lambda s: mz.prove(s.folder / "p", seeds="5")),
    Row("prove: seeds=1.5", lambda s: mz.prove(s.folder / "p", seeds=1.5)),
    Row("prove: seeds=-3", lambda s: mz.prove(s.folder / "p", seeds=[-3, 1])),
    Row("prove: metrics=3", lambda s: mz.prove(s.folder / "p", metrics=3)),
    Row("prove: metrics=text", lambda s: mz.prove(s.folder / "p", metrics="accuracy")),
    Row("prove: margin", lambda s: mz.prove(s.folder / "p", margin=-1)),
    Row("prove: margin=text", lambda s: mz.prove(s.folder / "p", margin="1%")),
    Row("prove: alpha", lambda s: mz.prove(s.folder / "p", alpha=2)),
    Row("prove: alpha=text", lambda s: mz.prove(s.folder / "p", alpha="0.05")),
    Row("prove: max_seeds", lambda s: mz.prove(s.folder / "p", max_seeds=2)),
    Row("prove: out=None", lambda s: mz.prove(None)),
    Row("prove: out is a file", lambda s: mz.prove(s.folder / "file").__enter__()),
    Row("prove: results", lambda s: mz.prove(s.folder / "p").results),
    Row("prove: no context", lambda s: next(mz.prove(s.folder / "p").runs())),
    Row("round_to: out of another shape", lambda s: kernels.round_to(s.inputs, "bf16", out=torch.ones(3))),
    Row("round_to: out of another dtype", lambda s: kernels.round_to(s.inputs, "bf16", out=torch.ones(4, 16).int())),
    Row("round_to: out too narrow", lambda s: kernels.round_to(s.inputs, "fp32", out=torch.ones(4, 16).half())),
    Row("round_to: out expanded", lambda s: kernels.round_to(s.inputs, "bf16", out=torch.ones(1).expand(4, 16))),
    Row("round_to: out=3", lambda s: kernels.round_to(s.inputs, "bf16", out=3)),
    Row("round_to: whole numbers", lambda s: kernels.round_to(torch.ones(3).long(), "bf16")),
    Row("round_to: a list", lambda s: kernels.round_to([1.0], "bf16")),
    Row("round_to: unknown format", lambda s: kernels.round_to(s.inputs, "bf99")),
    Row("round_to: format=3", lambda s: kernels.round_to(s.inputs, 3)),
    Row("round_to: rounding", lambda s: kernels.round_to(s.inputs, "bf16", rounding="up")),
    Row("round_to: overflow", lambda s: kernels.round_to(s.inputs, "bf16", overflow="wrap")),
    Row("round_to: seed", lambda s: kernels.round_to(s.inputs, "bf16", seed="0", rounding=kernels.Rounding.STOCHASTIC)),
    Row("encode: whole numbers", lambda s: kernels.encode(torch.ones(3).long(), "e4m3")),
    Row("encode: unknown format", lambda s: kernels.encode(s.inputs, "e9m9")),
    Row("decode_codes: numbers", lambda s: kernels.decode_codes(s.inputs, "e4m3")),
    Row("round_to_blocks: unknown format", lambda s: kernels.round_to_blocks(s.inputs, "e4m3x")),
    Row("round_to_blocks: whole numbers", lambda s: kernels.round_to_blocks(torch.ones(32).long(), "mxfp8_e4m3")),
    Row("round_to_blocks: 0 dimensions", lambda s: kernels.round_to_blocks(torch.tensor(1.0), "mxfp8_e4m3")),
    Row("round_to_blocks: axis", lambda s: kernels.round_to_blocks(s.inputs, "mxfp8_e4m3", axis=2)),
    Row("round_to_blocks: format=3", lambda s: kernels.round_to_blocks(s.inputs, 3)),
    Row(
        "round_to_blocks: out expanded",
        lambda s: kernels.round_to_blocks(s.inputs, "mxfp8_e4m3", out=torch.ones(1).expand(4, 16)),
    ),
    Row("quantize_blocks: unknown format", lambda s: kernels.quantize_blocks(s.inputs, "mxfp9")),
    Row("range_stats: whole numbers", lambda s: kernels.range_stats(torch.ones(3).long())),
    Row("range_stats: a list", lambda s: kernels.range_stats([1.0])),
    Row("format_of: int8", lambda s: kernels.format_of(torch.int8)),
    Row("rms_norm: weight", lambda s: rms_norm(s.inputs, torch.ones(3))),
    Row("rms_norm: whole numbers", lambda s: rms_norm(torch.ones(3).long())),
    Row("RMSNorm: input", lambda s: RMSNorm(3)(s.inputs)),
    Row("swiglu: whole numbers", lambda s: swiglu(torch.ones(3).long(), torch.ones(3))),
    Row("swiglu: shapes", lambda s: swiglu(torch.ones(3), torch.ones(4))),
    Row("LinearCrossEntropy: chunk_rows", lambda s: LinearCrossEntropy(4, 4, chunk_rows=0)),
    Row("LinearCrossEntropy: chunk_rows=text", lambda s: LinearCrossEntropy(4, 4, chunk_rows="512")),
    Row("LinearCrossEntropy: shapes", lambda s: s.narrow(s.inputs, torch.zeros(4).long())),
    Row("LinearCrossEntropy: targets", lambda s: s.head(s.inputs, torch.zeros(4))),
]
MISUSE: list[tuple[str, Callable[[Scene], Any]]] = [
    ("update without backward", lambda s: s.engine.update()),
    ("update of an unknown optimizer", lambda s: s.engine.update("critic")),
    ("backward of an unknown optimizer", lambda s: s.engine.backward(s.model[0].weight.float().sum(), "critic")),
    ("backward of a number", lambda s: s.engine.backward(1.0)),
    ("backward of a vector", lambda s: s.engine.backward(s.inputs)),
    ("backward of a constant", lambda s: s.engine.backward(torch.ones(()))),
    ("backward of a whole number", lambda s: s.engine.backward(torch.ones((), dtype=torch.long))),
    ("discard of an unknown optimizer", lambda s: s.engine.discard("critic")),
    ("close inside forward", lambda s: inside_forward(s, s.engine.close)),
    ("backward inside forward", lambda s: inside_forward(s, lambda: s.engine.backward(s.inputs.sum()))),
    ("load None", lambda s: s.engine.load_state_dict(None)),
    ("load an empty state", lambda s: s.engine.load_state_dict({})),
    ("load a list", lambda s: s.engine.load_state_dict([1])),
    ("load another schema", lambda s: s.engine.load_state_dict(s.damaged("schema", value=3))),
    ("load without policy", lambda s: s.engine.load_state_dict(s.damaged("policy", value=...))),
    ("load another policy", lambda s: s.engine.load_state_dict(s.damaged("policy", value="nvfp4"))),
    ("load without models", lambda s: s.engine.load_state_dict(s.damaged("models", value=...))),
    ("load models=3", lambda s: s.engine.load_state_dict(s.damaged("models", value=3))),
    ("load a model=None", lambda s: s.engine.load_state_dict(s.damaged("models", "model", value=None))),
    ("load lacks a weight", lambda s: s.engine.load_state_dict(s.damaged("models", "model", "0.bias", value=...))),
    (
        "load another weight",
        lambda s: s.engine.load_state_dict(s.damaged("models", "model", "0.bias", value=torch.ones(3))),
    ),
    ("load a weight=3", lambda s: s.engine.load_state_dict(s.damaged("models", "model", "2.bias", value=3))),
    ("load optimizers=None", lambda s: s.engine.load_state_dict(s.damaged("optimizers", value=None))),
    ("load an optimizer=1", lambda s: s.engine.load_state_dict(s.damaged("optimizers", "optimizer", value=1))),
    (
        "load no groups",
        lambda s: s.engine.load_state_dict(s.damaged("optimizers", "optimizer", "param_groups", value=[])),
    ),
    ("load a state=3", lambda s: s.engine.load_state_dict(s.damaged("optimizers", "optimizer", "state", 0, value=3))),
    (
        "load another moment",
        lambda s: s.engine.load_state_dict(
            s.damaged("optimizers", "optimizer", "state", 0, "exp_avg", value=torch.ones(3))
        ),
    ),
    ("load a scheduler=[]", lambda s: s.engine.load_state_dict(s.damaged("schedulers", "scheduler", value=[]))),
    ("load weights=3", lambda s: s.engine.load_state_dict(s.damaged("weights", value=3))),
    ("load lanes=3", lambda s: s.engine.load_state_dict(s.damaged("lanes", value=3))),
    ("load a lane=3", lambda s: s.engine.load_state_dict(s.damaged("lanes", value=[3]))),
    ("load a scale=nan", lambda s: s.engine.load_state_dict(s.damaged("lanes", 0, "scale", "scale", value=math.nan))),
    ("load a scale=text", lambda s: s.engine.load_state_dict(s.damaged("lanes", 0, "scale", "scale", value="1"))),
    ("load steps=-1", lambda s: s.engine.load_state_dict(s.damaged("steps", value=-1))),
    ("load steps=text", lambda s: s.engine.load_state_dict(s.damaged("steps", value="1" * 5000))),
    ("load a GradScaler=text", lambda s: s.engine.load_state_dict({"scale": "x", "_growth_tracker": 0})),
    ("load a GradScaler=0", lambda s: s.engine.load_state_dict({"scale": 0.0, "_growth_tracker": 0})),
]
ROWS += [Row(f"Engine {p}: {name}", call, policy=p) for p in SEVERAL for name, call in MISUSE]


def inside_forward(s: Scene, call: Callable[[], Any]) -> Any:
    with s.engine.forward():
        return call()


def inside_audit(call: Any) -> Any:
    with mz.audit():
        return call.__enter__() if isinstance(call, mz.audit) else call()


def inside_ghost() -> Any:
    with mz.ghost_gpu("H100"):
        return mz.ghost_gpu("H100").__enter__()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes with their snapshots, by policy: a refused call leaves its scene as it was for the next."""
    return {"folder": tmp_path_factory.mktemp("refusals")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_refused_call_changes_nothing(row, scenes, monkeypatch):
    folder = scenes["folder"]
    monkeypatch.chdir(folder)
    if row.policy not in scenes:
        (folder / "file").write_text("kept")
        scenes[row.policy] = scene = Scene(folder, row.policy)
        scene.before = snapshot(scene)
    scene = scenes.pop(row.policy)
    before = scene.before | {"torch": torch_state()}  # of this moment, as making another scene draws numbers
    with pytest.raises((MezzotintError, ValueError)) as caught:
        row.call(scene)
    after = snapshot(scene)
    for what, value in before.items():
        assert after[what] == value, what
    scenes[row.policy] = scene
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) <= 700
    if "Outcome" not in row.name:
        assert any(word in text for word in ("; ", "pass ", "write ", "did you mean")), text


def test_every_public_name_has_a_row():
    names = {row.name.replace(":", " ").split()[0] for row in ROWS}
    assert set(mz.__all__) - RECORDS - names == set()
