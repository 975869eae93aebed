"""Scripts run as they are: every way to end, what a script may expect, and what is said about what was not seen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mezzotint.auditing.planning import audit_on_ghost
from mezzotint.auditing.script import Ending, Outcome, parse_target, run_target
from mezzotint.errors import UserError

HEAD = """
import sys, os, torch
from torch import nn
torch.manual_seed(0)
net = nn.Linear(4, 2)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
def step():
    loss = net(torch.randn(3, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
"""


def run(folder: Path, body: str, *arguments: str, function: str = "", steps: int = 3, **options) -> Outcome:
    path = folder / "train.py"
    path.write_text(HEAD + body)
    target = parse_target(f"{path}:{function}" if function else str(path), arguments, is_module=False)
    return run_target(target, steps=steps, has_ranges=False, **options)


APART = """
import json, sys
from mezzotint.auditing.script import parse_target, run_target
trace = run_target(parse_target(sys.argv[1], [], is_module=False), steps=3, has_ranges=False).trace
print(json.dumps([len(trace.steps), trace.notes]))
"""


def run_apart(folder: Path, body: str) -> tuple[int, list[str]]:
    """Return the number of steps and the notes of a script that forks: torch forbids autograd in a fork of a process
    whose autograd has used threads, as other tests' has."""
    (folder / "train.py").write_text(HEAD + body)
    ended = subprocess.run(
        [sys.executable, "-c", APART, str(folder / "train.py")], capture_output=True, text=True, timeout=280, check=True
    )
    num_steps, notes = json.loads(ended.stdout)
    return num_steps, notes


def test_a_loop_is_stopped_after_its_steps(tmp_path: Path):
    outcome = run(tmp_path, "for i in range(100): step()\nraise AssertionError('never')")
    assert outcome.ending is Ending.STEPS
    assert len(outcome.trace.steps) == 3


def test_what_follows_the_last_step_is_seen(tmp_path: Path):
    outcome = run(
        tmp_path, f"for i in range(9):\n step()\n torch.save(optimizer.state_dict(), {str(tmp_path / 'x')!r})", steps=1
    )
    assert "save" in {event.name for event in outcome.trace.events}


def test_arguments_name_and_folder_are_the_script_s_own(tmp_path: Path):
    (tmp_path / "neighbour.py").write_text("value = 3")
    body = """
import neighbour, pickle
assert __name__ == "__main__" and sys.modules["__main__"].step is step
assert sys.argv[1:] == ["--lr", "1", "--steps", "7"], sys.argv
assert __file__ == sys.argv[0]
pickle.dumps(step)
step()
"""
    outcome = run(tmp_path, body, "--lr", "1", "--steps", "7")
    assert (outcome.ending, outcome.text) == (Ending.END, None)
    assert len(outcome.trace.steps) == 1


def test_python_is_put_back(tmp_path: Path):
    before = sys.argv, list(sys.path), sys.modules["__main__"]
    run(tmp_path, "step()")
    assert before == (sys.argv, sys.path, sys.modules["__main__"])


def test_a_function_that_makes_a_step(tmp_path: Path):
    outcome = run(tmp_path, "def make():\n    return step\nassert __name__ != '__main__'", function="make", steps=2)
    assert (outcome.ending, outcome.text) == (Ending.END, None)
    assert len(outcome.trace.steps) == 2


def test_an_update_by_hand_is_a_step_of_a_function(tmp_path: Path):
    text = """
def make():
    w = torch.ones(2, requires_grad=True)
    def step():
        w.square().sum().backward()
        with torch.no_grad():
            w.sub_(0.1 * w.grad)
        w.grad = None
    return step
"""
    outcome = run(tmp_path, text, function="make", steps=2)
    assert [step.optimizers for step in outcome.trace.steps] == [("by hand",), ("by hand",)]
    assert [step.loss for step in outcome.trace.steps] == pytest.approx([2.0, 1.28])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_is_noted_once(tmp_path: Path):
    text = "child = os.fork()\nif not child:\n    step()\n    os._exit(0)\nos.waitpid(child, 0)"
    num_steps, notes = run_apart(tmp_path, text)
    assert notes == ["1 process was started, and what ran there was not seen: a fork of the script"]
    assert num_steps == 0


def test_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "audited_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(HEAD + "assert __name__ == '__main__'\nassert sys.argv[1:] == ['a']\nstep()")
    monkeypatch.chdir(tmp_path)
    outcome = run_target(parse_target("audited_package.train", ["a"], is_module=True), steps=3, has_ranges=False)
    assert (outcome.ending, outcome.text) == (Ending.END, None)
    assert len(outcome.trace.steps) == 1


@pytest.mark.parametrize(
    ("body", "ending", "text", "steps"),
    [
        ("step()\nsys.exit(3)", Ending.EXIT, "3", 1),
        ("step()\nsys.exit('no data')", Ending.EXIT, "no data", 1),
        ("step()\n1 / 0", Ending.ERROR, "ZeroDivisionError: division by zero at ", 1),
        ("net(torch.randn(3, 5))", Ending.ERROR, "RuntimeError: ", 0),
        ("print('nothing')", Ending.END, None, 0),
        ("raise KeyboardInterrupt", Ending.INTERRUPT, None, 0),
    ],
)  # fmt: skip
def test_endings(tmp_path: Path, body: str, ending: Ending, text: str | None, steps: int):
    outcome = run(tmp_path, body)
    assert outcome.ending is ending
    assert outcome.text == text or (text is not None and str(outcome.text).startswith(text))
    assert len(outcome.trace.steps) == steps


def test_an_error_is_placed_in_the_user_s_file(tmp_path: Path):
    outcome = run(tmp_path, "net(torch.randn(3, 5))")
    assert str(outcome.text).endswith(f"at {tmp_path / 'train.py'}:{len(HEAD.splitlines()) + 1}")


def test_a_script_that_swallows_everything_is_ended(tmp_path: Path):
    body = """
while True:
    try:
        step()
    except BaseException:
        pass
"""
    seen = []

    class EndedError(BaseException):
        pass

    def stuck(trace):
        seen.append(len(trace.steps))
        raise EndedError

    body = body.replace("pass", "if type(sys.exc_info()[1]).__name__ == 'EndedError': raise")
    outcome = run(tmp_path, body, on_stuck=stuck)
    assert seen == [3]
    assert outcome.ending is Ending.ERROR


def test_processes_are_mentioned(tmp_path: Path):
    outcome = run(tmp_path, "import subprocess\nsubprocess.run([sys.executable, '-c', 'pass'])")
    assert any("1 process" in note and "was not seen" in note for note in outcome.trace.notes)


def test_a_forked_child_goes_its_way(tmp_path: Path):
    out = tmp_path / "child"
    body = f"""
import pathlib
child = os.fork()
if child == 0:
    for i in range(5): step()
    pathlib.Path({str(out)!r}).write_text("trained")
    os._exit(0)
os.waitpid(child, 0)
step()
"""
    num_steps, _ = run_apart(tmp_path, body)
    assert out.read_text() == "trained"
    assert num_steps == 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.py", None, "does not exist"),
        ("folder", "", "is a folder"),
        ("broken.py", "def f(:", "is not a Python script"),
        ("binary.py", "\0\0", "is not a Python script"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, name: str, text: str | None, said: str):
    path = tmp_path / name
    if text == "":
        path.mkdir()
    elif text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said):
        run_target(parse_target(str(path), [], is_module=False), steps=1, has_ranges=False)


@pytest.mark.parametrize(
    ("function", "said"), [("absent", "has no function absent"), ("number", "returned int, not a function")]
)
def test_functions_that_make_no_step_are_refused(tmp_path: Path, function: str, said: str):
    with pytest.raises(UserError, match=said):
        run(tmp_path, "def number(): return 3", function=function)


def test_an_unknown_module_is_refused():
    with pytest.raises(UserError, match="cannot be found"):
        run_target(parse_target("no_such_module_here", [], is_module=True), steps=1, has_ranges=False)


def test_ghosts_lose_no_updates(tmp_path: Path):
    text = HEAD.replace("net = nn.Linear(4, 2)", "net = nn.Linear(4, 2).bfloat16().cuda()")
    text += """
for _ in range(2):
    net(torch.ones(3, 4, device='cuda').bfloat16()).float().square().mean().backward()
    optimizer.step()
"""
    (tmp_path / "train.py").write_text(text)
    outcome = audit_on_ghost(parse_target(str(tmp_path / "train.py"), [], is_module=False), "H100", steps=2)
    assert len(outcome.trace.steps) == 2
    assert not outcome.trace.updates  # there are no numbers to compare
