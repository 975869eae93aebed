"""Hostile options of every command: a sentence and an exit code, one JSON object, short echoes, nothing written."""

import typer
from hostile import LONG, check, contents, empty_folder, examples, numbers, run, texts, work_begins
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


@examples(80)
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


def test_every_command_shortens_what_it_repeats() -> None:
    assert len(COMMANDS) >= 10
    for name, command in COMMANDS.items():
        options = [one.opts[0] for one in command.params if one.param_type_name == "option" and not one.is_flag]
        for words in (["--no-such-option" + LONG * 1000], [LONG * 1000], *([one, LONG * 1000] for one in options)):
            with empty_folder(), work_begins():
                check(run(name, *words), (name, *words))
