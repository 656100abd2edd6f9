"""The machine's floor: measured once, remembered, and without a trace in what a run draws."""

import json
import os
import time

import pytest
import torch

from lit_align import machine
from lit_align.machine import Machine, measure, this_machine

CPU = torch.device("cpu")


def test_a_floor_is_time_for_flops_and_time_for_bytes():
    assert Machine(100.0, 10.0).floor(50.0, 5.0) == 1.0
    assert Machine(100.0, 10.0).floor(50.0) == 0.5


def test_measuring_is_quick_and_draws_nothing():
    before, started = torch.get_rng_state(), time.perf_counter()
    found = measure(CPU, torch.float32)
    assert time.perf_counter() - started < 5  # idle: half a second
    assert torch.equal(torch.get_rng_state(), before)
    # No processor that torch runs on is slower, none is faster.
    assert 1e8 < found.flops_per_second < 1e15 and 1e8 < found.bytes_per_second < 1e14


@pytest.mark.parametrize("seconds", [0.5, 0.001])
def test_rates_are_operations_and_bytes_over_the_best_time(monkeypatch, seconds):
    times = iter([seconds, 2 * seconds, 3 * seconds] * 20)
    monkeypatch.setattr(machine, "_timed", lambda work: next(times))
    monkeypatch.setattr(machine, "CPU_SIZES", (4,))
    monkeypatch.setattr(machine, "CPU_COPY", 64)
    assert measure(CPU, torch.float32) == Machine(2 * 4**3 / seconds, 2 * 64 / seconds)


def test_it_is_measured_once_for_each_data_type_and_number_of_threads(monkeypatch, tmp_path):
    measured = []

    def fake(device, dtype):
        measured.append(dtype)
        return Machine(float(len(measured)), 2.0)

    monkeypatch.setattr(machine, "measure", fake)
    monkeypatch.setenv("LIT_ALIGN_CACHE", str(tmp_path / "cache"))
    assert this_machine(CPU, torch.float32) == this_machine(CPU, torch.float32) == Machine(1.0, 2.0)
    assert this_machine(CPU, torch.bfloat16) == Machine(2.0, 2.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert this_machine(CPU, torch.float32) == Machine(3.0, 2.0)
    assert len(measured) == 3
    assert len(json.loads((tmp_path / "cache" / "machine.json").read_text())) == 3


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"KEY": {"flops_per_second": 0, "bytes_per_second": 1}}', '{"KEY": 3}']
)
def test_a_spoiled_file_is_measured_anew(monkeypatch, tmp_path, content):
    monkeypatch.setattr(machine, "measure", lambda device, dtype: Machine(5.0, 6.0))
    path = tmp_path / "machine.json"
    path.write_text(content.replace("KEY", machine._key(CPU, torch.float32)))
    assert this_machine(CPU, torch.float32, tmp_path) == Machine(5.0, 6.0)
    monkeypatch.setattr(machine, "measure", None)
    assert this_machine(CPU, torch.float32, tmp_path) == Machine(5.0, 6.0)


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "measure", lambda device, dtype: Machine(5.0, 6.0))
    (tmp_path / "file").write_text("")
    assert this_machine(CPU, torch.float32, tmp_path / "file") == Machine(5.0, 6.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_with_events():
    found = measure(torch.device("cuda"), torch.bfloat16)
    assert 1e12 < found.flops_per_second < 1e16 and 1e10 < found.bytes_per_second < 1e14


@pytest.mark.parametrize(
    "own, limits, allowed",
    [
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": "5000", "memory.max": "7000"}, 5000),
        ("0::/job\n", {"job/memory.max": "max"}, None),
        ("0::/not/mounted\n", {"memory.max": "6000"}, 6000),  # a container sees its own group as the root
        ("4:cpu:/\n3:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "4000"}, 4000),
        ("3:memory:/docker/1\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        (None, {}, None),
    ],
)
def test_the_hosts_memory_is_what_a_container_or_a_job_may_take(own, limits, allowed, tmp_path):
    groups, mount = tmp_path / "cgroup", tmp_path / "sys"
    if own is not None:
        groups.write_text(own)
    for name, limit in limits.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(limit + "\n")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.usable_memory(groups, mount) == (allowed or physical)


@pytest.mark.parametrize(
    "given, threads, cores, ranks, share",
    [
        (False, 8, 16, 1, 1.0),
        (False, 8, 16, 2, 0.5),  # each rank gets its part of the threads
        (True, 1, 2, 2, 1.0),
        (True, 8, 16, 2, 1.0),
        (True, 8, 16, 4, 0.5),
    ],
)
def test_ranks_of_one_cpu_share_its_cores(given, threads, cores, ranks, share, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(machine, "_cores", lambda: cores)
    assert machine.share_of_cores(ranks) == share
