"""Two ranks that were told different things: refused at the start, with the field's name, and no rank waits."""

import socket

from tests.faults.server import Request
from tests.faults.world import SHORT, copy, said

PAIRS = {  # the field that differs, and what each rank is told
    None: ("train.lr=1e-3", "train.lr=1e-3"),
    "lr": ("train.lr=1e-3", "train.lr=2e-3"),
    "max_steps": ("train.max_steps=2", "train.max_steps=3"),
    "seed": ("run.seed=1", "run.seed=2"),
    "seq_len": ("data.seq_len=64", "data.seq_len=32"),
    "max_grad_norm": ("train.max_grad_norm=1.0", "train.max_grad_norm=0.5"),
}


def test_ranks_that_disagree(forks, template, tmp_path):
    """All pairs at once, each started as torchrun would; the pair that agrees trains."""
    copy(template, tmp_path / "w", ["x_pre.yaml"])
    requests = []
    for pair, told in enumerate(PAIRS.values()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        for rank, one in enumerate(told):
            line = f"pretrain x_pre.yaml run.dir=out{pair} {SHORT} train.micro_batch_size=1 {one}"
            environment = {**there, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            requests.append(Request([line.split()], str(tmp_path / "w"), environment=environment))
    ends = dict(forks.run(requests, at_once=len(requests)))
    for pair, field in enumerate(PAIRS):
        first, second = ends[2 * pair], ends[2 * pair + 1]
        if field is None:
            assert (first.status, second.status) == (0, 0), (said(first), said(second))
            continue
        assert first.is_sentence, f"{field}: {said(first)}"
        assert field in first.last
        assert second.status == 2, f"{field}: {said(second)}"
        assert not list((tmp_path / "w").glob(f"out{pair}/checkpoints/step*")), "they trained"
