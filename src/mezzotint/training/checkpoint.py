"""Checkpoints: safetensors and JSON in a folder per step, complete or not there, verified before they are believed.

A checkpoint is written beside its place under a hidden name, flushed to the disk, and renamed; so a reader never sees
half of one, whenever the writer dies. Its manifest holds size and SHA-256 of each file and of itself; a flipped bit
anywhere is a refusal, and the checkpoint before serves. Nothing is pickled.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from mezzotint.errors import CheckpointError, MezzotintError, shortened
from mezzotint.files import read_regular, sync_folder
from mezzotint.training.values import flatten, unflatten

SCHEMA = "mezzotint.checkpoint/1"
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
PREFIX, PARTIAL_PREFIX = "step-", ".partial-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was verified: its step, its state as it was saved, and where it lies."""

    step: int
    state: Any
    path: Path


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write `state` as the checkpoint of `step` into `folder` and return its path; keep the newest `keep`.

    Older ones go only when the new one is on the disk. A checkpoint of the same step is replaced. Raises
    CheckpointError when the disk is full or cannot be written; what was saved before is untouched then.
    """
    target = folder / f"{PREFIX}{step:08d}"
    partial = folder / f"{PARTIAL_PREFIX}{step:08d}-{os.getpid()}"
    tree, tensors = flatten(state)
    try:
        folder.mkdir(exist_ok=True)  # without its parents: a run that was removed is not made again
        _remove_partials(folder)
        partial.mkdir()
        _write_files(partial, step, tree, tensors)
        if target.exists():
            _discard(target)
        partial.rename(target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise CheckpointError(_why_not_saved(folder, step, error, needed)) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        _discard(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first, whole or not."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit())


def load_newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """Return the newest checkpoint that is whole, and a sentence for each newer one that is not.

    Raises CheckpointError, naming what is wrong with each, where none is.
    """
    refusals: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path), refusals
        except CheckpointError as error:
            refusals.append(str(error))
    if not refusals:
        raise CheckpointError(f"{folder} holds no checkpoint; the run saved none before it ended, so start it again")
    raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(refusals)}")


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint at `path`, its files verified before they are parsed.

    Raises CheckpointError where a file is missing, truncated or changed, or the schema is another.
    """
    manifest = _read_manifest(path)
    contents = {name: _read_verified(path / name, facts) for name, facts in manifest["files"].items()}
    try:
        state = unflatten(json.loads(contents[STATE]), safetensors.torch.load(contents[TENSORS]))
    except MezzotintError:
        raise
    except Exception as error:  # safetensors raises a class of its own, and a tree can be odd in many ways
        raise CheckpointError(
            f"{path} holds no state that mezzotint saved ({type(error).__name__}: {shortened(error)}); "
            "use an older checkpoint"
        ) from None
    return Checkpoint(step=manifest["step"], state=state, path=path)


def _write_files(folder: Path, step: int, tree: Any, tensors: dict[str, Tensor]) -> None:
    _write(folder / TENSORS, safetensors.torch.save(tensors))
    _write(folder / STATE, json.dumps(tree).encode())
    files = {name: _facts((folder / name).read_bytes()) for name in (TENSORS, STATE)}
    manifest = {"schema": SCHEMA, "step": step, "files": files}
    _write(folder / MANIFEST, _sealed(manifest))
    sync_folder(folder)


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """Return the manifest as bytes, its own checksum in front."""
    body = json.dumps(manifest, sort_keys=True).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _read_manifest(path: Path) -> dict[str, Any]:
    content = _read(path / MANIFEST)
    seal, _, body = content.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != seal:
        raise CheckpointError(f"{path / MANIFEST} is damaged: its checksum does not match its content")
    try:
        manifest = json.loads(body, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} is not a manifest: {shortened(error)}") from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if isinstance(schema, str) and schema != SCHEMA:
        raise CheckpointError(f"{path} has schema {shortened(schema)}, this version reads {SCHEMA}; update mezzotint")
    if not _is_manifest(manifest):
        raise CheckpointError(
            f"{path / MANIFEST} is not a manifest: it must hold schema, step and files, with size and checksum of "
            f"{TENSORS} and {STATE}; use an older checkpoint"
        )
    name = f"{PREFIX}{manifest['step']:08d}"
    if path.name != name:
        raise CheckpointError(f"{path} holds step {shortened(manifest['step'])}; its folder must be named {name}")
    return dict(manifest)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _is_manifest(manifest: Any) -> bool:
    """Return whether a parsed manifest has the keys and types that `_write_files` writes, and no other."""
    if not isinstance(manifest, dict) or set(manifest) != {"schema", "step", "files"}:
        return False
    step, files = manifest["step"], manifest["files"]
    if type(step) is not int or not 0 <= step < 2**63 or not isinstance(files, dict):
        return False
    return set(files) == {TENSORS, STATE} and all(
        isinstance(facts, dict)
        and set(facts) == {"bytes", "sha256"}
        and type(facts["bytes"]) is int
        and isinstance(facts["sha256"], str)
        for facts in files.values()
    )


def _read_verified(path: Path, facts: Mapping[str, Any]) -> bytes:
    content = _read(path)
    if len(content) != facts["bytes"]:
        raise CheckpointError(f"{path} is damaged: it has {len(content)} bytes of {facts['bytes']}")
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
    return content


def _facts(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _discard(path: Path) -> None:
    """Remove a checkpoint; under another name first, so that a reader never meets half of it."""
    doomed = path.with_name(f"{PARTIAL_PREFIX}old-{path.name}-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _remove_partials(folder: Path) -> None:
    """Remove what a killed writer left; the run directory's lock keeps out a second writer."""
    for leftover in folder.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _why_not_saved(folder: Path, step: int, error: OSError, needed: int) -> str:
    if not folder.parent.exists():
        return (
            f"the checkpoint of step {step} was not saved: {folder.parent} was removed while the run trained into it, "
            "so it cannot be resumed; start it again with another --out"
        )
    kept = [path.name for path in list_checkpoints(folder)]
    safe = f"{kept[-1]} and older are safe" if kept else "none was saved before"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        advice = "make room and go on with --resume" if kept else "make room and start the run again"
        return (
            f"the checkpoint of step {step} was not saved: the disk of {folder} is full (it needs "
            f"{needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free); {safe}; {advice}"
        )
    return f"the checkpoint of step {step} was not saved into {folder}: {error.strerror or error}; {safe}"
