"""What a machine has and how workers share it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tfdp.system import machine
from tfdp.system.exits import ConfigError


def test_with_fewer_cores_than_workers_nobody_is_pinned() -> None:
    shares = machine.share_machine(len(os.sched_getaffinity(0)) + 1)
    assert {(len(share.cores), share.environment["OMP_NUM_THREADS"]) for share in shares} == {(0, "1")}


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert [share.environment["OMP_NUM_THREADS"] for share in machine.share_machine(2)] == ["7", "7"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc has it")
def test_memory_that_was_freed_is_kept_for_the_next_block() -> None:
    program = """
import os, numpy as np
from tfdp.system.machine import keep_freed_memory
def resident(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
if {keeps}: keep_freed_memory()
before = resident()
np.ones(100 << 20, np.uint8)
print(resident() - before)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    kept = {
        keeps: int(subprocess.check_output([sys.executable, "-c", program.format(keeps=keeps)], env=environment))
        for keeps in (False, True)
    }
    assert kept[False] < 20 << 20
    assert kept[True] > 90 << 20


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=r"num_workers \(3\) must be at most the number of GPUs: try 2, or"):
        machine.share_machine(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES" not in machine.share_machine(3)[0].environment


def test_gpus_are_counted_from_what_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.available_gpus() == ["0", "1"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    assert machine.available_gpus() == []


def test_ports_differ_and_avoid_those_of_before() -> None:
    first = machine.free_ports(50)
    second = machine.free_ports(50, first)
    assert len({*first, *second}) == 100
