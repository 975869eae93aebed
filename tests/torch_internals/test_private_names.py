"""No module outside `torch_internals` reads a private name of torch, and every name that is read there is declared."""

import ast
from pathlib import Path

import pytest

import mezzotint
from mezzotint.torch_internals import registry

SRC = Path(mezzotint.__file__).parent
PACKAGE = SRC / "torch_internals"
FILES = sorted(path for path in SRC.rglob("*.py") if PACKAGE not in path.parents)

# names that begin with an underscore by a public convention of Python, and those of libraries other than torch
PUBLIC = frozenset({"sys._getframe", "os._exit", "Target._fields", "getattr(transformers, head)._model_mapping"})
READERS = frozenset({"getattr", "hasattr", "setattr", "delattr", "wrap", "replace", "attrgetter"})


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def own_names() -> set[str]:
    """The private names that our own modules and classes define, and the attributes that they set on objects."""
    found: set[str] = set()
    for path in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    declared = {part for one in registry.declared() for part in one.path.split(".")}
    return {name for name in found if is_private(name)} - declared


def private_uses(source: str, own: set[str]) -> list[str]:
    """Every place where a module reads a private name that is not ours, as text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            if any(is_private(part) for part in parts):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Import):
            found += [
                f"line {node.lineno}: {ast.unparse(node)}"
                for alias in node.names
                if alias.name.startswith("torch.") and any(is_private(part) for part in alias.name.split("."))
            ]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            text = ast.unparse(node)
            owner = ast.unparse(node.value)
            is_ours = owner in ("self", "cls", "super()", "aten", "_aten") or node.attr in own
            if text.startswith("torch.") or not (is_ours or text in PUBLIC):
                found.append(f"line {node.lineno}: {text}")
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            # an owner comes first: `text.replace("_", " ")` is a string's method
            names = node.args if name == "attrgetter" else node.args[1:2]
            texts = [a.value for a in names if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            parts = {part for text in texts for part in text.split(".")}
            if node.args and isinstance(node.args[0], ast.Constant) and name != "attrgetter":
                continue
            if name in READERS and any(is_private(part) and part.isidentifier() and part not in own for part in parts):
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


OWN = own_names()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_no_private_name_of_torch_outside_the_package(path: Path) -> None:
    assert private_uses(path.read_text(encoding="utf-8"), OWN) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._get_tracing_state()",
        "import torch._C",
        "import torch._subclasses as fake",
        "from torch._C import DispatchKey",
        "from torch import _foreach_abs",
        "from torch.autograd import _engine_run_backward",
        "from torch.utils._pytree import tree_map",
        "getattr(torch.autograd, '_engine_run_backward', None)",
        "patches.wrap(torch.autograd, '_engine_run_backward', around)",
        "patches.replace(flex, '_vmap_for_bhqkv', around)",
        "hasattr(optimizer, '_optimizer_step_pre_hooks')",
        "operator.attrgetter('autograd._engine_run_backward')",
        "tensor._version",
        "module._parameters.items()",
        "torch.ops.aten._grouped_mm",
    ],
)
def test_the_law_finds_each_kind_of_use(source: str) -> None:
    assert private_uses(source, OWN)


def test_every_private_name_in_the_package_is_declared() -> None:
    declared = {part for one in registry.declared() for part in one.path.split(".")}
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) != "self"
        }
        missing = used - declared - OWN
        assert not missing, f"{path.name} reads {sorted(missing)}, which no declaration names"


def test_names_are_there_and_behave(recwarn: pytest.WarningsRecorder) -> None:
    missing = [one.path for one in registry.declared() if not one.is_available()]
    assert missing == [], f"this torch has no {missing}"


def test_declarations_say_what_is_lost() -> None:
    for one in registry.declared():
        assert bool(one.noted_in) == bool(one.lost) == bool(one.unknown), one.path
        assert one.purpose, one.path
