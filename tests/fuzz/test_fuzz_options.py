"""Hostile options of every command: a sentence and an exit code, one JSON object, short echoes, nothing written."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import click
import typer
from hostile import WorkBegins, check, contents, empty_folder, examples, numbers, run, texts
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.cli.main import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SCRIPT = """import torch
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(4):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
RECIPE = 'recipe = "small"\n[train]\nsteps = 1\n'
# what takes long once the options were understood
WORK = (
    "mezzotint.auditing.script.run_target",
    "mezzotint.auditing.planning.plan_target",
    "mezzotint.auditing.planning.audit_on_ghost",
    "mezzotint.cli.bisect.find_islands",
    "mezzotint.cli.bench._run",
    "mezzotint.cli.doctor.diagnose",
    "mezzotint.cli.train._run",
    "mezzotint.cli.prove.carry_out",
    "mezzotint.cli.demo.carry_out",
    "mezzotint.claims.evaluate.outcome_of",
    "mezzotint.cli.policy._ask",
)
WORDS = {
    "policy": ["float32", "bf16-mixed", "bf16", "fp99", "auto", "compute=float32,", "scaling=dynamic(initial=inf)"],
    "gpu": ["H100", "A100,H100", "H1000", "M2", ",", "gpu.toml"],
    "device": ["cpu", "cuda", "cuda:99", "cpu:-1", "meta", "tpu"],
    "settings": [
        "train.steps=1",
        "train.steps",
        "x.y.z=1",
        "model=1",
        "model.dim=1e9",
        "=",
        "seed=-1",
        "data.source=[1]",
    ],
    "arms": ["float32", "a=float32", "a=float32,seed=1", "=", "a=,,", "a=b,c", "bf16-mixed"],
    "metrics": ["accuracy:1%:higher", "loss", ":", "a:-1", "a:nan%", "a:1%:sideways", "auc:0.002abs:higher"],
    "script": ["script.py", "script.py:nothing", "missing.py", "."],
    "recipe": ["tiny-1m", "small.toml", "missing.toml", "tiny"],
    "target": ["demo", "small.toml", "script.py", "script.py:make_run", "missing.py:f"],
}


@contextlib.contextmanager
def work_begins() -> Iterator[None]:
    """Stop every command where its work would begin."""
    with contextlib.ExitStack() as stack:
        for name in WORK:
            stack.enter_context(mock.patch(name, side_effect=WorkBegins))
        yield


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, ...]:
    """A command with some of its options, most of them with a value that nobody would give."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    parameters = COMMANDS[name].params
    line = [name]
    positional = []
    for parameter in draw(st.lists(st.sampled_from(parameters), max_size=4)) if parameters else []:
        values = st.sampled_from(WORDS.get(parameter.name, ["small.toml", "missing", "."])) | texts() | numbers()
        if parameter.param_type_name == "argument":
            positional.append(draw(values))
            continue
        line.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
        if not parameter.is_flag:
            line += [draw(values) for _ in range(max(parameter.nargs, 1))]
    if draw(st.integers(0, 9)) == 0:
        line.append(draw(texts()))
    if draw(st.booleans()):
        line.append("--json")
    return (*line, *positional)


def _is_writing(arguments: tuple[str, ...]) -> bool:
    return any(word in arguments for word in ("--out", "--save", "--trace", "--summary"))


@examples(150)
@given(command_lines())
def test_hostile_options_end_in_a_sentence(arguments: tuple[str, ...]) -> None:
    with empty_folder() as folder, work_begins():
        (folder / "script.py").write_text(SCRIPT)
        (folder / "small.toml").write_text(RECIPE)
        before = contents(folder)
        ended = run(*arguments)
        check(ended, arguments)
        if ended.code == 2:
            assert contents(folder) == before, f"{ended} wrote {set(contents(folder)) ^ set(before)}"


def test_the_targets_are_the_commands() -> None:
    assert isinstance(typer.main.get_command(app), click.Group) or len(COMMANDS) >= 10
    for name in COMMANDS:
        with empty_folder():
            check(run(name, "--no-such-option"), (name,))
