"""Hostile scripts given to audit, plan and prove: whatever a script does, no command exits 0 without a verdict."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

import pytest
from hostile import Ended, empty_folder, examples
from hypothesis import given
from hypothesis import strategies as st

# statements that may stand before, between or after a script's steps; plain Python survives each of them, or ends
HOSTILE = {
    "close stdout": "sys.stdout.close()",
    "close both": "sys.stdout.close(); sys.stderr.close()",
    "no stdout": "sys.stdout = None",
    "own stdout": "sys.stdout = io.StringIO()",
    "broken stdout": "sys.stdout = object()",
    "detach stdout": "sys.stdout.detach()",
    "close descriptor 1": "os.close(1)",
    "close descriptors": "os.closerange(0, 3)",
    "descriptor to a file": "os.dup2(os.open(os.devnull, os.O_WRONLY), 1)",
    "exit 0 at once": "os._exit(0)",
    "exit 1 at once": "os._exit(1)",
    "sys.exit": "sys.exit(0)",
    "sys.exit text": "sys.exit('done')",
    "sys.exit object": "raise SystemExit(object())",
    "BaseException": "raise BaseException('own')",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "GeneratorExit": "raise GeneratorExit",
    "error without a text": "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "deep recursion": "exec('def f(): f()\\nf()')",
    "clear modules": "sys.modules.clear()",
    "drop mezzotint": "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('mezzotint')]",
    "chdir": "os.chdir('/')",
    "leave a deleted folder": "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')",
    "thread": "threading.Thread(target=lambda: 1 / 0).start()",
    "thread that exits": "threading.Thread(target=sys.exit).start()",
    "thread at work": "threading.Thread(target=time.sleep, args=(0.2,)).start()",
    "daemon": "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "fork": "os.fork() or os._exit(0)",
    "fork that goes on": "os.fork()",
    "term": "os.kill(os.getpid(), signal.SIGTERM)",
    "interrupt": "os.kill(os.getpid(), signal.SIGINT)",
    "ignore signals": "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "alarm": "signal.signal(signal.SIGALRM, lambda *a: 1 / 0); signal.setitimer(signal.ITIMER_REAL, 0.01)",
    "at exit": "atexit.register(os._exit, 0)",
    "at exit error": "atexit.register(lambda: 1 / 0)",
    "excepthook": "sys.excepthook = lambda *a: os._exit(0)",
    "no argv": "sys.argv = None",
    "no path": "sys.path.clear()",
    "trace": "sys.settrace(lambda *a: None)",
    "gc": "gc.disable(); gc.freeze()",
    "no steps any more": "torch.optim.Optimizer.step = lambda *a: None",
    "default device": "torch.set_default_device('meta')",
    "default dtype": "torch.set_default_dtype(torch.float64)",
    "print much": "print('x' * 100_000)",
    "print odd": "print('\\udc80')",
    "write to 1": "os.write(1, b'\\xff{}')",
    "environment": "os.environ.clear()",
    "remove the script": "os.remove(__file__)",
    "builtins": "__builtins__.__dict__.pop('print', None)",
    "numpy errors": "__import__('numpy').seterr(all='raise')",
    "warnings are errors": "__import__('warnings').simplefilter('error')",
    "exit in a hook": "optimizer.register_step_post_hook(lambda *a: os._exit(0))",
    "catch all": "exec('while True:\\n try:\\n  train(); break\\n except BaseException: pass')",
}
HEAD = """import atexit, gc, io, os, signal, sys, threading, time
import torch
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def train():
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
def make_step():
    return train
def make_run(seed, policy):
    while True:
        train()
        yield 1.0
"""
LONGEST = 60.0  # seconds; what hangs for longer is a fault
COMMANDS = (
    ("audit", "--no-report", "--steps", "2", "script.py"),
    ("audit", "--no-report", "--json", "script.py"),
    ("audit", "--no-report", "script.py:make_step"),
    ("plan", "--no-report", "--policy", "bf16", "script.py"),
    ("plan", "--no-report", "--json", "--policy", "bf16", "script.py"),
    ("prove", "--seeds", "2", "--steps", "2", "--out", "proof", "script.py:make_run"),
    ("prove", "--json", "--seeds", "2", "--steps", "2", "--out", "proof", "script.py:make_run"),
)


def scripts() -> st.SearchStrategy[str]:
    """A small training script with hostile statements among its steps."""
    statements = st.sampled_from(sorted(HOSTILE)).map(HOSTILE.__getitem__)
    lines = st.lists(st.one_of(statements, st.just("train()")), min_size=1, max_size=5)
    return lines.map(lambda found: HEAD + "\n".join(found) + "\n")


@cache
def server() -> subprocess.Popen[str]:
    """Return a process that runs commands; see command_server.py."""
    path = Path(__file__).parent / "command_server.py"
    made = subprocess.Popen([sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(made.communicate)
    return made


def ended(folder: Path, arguments: tuple[str, ...]) -> Ended:
    """Run a command in a process of its own; what hangs is an error."""
    with tempfile.TemporaryDirectory() as outside:
        paths = [Path(outside) / name for name in ("out", "err")]
        request = {"folder": str(folder), "out": str(paths[0]), "err": str(paths[1]), "arguments": arguments}
        channel = server()
        assert channel.stdin is not None
        assert channel.stdout is not None
        channel.stdin.write(json.dumps(request) + "\n")
        channel.stdin.flush()
        process = int(channel.stdout.readline())
        killed: list[bool] = []

        def kill() -> None:
            killed.append(True)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)

        timer = threading.Timer(LONGEST, kill)
        timer.start()
        status = int(channel.stdout.readline())
        timer.cancel()
        has_hung = bool(killed)
        kill()  # what the script has left behind
        texts = [path.read_bytes().decode("utf-8", "replace") for path in paths]
    assert not has_hung, f"no end after {LONGEST} s: {texts}"
    return Ended(os.waitstatus_to_exitcode(status), *texts)


@examples(3)
@given(scripts(), st.sampled_from(COMMANDS))
def test_no_script_ends_a_command_without_a_verdict(script: str, arguments: tuple[str, ...]) -> None:
    check_ending(script, arguments)


# here, because a process that has run one has two copies of many modules
@pytest.mark.parametrize("statement", ["sys.modules.clear()", "sys.modules = {}"])
@pytest.mark.parametrize("arguments", [COMMANDS[0], COMMANDS[3], COMMANDS[5]], ids=lambda words: words[0])
def test_lost_modules(statement: str, arguments: tuple[str, ...]) -> None:
    found = check_ending(HEAD + f"train()\ntrain()\nimport sys; {statement}\n", arguments)
    assert found.code in (0, 1, 2, 3)


def check_ending(script: str, arguments: tuple[str, ...]) -> Ended:
    """Run a command on a script, and check that it says its verdict, or why there is none."""
    with empty_folder() as folder:
        (folder / "script.py").write_text(script, encoding="utf-8")
        found = ended(folder, arguments)
    told = f"{found}\nof mezzotint {' '.join(arguments)} with\n{script[len(HEAD) :]}"
    if found.code not in (0, 1, 2, 3):
        # a script may end itself by a signal, or interrupt the command; never quietly
        assert found.code in (130, 143, -signal.SIGTERM, -signal.SIGINT, -signal.SIGALRM), told
        return found
    place = str(Path(sys.modules["mezzotint"].__file__ or "").parent)
    last = [part for part in found.err.split("Traceback (most recent call last)")[1:] if place in part]
    assert not last, f"our own traceback: {told}"
    if found.code == 2:
        assert found.err.strip() or "--json" in arguments, told
    if found.code == 0:
        words = {"audit": ["nothing wrong"], "plan": ["H100"], "prove": ["equivalent", "identical", "better"]}
        assert any(one in found.out for one in words[arguments[0]]), told
    if "--json" in arguments and (found.code in (0, 1, 3) or not found.err.strip()):
        assert json.loads(found.out)["schema"] == f"mezzotint.{arguments[0]}/1", told
    return found
