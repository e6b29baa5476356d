"""Two nodes: configs/slurm_two_nodes.sh with stand-ins for Slurm's programs, each node an agent on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import chain

import pytest

from tests.conftest import ROOT
from tests.distributed.test_kills import RESTARTS, _children, command, finish, rows, start

SCRIPT = ROOT / "configs" / "slurm_two_nodes.sh"
# As srun, it gives each node the same command; nothing here ends a node because the other did.
SRUN = 'shift 2\n"$@" &\none=$!\n"$@" &\ntwo=$!\necho $one $two > "$NODES"\nwait $one\na=$?\nwait $two\nexit $((a|$?))'
PROGRAMS = {
    "scontrol": '[ "$*" = "show hostnames node[1-2]" ] && printf "localhost\\nother\\n"',
    "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
}


@pytest.fixture
def job(tmp_path):
    """Starts a job, as sbatch does."""

    def call(*arguments, srun=SRUN):
        for name, text in {**PROGRAMS, "srun": srun}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        slurm = {"NNODES": 2, "GPUS_ON_NODE": 1, "JOB_ID": 7, "JOB_NODELIST": "node[1-2]"}
        environment = {**os.environ, **{f"SLURM_{name}": str(value) for name, value in slurm.items()}}
        environment |= {"NODES": str(tmp_path / "nodes"), "K2MINI_PORT": str(port), "OMP_NUM_THREADS": "1", **RESTARTS}
        environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
        (tmp_path / "nodes").unlink(missing_ok=True)
        pipe = subprocess.PIPE
        return subprocess.Popen(["bash", SCRIPT, *map(str, arguments)], env=environment, stdout=pipe, stderr=pipe,
                                text=True)  # fmt: skip

    return call


def test_each_node_gets_a_rank_a_gpu_and_the_first_ones_port(job):
    out, err = job("pretrain", "a file.yaml", "run.dir=x", srun='printf "%s\\n" "$@"').communicate(timeout=60)
    assert err == ""
    start, port, *rest = out.split("localhost:")[0].split(), out.split("localhost:")[1].split()[0], out.split("-m\n")[1]
    given = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "7", "--rdzv-backend", "c10d", "--rdzv-endpoint"]
    assert start == ["--kill-on-bad-exit=1", "--cpus-per-task=1", "torchrun", *given]
    assert port.isdigit()
    assert rest == ["k2mini\npretrain\na file.yaml\nrun.dir=x\n"]


def when_training(process, nodes, out):
    """The processes of each node, once there is a step."""
    metrics = out / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    while not (metrics.exists() and metrics.stat().st_size > before):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    agents = [int(pid) for pid in nodes.read_text().split()]
    return [[agent, *map(int, _children(agent))] for agent in agents]


@pytest.mark.slow
def test_two_agents_are_one_and_go_on_after_signals_and_kills(job, tmp_path):
    """The losses are those of two ranks of one agent, also where all processes get SIGTERM, or a node is gone.

    Those are the losses of one process over the same two sources.
    """
    texts = [f"The hardness of {name} is {n}. " * 9 for n, name in enumerate(["quartz", "talc", "topaz", "gypsum"] * 3)]
    for name, part in (("few", texts[:8]), ("fewer", texts[8:])):
        lines = [json.dumps({"text": text + str(number)}) for number, text in enumerate(part)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = f"[{{path: {tmp_path}/few.jsonl, weight: 0.5}}, {{path: {tmp_path}/fewer.jsonl, weight: 1.5}}]"
    data = (f"data.sources={sources}", "data.path=null", f"data.val_path={tmp_path}/few.jsonl", "data.seq_len=32")
    finish(start(tmp_path / "alone", *data))
    finish(start(tmp_path / "one", *data, ranks=2))
    for ours, alone in zip(rows(tmp_path / "one"), rows(tmp_path / "alone"), strict=True):
        assert ours == pytest.approx(alone, rel=1e-3)

    def nodes(name):
        return job(*command(tmp_path / name, *data)[3:])

    finish(nodes("two"))
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    process = nodes("ended")
    for pid in chain(*when_training(process, tmp_path / "nodes", tmp_path / "ended")):
        os.kill(pid, signal.SIGTERM)  # Slurm's goes to all processes, and torchrun passes its own on
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped by SIGTERM; saved" in err
    for gone in (0, 1):
        process = nodes("ended")
        for pid in when_training(process, tmp_path / "nodes", tmp_path / "ended")[gone]:
            os.kill(pid, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0
    finish(nodes("ended"))
    assert rows(tmp_path / "ended") == rows(tmp_path / "one")
