"""Two hosts, as far as one machine can be two: two agents of torchrun, two tasks of srun, two network namespaces."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_align import runs

sys.path.insert(0, str(Path(__file__).parent))
import hosts
from hosts import REPOSITORY, Processes, absolute, fit, free_port, losses, one, slurm, torchrun

SHARDED = f"--config={REPOSITORY}/configs/trainer/fsdp_cpu2.yaml"
STRATEGY = {"sft": "--trainer.strategy=ddp", "dpo": SHARDED}

pytestmark = pytest.mark.slow
long = pytest.mark.long


def command(stage, run_dir, *options):
    return fit(stage, *([f"--run_dir={run_dir}"] if run_dir else []), *absolute(stage), *options)


def files(run_dir):
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if ".ckpt/" not in str(path)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder of the stage's run in one process."""
    root = tmp_path_factory.mktemp("alone")

    def once(stage):
        run = root / stage / "run"
        if not run.exists():
            one(root / stage, command(stage, run))
        return run

    return once


def close(run_dir, other):
    want, got = losses(other), losses(run_dir)
    assert want.keys() == got.keys() and len({step for step, _ in want}) == 4 and (0, "train/loss") in want
    assert [got[key] for key in want] == pytest.approx(list(want.values()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=long)])
def test_two_hosts_are_one_run(stage, alone, tmp_path):
    run = tmp_path / "run"
    statuses, said = torchrun(tmp_path / "first", command(stage, run, STRATEGY[stage]))
    assert statuses == [0, 0], said
    close(run, alone(stage))
    assert files(run) == files(alone(stage)), "one folder, and everything in it once"
    resumed = tmp_path / "resumed" / "checkpoints"
    resumed.mkdir(parents=True)
    first = run / "checkpoints" / "step000002.ckpt"
    (shutil.copytree if first.is_dir() else shutil.copy)(first, resumed / first.name)
    again = command(stage, resumed.parent, STRATEGY[stage], "--resume=true")
    statuses, said = torchrun(tmp_path / "second", again)
    assert statuses == [0, 0], said
    got, want = losses(resumed.parent), losses(run)
    assert got == {key: value for key, value in want.items() if key[0] >= 2} != {}, "bit for bit"


@long
def test_without_run_dir_ranks_agree_on_one(alone, tmp_path):
    statuses, said = torchrun(tmp_path, command("sft", None, STRATEGY["sft"]))
    assert statuses == [0, 0], said
    (run,) = [path for path in (tmp_path / "runs" / "sft").iterdir() if not path.is_symlink()]
    close(run, alone("sft"))
    assert files(run) == files(alone("sft"))


# -- hosts that share no disk: the same relative path in two working directories


@pytest.fixture
def apart(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    return folders


@long
def test_shards_are_not_lost_on_hosts_without_a_shared_disk(apart, tmp_path):
    statuses, said = torchrun(tmp_path, command("dpo", "run", SHARDED), cwds=apart)
    assert 0 not in statuses
    assert "run_dir: run (of rank 0) is not there for rank 1 on" in said and "that all hosts share" in said
    assert not list(tmp_path.rglob("*.ckpt"))


@long
def test_whole_copies_train_without_a_shared_disk_and_resume_only_with_the_checkpoint(apart, alone, tmp_path):
    arguments = command("sft", "run", STRATEGY["sft"], "--resume=true")
    statuses, said = torchrun(tmp_path, arguments, cwds=apart)
    assert statuses == [0, 0], said
    assert "checkpoints and results lie with rank 0 alone" in said
    close(apart[0] / "run", alone("sft"))
    assert not list(apart[1].rglob("*.ckpt"))
    for folder in apart:  # as if killed after step 2
        for path in [*(folder / "run").glob("*.json"), *folder.rglob("step000004.ckpt"), *folder.rglob("last.ckpt")]:
            path.unlink()
    statuses, said = torchrun(tmp_path, arguments, cwds=apart)
    assert 0 not in statuses
    assert "goes on from step000002.ckpt" in said and "begins; give all hosts the same run folder" in said
    shutil.copytree(apart[0] / "run" / "checkpoints", apart[1] / "run" / "checkpoints", dirs_exist_ok=True)
    statuses, said = torchrun(tmp_path, arguments, cwds=apart)
    assert statuses == [0, 0], said
    close(apart[0] / "run", alone("sft"))


@long
def test_hosts_with_other_data_do_not_train_together(apart, tmp_path):
    train = REPOSITORY / "datamodules" / "demo" / "corpus" / "sft.train.jsonl"
    lines = train.read_text().splitlines(keepends=True)
    for folder, part in zip(apart, (lines[:200], lines[1:201]), strict=True):
        (folder / "own.jsonl").write_text("".join(part))
    statuses, said = torchrun(
        tmp_path, command("sft", tmp_path / "run", STRATEGY["sft"], "--data.train=own.jsonl"), cwds=apart
    )
    assert 0 not in statuses and "differ in data.train; all hosts have to read the same files" in said


# -- two network namespaces, joined by a pair of virtual cards


@pytest.fixture
def namespaces():
    """Two hosts with an address each; skipped where the system does not allow it."""
    names = [f"align{os.getpid()}{side}" for side in "ab"]
    cards = [f"al{os.getpid() % 100000}{side}" for side in "ab"]
    setup = [f"ip netns add {name}" for name in names]
    setup += [f"ip link add {cards[0]} type veth peer name {cards[1]}"]
    for n, (name, card) in enumerate(zip(names, cards, strict=True)):
        inside = f"ip netns exec {name} ip"
        setup += [f"ip link set {card} netns {name}", f"{inside} addr add 10.77.0.{n + 1}/24 dev {card}"]
        setup += [f"{inside} link set {card} up", f"{inside} link set lo up"]
    try:
        for line in setup:
            done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"network namespaces: not permitted here ({line}: {done.stderr.strip()})")
        yield [
            ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={c}")
            for name, c in zip(names, cards, strict=True)
        ]
    except FileNotFoundError:
        pytest.skip("network namespaces: there is no command ip")
    finally:
        for name in names:
            with_it = ["ip", "netns", "del", name]
            if shutil.which("ip"):
                subprocess.run(with_it, capture_output=True, check=False)


@long
def test_two_network_namespaces_are_one_run(namespaces, alone, tmp_path):
    run = tmp_path / "run"
    statuses, said = torchrun(tmp_path, command("dpo", run, SHARDED), inside=namespaces, **{"master-addr": "10.77.0.1"})
    assert statuses == [0, 0], said
    close(run, alone("dpo"))


# -- hosts that tell their processes NODE_RANK alone, as Lightning Studio's machines do


@long
def test_hosts_with_a_rank_each_are_one_run(alone, tmp_path):
    port = str(free_port())
    with Processes(tmp_path) as processes:
        for rank in range(2):
            arguments = command("sft", None, STRATEGY["sft"], "--trainer.num_nodes=2", "--trainer.devices=1")
            told = {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            processes.start(arguments, told)
        assert processes.statuses() == [0, 0], processes.said()
    (run,) = [path for path in (tmp_path / "runs" / "sft").iterdir() if not path.is_symlink()]
    close(run, alone("sft"))
    assert files(run) == files(alone("sft"))


# -- SLURM


def tasks(processes, arguments, environment=None):
    """Starts two tasks as srun does, on two nodes."""
    port = free_port()
    for rank in range(2):
        processes.start(
            [*arguments, "--trainer.num_nodes=2", "--trainer.devices=1"], slurm(rank, port) | dict(environment or {})
        )


@long
def test_tasks_of_slurm_are_one_run(alone, tmp_path):
    with Processes(tmp_path) as processes:
        tasks(processes, command("sft", None, STRATEGY["sft"]))
        assert processes.statuses() == [0, 0], processes.said()
    run = tmp_path / "runs" / "sft" / "4711.0"
    close(run, alone("sft"))
    assert files(run) == files(alone("sft"))
    assert os.readlink(run.parent / runs.LATEST) == run.name


@long
@pytest.mark.parametrize("stage, sent", [("sft", signal.SIGUSR1), ("dpo", signal.SIGUSR1), ("sft", signal.SIGTERM)])
def test_a_signal_of_slurm_stops_all_tasks_after_a_step_and_the_same_command_goes_on(stage, sent, alone, tmp_path):
    """`--signal=USR1@120` and preemption reach one task or all; here it is the one that does not write checkpoints."""
    called = tmp_path / "bin" / "scontrol"
    called.parent.mkdir()
    called.write_text(f"#!/bin/sh\ntouch {tmp_path}/requeued\n")
    called.chmod(0o755)
    path = {"PATH": f"{called.parent}:{os.environ['PATH']}"}
    steps = 400
    goes_on = (STRATEGY[stage], "--resume=true", "--data.num_workers=1")
    arguments = command(stage, None, *goes_on, f"--trainer.max_steps={steps}")
    with Processes(tmp_path) as processes:
        tasks(processes, arguments, path)
        run = tmp_path / "runs" / stage / "4711.0"
        until = time.monotonic() + hosts.SECONDS
        while not list(run.glob("checkpoints/step*.ckpt")):
            assert time.monotonic() < until and None in {p.poll() for p in processes.started}, processes.said()
            time.sleep(0.05)
        os.killpg(processes.started[1].pid, sent)  # to the loader's workers too, as SLURM does
        assert processes.statuses() == [143, 143], processes.said()
        assert f"{sent.name}: the run stops after step" in processes.said() or sent == signal.SIGUSR1
    (stopped,) = run.glob("checkpoints/preempted-step*.ckpt")
    assert runs.is_whole(stopped) and not (run / "results.json").exists() and not list(run.glob("hpc_ckpt*"))
    assert not (tmp_path / "requeued").exists(), "the job's script does that"
    step = int(stopped.stem[-6:])
    assert 0 < step < steps
    with Processes(tmp_path) as processes:  # the queue starts the same script again, under the same job id
        tasks(processes, command(stage, None, *goes_on, f"--trainer.max_steps={step + 2}"), path)
        assert processes.statuses() == [0, 0], processes.said()
    assert (run / "results.json").is_file() and max(key[0] for key in losses(run)) == step + 1
