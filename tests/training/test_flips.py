"""One flipped bit in any file of a run or a proof: it goes on to the same figures, or an error names the file."""

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mezzotint.cli.train import _prepare, _run
from mezzotint.data.tokens import open_corpus
from mezzotint.errors import MezzotintError
from mezzotint.recipes.catalog import find_recipe
from mezzotint.training.checkpoint import TENSORS, list_checkpoints
from mezzotint.training.config import RunConfig, to_toml, with_settings
from mezzotint.training.loop import run_training
from mezzotint.training.rundir import RunDirectory
from mezzotint.training.tracker import NoTracker
from mezzotint.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "proving"))
from proofs import Quiet, prove, resume, substance
from proving_programs import script

from mezzotint.proving.conclusion import write_proof
from mezzotint.proving.store import ProofFolder
from mezzotint.proving.targets import experiment_for

SETTINGS = [
    "train.steps=6", "train.save_every=2", "train.keep_checkpoints=2", "train.evaluate_every=3", 'policy="float32"',
    "train.evaluate_batches=1", "train.batch_size=2", "train.sample_tokens=0", "model.num_layers=1", "model.dim=16",
    "model.ffn_dim=32", "model.num_heads=2", "model.block_size=16", "model.dropout=0.1", 'device="cpu"',
    f"data.source={json.dumps([random.__file__])}",
]  # fmt: skip


class _Interrupted(BaseException):
    pass


class _Interrupting(NoTracker):
    """Ends a run like a kill after the metrics of its fifth update, of which no checkpoint was saved."""

    def write(self, line: Any) -> None:
        if line["step"] == 5:
            raise _Interrupted


class _Silent:
    def status(self, status: Any) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def train(config: RunConfig, folder: Path, tracker: NoTracker) -> None:
    run = RunDirectory.create(folder, to_toml(config))
    with run:
        trainer = Trainer(config, open_corpus(config.data, block_size=config.model.block_size))
        run_training(trainer, run, _Silent(), resume=False, tracker=tracker)


def go_on(folder: Path) -> None:
    """Do what `mezzotint train --resume` does."""
    config, run, _ = _prepare(None, [], None, [], None, folder)
    with run:
        _run(config, run, is_resumed=True, has_tensorboard=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a run that came to its end, and one that was interrupted after step 5."""
    base = tmp_path_factory.mktemp("runs")
    config = with_settings(find_recipe("tiny-1m"), SETTINGS)
    train(config, base / "whole", NoTracker())
    with pytest.raises(_Interrupted):
        train(config, base / "cut", _Interrupting())
    return base / "whole", base / "cut"


def figures(folder: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return {line.pop("step"): {k: v for k, v in line.items() if k not in ("seconds", "crc32")} for line in lines}


def weights(folder: Path) -> bytes:
    newest = list_checkpoints(folder / "checkpoints")[-1]
    assert newest.name == "step-00000006"
    return (newest / TENSORS).read_bytes()


def flips(path: Path, count: int) -> Iterator[tuple[int, bytes]]:
    """Yield the content of a file with one bit flipped, and where; nothing for an empty file."""
    content = path.read_bytes()
    chance = random.Random(path.name)
    for place in chance.sample(range(len(content)), min(count, len(content))):
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        yield place, bytes(damaged)


def files_of(folder: Path) -> list[Path]:
    # reports are written anew from the rest, and never read
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".html", ".md"))
    return sorted(path.relative_to(folder) for path in paths)


def test_a_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    whole, cut = runs
    expected, final = figures(whole), weights(whole)
    faults = []
    for origin, count in ((cut, 12), (whole, 1)):
        for name, place, folder in damaged(origin, tmp_path / "run", count):
            try:
                go_on(folder)
            except MezzotintError as error:
                if str(folder / name) not in str(error):
                    faults.append(f"{name}, byte {place}: the error names another place: {error}")
                continue
            found, known = figures(folder), expected
            if name.name == "metrics.jsonl":  # a damaged line is left out
                known = {step: expected[step] for step in found}
            if name.name == "config.toml":  # the rhythm of evaluations may be another
                found, known = _without_validation(found), _without_validation(expected)
            if len(found) < 5 or found != known or weights(folder) != final:
                faults.append(f"{name}, byte {place}: {found}")
    assert not faults


def _without_validation(lines: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {step: {k: v for k, v in line.items() if k != "validation_loss"} for step, line in lines.items()}


def damaged(origin: Path, folder: Path, count: int) -> Iterator[tuple[Path, int, Path]]:
    """Yield a copy of `origin` with a flipped bit, for `count` places of each file: the file's name, place and copy."""
    for name in files_of(origin):
        # an older checkpoint is read only where the newest is damaged; other runs are read like the last
        is_other = {"step-00000002", "seed-0", "float32"} & {*name.parts}
        for place, content in flips(origin / name, 1 if is_other else count):
            shutil.copytree(origin, folder)
            (folder / name).write_bytes(content)
            yield name, place, folder
            shutil.rmtree(folder)


def test_a_proof(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    whole = prove(origin, experiment_for(script(tmp_path), seeds=2))
    write_proof(ProofFolder.open(origin), whole)
    expected = substance(whole)
    faults = []
    for name, place, folder in damaged(origin, tmp_path / "proof", 8):
        try:
            found = resume(folder, Quiet())
        except MezzotintError as error:
            if str(folder / name) not in str(error):
                faults.append(f"{name}, byte {place}: the error names another place: {error}")
            continue
        if substance(found) != expected:
            faults.append(f"{name}, byte {place}: another result")
    assert not faults
