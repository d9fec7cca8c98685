"""Processes started by torchrun, srun or detectron2: they train, end and resume together."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import kills
import pytest
import tiny
import torch
from torch.multiprocessing import ProcessExitedException

from refbn_d2.engine import launcher
from refbn_d2.errors import UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
BATCH = {
    "SLURM_JOB_ID": "200505",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODELIST": "node[03-04]",
}
SRUN = {
    **BATCH,
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    "env",
    [{}, BATCH, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}],
    ids=["none", "sbatch", "srun of one task", "of the pod, not the process"],
)
def test_a_process_that_was_started_alone(env):
    assert launcher.launcher_environment(env) == {}


def test_srun_is_understood_as_torchrun():
    expected = {**TORCHRUN, "MASTER_ADDR": "node03", "MASTER_PORT": "20508"}
    assert launcher.launcher_environment(SRUN) == expected
    told = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    assert launcher.launcher_environment(told) == {
        **expected,
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1",
    }


def test_torchrun_goes_before_the_srun_that_started_it():
    assert launcher.launcher_environment({**SRUN, **TORCHRUN}) == TORCHRUN


@pytest.mark.parametrize(
    "nodes, first",
    [("n1", "n1"), ("n[1,3]", "n1"), ("gpu-a[007-009,12],b1", "gpu-a007"), ("b,a", "b")],
)
def test_first_machine_of_a_list(nodes, first):
    env = launcher.launcher_environment({**SRUN, "SLURM_STEP_NODELIST": nodes})
    assert env["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    "changes, num_gpus, device, message",
    [
        ({}, 8, "cpu", "--num-gpus 8.*leave these options out"),
        ({"WORLD_SIZE": "7"}, 1, "cpu", "7 processes, 4 on this machine"),
        ({}, 1, "cuda", "MODEL.DEVICE is cuda, for 4 processes.*0 GPUs.*MODEL.DEVICE cpu"),
    ],
)
def test_what_does_not_go_together(monkeypatch, changes, num_gpus, device, message):
    for name, value in {**TORCHRUN, **changes}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    args = Namespace(num_gpus=num_gpus, num_machines=1)
    with pytest.raises(UserError, match=message):
        launcher.start(print, args, device, ())


@pytest.mark.parametrize(
    "num_gpus, device, message",
    [
        (1, "cuda", "MODEL.DEVICE is cuda, and there is no GPU: set MODEL.DEVICE cpu"),
        (1, "vulkan", "MODEL.DEVICE is vulkan, which .* cannot use here: set MODEL.DEVICE cpu"),
        (1, "hpu", "MODEL.DEVICE is hpu, which PyTorch cannot use here: set MODEL.DEVICE cpu"),
        (2, "cpu", "--num-gpus 2 with MODEL.DEVICE cpu: start .* torchrun --nproc_per_node 2"),
        (2, "cuda", "--num-gpus 2: this machine has 1 GPUs"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, num_gpus, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launcher, "launch", None)  # nothing is started
    args = Namespace(num_gpus=num_gpus, num_machines=1, machine_rank=0, dist_url="auto")
    with pytest.raises(UserError, match=message):
        launcher.start(print, args, device, ())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MASTER_PORT": "auto"}, "MASTER_PORT is 'auto' .* whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000: use a port from 0 to 65535"),
        ({"RANK": ""}, "RANK is '' in the environment"),
        ({"LOCAL_WORLD_SIZE": "0"}, "^LOCAL_WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "0"}, "^WORLD_SIZE is 0 in the environment: use a number from 1"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is '' in the environment"),
    ],
)
def test_an_environment_that_is_no_number(changes, message):
    with pytest.raises(UserError, match=message):
        launcher.launcher_environment({**TORCHRUN, **changes})
    if "MASTER_PORT" in changes:
        with pytest.raises(UserError, match=message):
            launcher.launcher_environment({**SRUN, **changes})


@pytest.mark.parametrize(
    "name, value",
    [
        *(("STEP_NUM_TASKS", value) for value in ("x", "", "-2")),
        *(("STEP_TASKS_PER_NODE", value) for value in ("x", "", None)),
        *((name, None) for name in ("STEP_NODELIST", "PROCID", "LOCALID", "JOB_ID", "STEP_ID")),
    ],
)
def test_an_environment_that_srun_does_not_make(name, value):
    env = {**SRUN, f"SLURM_{name}": value}
    env = {k: v for k, v in env.items() if v is not None}
    with pytest.raises(UserError, match=f"^SLURM_{name} is {value or ''!r} .*start with srun"):
        launcher.launcher_environment(env)


@pytest.fixture
def used_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_in_use_is_named(monkeypatch, used_port):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(used_port)}
    for name, value in {**alone, **where}.items():
        monkeypatch.setenv(name, value)
    args = Namespace(num_gpus=1, num_machines=1)
    with pytest.raises(UserError, match=f"127.0.0.1:{used_port} .*the port is in use"):
        launcher.start(print, args, "cpu", ())


def _meet(rank, port):
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=1)


def test_a_port_in_use_of_the_processes_that_detectron2_starts(monkeypatch, used_port):
    """The error as it comes out of a process that torch has started."""

    def launch(*_, **__):
        torch.multiprocessing.spawn(_meet, (used_port,), nprocs=1)

    monkeypatch.setattr(launcher, "launch", launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    url = f"tcp://127.0.0.1:{used_port}"
    args = Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url=url)
    with pytest.raises(UserError, match=f"--dist-url {url}: the port is in use"):
        launcher.start(print, args, "cuda", ())


def _child(status):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
    time.sleep(60)


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_parent_reaches_those_it_started(monkeypatch, signum, status):
    def launch(*_, **__):
        child = multiprocessing.get_context("fork").Process(target=_child, args=(143,))
        child.start()
        time.sleep(0.2)
        os.kill(os.getpid(), signum)
        child.join()
        raise ProcessExitedException("", 0, child.pid, exit_code=child.exitcode)

    monkeypatch.setattr(launcher, "launch", launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    args = Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")
    with pytest.raises(SystemExit) as e:
        launcher.start(print, args, "cuda", ())
    assert e.value.code == status
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_process_that_was_killed_is_named(monkeypatch):
    def launch(*_, **__):
        raise ProcessExitedException("process 1 terminated with signal SIGKILL", 1, 9, exit_code=-9)

    monkeypatch.setattr(launcher, "launch", launch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    args = Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")
    with pytest.raises(UserError, match="process 1 .* SIGKILL .*--resume"):
        launcher.start(print, args, "cuda", ())


def _join(processes):
    for process in processes:
        process.join()
    return [p.exitcode for p in processes]


def test_a_notice_to_one_process_stops_all_after_the_same_step(tiny_data, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "stopped"
    assert _join(kills.start_several(tiny_data, whole, 2, False)) == [0, 0]
    processes = kills.start_several(tiny_data, output, 2, False)
    kills.wait_for(output / "last_checkpoint", *processes)
    processes[1].terminate()
    assert _join(processes) == [143, 143]
    log = (output / "output.txt").read_text()
    assert "SIGTERM: stopped after iteration" in log and "Traceback" not in log
    assert _join(kills.start_several(tiny_data, output, 2, True)) == [0, 0]
    kills.assert_same(kills.load(output / "model_final.pth"), kills.load(whole / "model_final.pth"))


def test_one_is_killed_the_other_says_so_and_another_number_goes_on(tiny_data, tmp_path):
    processes = kills.start_several(tiny_data, tmp_path, 2, False)
    kills.wait_for(tmp_path / "last_checkpoint", *processes)
    begin = time.monotonic()
    processes[1].kill()
    assert _join(processes) == [1, -9] and time.monotonic() - begin < 60
    log = (tmp_path / "output.txt").read_text()
    assert "error: the connection to another process of the run is lost" in log
    assert "Traceback" not in log
    last = (tmp_path / "last_checkpoint").read_text()
    before, reference = kills.load(tmp_path / last), (tmp_path / "reference.json").read_bytes()
    kills.finish(tiny_data, tmp_path, True)
    log = (tmp_path / "output.txt").read_text()
    assert f"Starting training from iteration {before['iteration'] + 1}" in log
    after = kills.load(tmp_path / "model_final.pth")
    assert after["iteration"] == kills.RUN["SOLVER__MAX_ITER"] - 1
    for name, value in before["model"].items():
        assert torch.equal(value, after["model"][name]) == (".ref_" in name or "pixel" in name), (
            name
        )
    assert (tmp_path / "reference.json").read_bytes() == reference


def test_torchrun(tiny_data, tmp_path):
    """The real command once, on the plugin's own data names."""
    options = tiny.opts(DATASETS__TRAIN="('coco_2017_train',)", DATASETS__TEST="()")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [str(tiny.ROOT / "tools/train_net.py"), "--config-file", tiny.CONFIG, *options]
    result = subprocess.run(
        [*command, "OUTPUT_DIR", str(tmp_path)],
        env=tiny.environment(DETECTRON2_DATASETS=str(tiny_data), PYTHONWARNINGS="ignore"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "World size: 2" in result.stdout
    assert kills.load(tmp_path / "model_final.pth")["iteration"] == 1
    assert len(json.loads((tmp_path / "reference.json").read_text())["layers"]) == 53
