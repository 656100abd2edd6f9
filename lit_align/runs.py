"""Run folders: `runs/<stage>/<time>/`, and finding checkpoints in them. Paths only, nothing heavy."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from datetime import datetime
from itertools import count
from pathlib import Path

RUNS = "runs"
LATEST = "latest"
CHECKPOINTS = "checkpoints"
EXPORT = "hf"
PART = ".part"
# Set by the process that the user started, read by the ranks that it starts.
VARIABLE = "LIT_ALIGN_RUN_DIR"


def choose_run_dir(root: str | Path, name: str) -> Path:
    """A folder of its own for a new run: `<root>/<name>/<time or job id>`, made by this call.

    Ranks that this process starts are told by the environment; ranks that torchrun or SLURM start share the job's id.
    """
    if _rank() > 0 and (told := os.environ.get(VARIABLE)):
        return Path(told)
    parent, job = Path(root) / name, _job_id()
    if job is not None:
        return _announced(parent / job)
    stem = datetime.now().strftime("%Y%m%d-%H%M%S")
    if _rank() > 0:
        return parent / stem  # never written to: what ranks write together goes where rank 0 says
    for n in count():
        folder = parent / (f"{stem}-{n}" if n else stem)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return _announced(folder)
    raise AssertionError("count() does not end")


def job_run(root: str | Path, name: str) -> Path | None:
    """The folder of this job's id if an earlier start of the job has left a checkpoint there; None if not.

    A checkpoint and not a folder, since another rank may have made that a moment ago; no rank has begun to train.
    """
    job = _job_id()
    if job is None or (_rank() > 0 and VARIABLE in os.environ):  # the second: see `choose_run_dir`
        return None
    folder = Path(root) / name / job
    return folder if any(folder.glob(f"{CHECKPOINTS}/*.ckpt")) else None


def given_run_dir(folder: str | Path) -> Path:
    """The folder that the user named, made if it is not there."""
    return _announced(Path(folder))


def link_latest(run_dir: Path) -> None:
    """Points `latest`, beside the run folder, at it."""
    if _rank() > 0:
        return
    link = run_dir.parent / LATEST
    # A link of another name moved over the old one: no moment without a link, and two runs cannot collide.
    fresh = run_dir.parent / f".{LATEST}-{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(run_dir.name)
    fresh.replace(link)


def latest_run(root: str | Path, stage: str) -> Path:
    """The newest training run of a stage.

    Raises:
        ValueError: There is none.
    """
    found = newest_run(root, stage)
    if found is None:
        link = Path(root) / stage / LATEST
        raise ValueError(f"ckpt_path last: there is no run of stage {stage} ({link} does not exist); give run_dir")
    return found


def newest_run(root: str | Path, stage: str) -> Path | None:
    """The same; None if there is none."""
    link = Path(root) / stage / LATEST
    if not link.exists():
        return None
    return link.parent / os.readlink(link) if link.is_symlink() else link


def last_checkpoint(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run; if a newer one is not whole, a line says so.

    Raises:
        ValueError: There is none.
    """
    found = newest_checkpoint(run_dir)
    if found is None:
        raise ValueError(
            f"no checkpoint: {run_dir / CHECKPOINTS} holds no whole *.ckpt; the run ended before it saved one"
        )
    return found


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The same; None if there is none."""
    folder = run_dir / CHECKPOINTS
    paths = [path for path in (*folder.glob("*.ckpt"), *folder.glob(f"*.ckpt{PART}")) if not path.is_symlink()]
    paths.sort(key=_age, reverse=True)
    faults = {}
    for path in paths:
        if (fault := _fault(path)) is None:
            break
        faults[path] = fault
    found = next((path for path in paths if path not in faults), None)
    for path, fault in faults.items():
        if _rank() == 0:
            instead = f"going on from {found.name}" if found else "there is no older one"
            print(f"{path}: this checkpoint {fault}; {instead}", file=sys.stderr)
    return found


def _fault(path: Path) -> str | None:
    """Why no run can go on from there; None if one can."""
    if not is_whole(path):
        return "was not written to its end"
    return "holds weights alone, without the optimizer's state" if _is_weights_alone(path) else None


def _is_weights_alone(path: Path) -> bool:
    """Whether a user's `ModelCheckpoint(save_weights_only=True)` wrote it; only its entries' names are looked for."""
    try:
        with zipfile.ZipFile(path if path.is_file() else path / "meta.pt") as archive:
            listed = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    except zipfile.BadZipFile:
        return False  # whoever reads it says what is wrong
    return any(b"pytorch-lightning_version" in names and b"optimizer_states" not in names for names in listed)


def _age(path: Path) -> tuple[int, int]:
    """The step in the name, where there is one: a copied folder has other times."""
    step = re.search(r"step=?(\d+)", path.name)
    return int(step[1]) if step else -1, path.stat().st_mtime_ns


def is_whole(path: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    if path.is_file():
        # A checkpoint is a zip archive, whose list of contents stands at its end.
        return path.suffix != PART and zipfile.is_zipfile(path)
    # A sharded checkpoint is a folder; these two files are written last, and then it gets its name.
    written = path.suffix != PART and all((path / name).is_file() for name in (".metadata", "meta.pt"))
    return written and not _absent_shards(path)


def _absent_shards(folder: Path) -> list[str]:
    """Files that a sharded checkpoint names and that are not there, or cut: lost when the folder was copied."""
    from lit_align.sharded_metadata import read_list  # torch, which takes its time

    try:
        places = (read_list(folder).storage_data or {}).values()
    except ValueError:
        return []  # whoever reads it says what is wrong
    ends: dict[str, int] = {}
    for place in places:
        ends[place.relative_path] = max(place.offset + place.length, ends.get(place.relative_path, 0))
    there = {path.name: path.stat().st_size for path in folder.iterdir()}
    return [name for name, end in ends.items() if there.get(name, -1) < end]


def _announced(folder: Path) -> Path:
    if _rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[VARIABLE] = str(folder)
    return folder


def _rank() -> int:
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID"))
    told = next((int(rank) for rank in ranks if rank is not None), None)
    # Lightning's own launcher tells the processes of a host apart, and NODE_RANK the hosts: not 0 is all that matters.
    return told if told is not None else int(os.environ.get("LOCAL_RANK", 0)) or int(os.environ.get("NODE_RANK", 0))


def _job_id() -> str | None:
    """What the ranks of a job that torchrun or SLURM started have in common; None for a process on its own."""
    tasks = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    if int(tasks) == 1:
        return None
    if (run := os.environ.get("TORCHELASTIC_RUN_ID", "none")) != "none":  # "none": torchrun without --rdzv_id
        return run
    if (job := os.environ.get("SLURM_JOB_ID")) is not None:
        return f"{job}.{os.environ.get('SLURM_STEP_ID', '0')}"
    return None


def set_aside(path: Path) -> None:
    """Renames a file of an earlier part of the run, so that a resumed run does not write over it."""
    if _rank() == 0 and path.exists():
        taken = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in count(1))
        path.rename(next(name for name in taken if not name.exists()))
