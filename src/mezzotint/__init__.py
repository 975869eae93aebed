"""Mixed precision training for PyTorch that you can trust.

    import mezzotint as mz

    engine = mz.Engine(model, optimizer, policy="auto", max_grad_norm=1.0)
    for inputs, targets in loader:
        with engine.forward():
            logits, loss = model(inputs, targets)
        engine.backward(loss)
        result = engine.update()

Importing the package does not import torch and changes nothing in it; each name loads on first use.
"""

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mezzotint.auditing.checking import assert_policy as assert_policy
    from mezzotint.auditing.session import audit as audit
    from mezzotint.engine.engine import Engine as Engine
    from mezzotint.engine.result import Outcome as Outcome
    from mezzotint.engine.result import StepResult as StepResult
    from mezzotint.errors import MezzotintError as MezzotintError
    from mezzotint.ghost.session import ghost_gpu as ghost_gpu
    from mezzotint.lowprec.switch import fast_cpu as fast_cpu
    from mezzotint.policy.choose import choose as choose
    from mezzotint.policy.decision import Decision as Decision
    from mezzotint.policy.policy import Policy as Policy
    from mezzotint.policy.scaling import Scaling as Scaling
    from mezzotint.proving.session import prove as prove
    from mezzotint.trace.watch import watch as watch

_HOMES = {
    "Decision": "mezzotint.policy.decision",
    "Engine": "mezzotint.engine.engine",
    "MezzotintError": "mezzotint.errors",
    "Outcome": "mezzotint.engine.result",
    "Policy": "mezzotint.policy.policy",
    "Scaling": "mezzotint.policy.scaling",
    "StepResult": "mezzotint.engine.result",
    "assert_policy": "mezzotint.auditing.checking",
    "audit": "mezzotint.auditing.session",
    "choose": "mezzotint.policy.choose",
    "fast_cpu": "mezzotint.lowprec.switch",
    "ghost_gpu": "mezzotint.ghost.session",
    "prove": "mezzotint.proving.session",
    "watch": "mezzotint.trace.watch",
}

__all__ = [
    "Decision",
    "Engine",
    "MezzotintError",
    "Outcome",
    "Policy",
    "Scaling",
    "StepResult",
    "assert_policy",
    "audit",
    "choose",
    "fast_cpu",
    "ghost_gpu",
    "prove",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mezzotint' has no attribute {name!r}")
    state = random.getstate()  # rich draws numbers while it is imported
    value = getattr(import_module(home), name)
    random.setstate(state)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
