"""Two hosts, each a network namespace, under torchrun, and the loss of one of them."""

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

from refbn_d2.engine.launcher import TIMEOUT, start
from refbn_d2.errors import UserError

# Names of this process's own, so that two runs of the tests do not meet.
HOSTS = {f"refbn{os.getpid()}-{n}": f"10.77.0.{n}" for n in (1, 2)}
WAIT = 20  # seconds that a process waits for another


def _ip(*arguments: str) -> str:
    """What is wrong with an ``ip`` command, "" if nothing is."""
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    except FileNotFoundError as e:
        return str(e)
    return done.stderr.strip() or "it failed" if done.returncode else ""


@pytest.fixture
def hosts():
    try:
        for name in HOSTS:
            if reason := _ip("netns", "add", name):
                pytest.skip(f"ip netns add: {reason}")
        first, second = HOSTS
        assert not _ip(
            *f"link add link0 netns {first} type veth peer name link0 netns {second}".split()
        )
        for name, address in HOSTS.items():
            assert not _ip("-n", name, "addr", "add", f"{address}/24", "dev", "link0")
            assert not any(_ip("-n", name, "link", "set", x, "up") for x in ("link0", "lo"))
        yield list(HOSTS)
    finally:
        for name in HOSTS:
            _ip("netns", "del", name)


def _begin(host, log, arguments, data):
    """Starts torchrun as on a machine of a cluster, where names need not be spelled out."""
    first = next(iter(HOSTS.values()))
    torchrun = f"""
        ip netns exec {host} PYTHON -m torch.distributed.run --nnodes 2 --nproc_per_node 1
        --rdzv_backend c10d --rdzv_endpoint {first}:29500 --rdzv-conf is_host={HOSTS[host] == first}
        --local-addr {HOSTS[host]} -m refbn_d2 train --resume""".split()
    torchrun[torchrun.index("PYTHON")] = sys.executable  # whose path may have spaces
    env = {"GLOO_SOCKET_IFNAME": "link0", "DETECTRON2_DATASETS": str(data), TIMEOUT: str(WAIT)}
    with open(log, "w") as f:
        return subprocess.Popen(
            [*torchrun, *arguments], env=tiny.environment(**env), stdout=f, stderr=subprocess.STDOUT
        )


@pytest.mark.slow
def test_a_host_goes_away_and_the_other_goes_on_alone(hosts, tmp_path, tiny_data, train_net):
    changes = {"DATASETS__TRAIN": "('coco_2017_train',)", "DATASETS__TEST": "()"}
    changes.update({"SOLVER__CHECKPOINT_PERIOD": 10, "OUTPUT_DIR": tmp_path / "out"})
    arguments = ["--config-file", tiny.CONFIG, *tiny.opts(**changes, SOLVER__MAX_ITER=100_000)]
    logs = {host: tmp_path / f"{host}.txt" for host in hosts}
    runs = [_begin(host, log, arguments, tiny_data) for host, log in logs.items()]
    try:
        while not (tmp_path / "out/last_checkpoint").exists():
            assert all(run.poll() is None for run in runs), logs[hosts[0]].read_text()[-3000:]
            time.sleep(0.1)
        assert not _ip("-n", hosts[1], "link", "set", "link0", "down")
        begin = time.monotonic()
        assert runs[0].wait(timeout=WAIT + 60) != 0
        print(f"noticed after {time.monotonic() - begin:.1f} s")
    finally:
        for host in hosts:  # torchrun itself waits minutes for the other's
            for process in subprocess.check_output(["ip", "netns", "pids", host]).split():
                os.kill(int(process), signal.SIGKILL)
        for run in runs:
            run.wait()
    log = logs[hosts[0]].read_text()
    assert "Rank of current process: 0. World size: 2" in log
    assert "error: the connection to another process of the run is lost" in log
    reached = int((tmp_path / "out/last_checkpoint").read_text()[len("model_") : -len(".pth")])
    changes["DATASETS__TRAIN"] = "('tiny_train',)"  # the same files, by their name here
    arguments = tiny.opts(**changes, SOLVER__MAX_ITER=reached + 3)
    alone = train_net("--resume", "--config-file", tiny.CONFIG, *arguments)
    assert alone.status == 0, alone.err
    assert f"Starting training from iteration {reached + 1}" in alone.out + alone.err


@pytest.mark.parametrize("value", ["0", "-1", "a", "1.5"])
def test_a_time_to_wait_that_is_none(monkeypatch, value):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv(TIMEOUT, value)
    args = type("Args", (), {"num_gpus": 1, "num_machines": 1})
    with pytest.raises(UserError, match=f"{TIMEOUT} is '{value}'"):
        start(os.getpid, args, "cpu", ())
