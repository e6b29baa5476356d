"""Two ranks that were told different things: refused at the start, with the field's name, and no rank waits."""

import socket

import pytest

from tests.faults.server import Request
from tests.faults.world import SHORT, copy, said

FIELDS = {
    "lr": ("train.lr=1e-3", "train.lr=2e-3"),
    "max_steps": ("train.max_steps=2", "train.max_steps=3"),
    "seed": ("run.seed=1", "run.seed=2"),
    "seq_len": ("data.seq_len=64", "data.seq_len=32"),
    "max_grad_norm": ("train.max_grad_norm=1.0", "train.max_grad_norm=0.5"),
}


def launch(forks, folder, *overrides):
    """One process a list of overrides, as torchrun would start it. Returns how rank 0, 1, … ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(len(overrides)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    requests = [
        Request(
            [f"pretrain x_pre.yaml run.dir=out {SHORT} train.micro_batch_size=1 {one}".split()],
            str(folder),
            environment={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, one in enumerate(overrides)
    ]
    return [end for _, end in sorted(forks.run(requests, at_once=len(requests)), key=lambda found: found[0])]


def test_ranks_that_agree(forks, template, tmp_path):
    copy(template, tmp_path / "w", ["x_pre.yaml"])
    ends = launch(forks, tmp_path / "w", "train.lr=1e-3", "train.lr=1e-3")
    assert [end.status for end in ends] == [0, 0], [*map(said, ends)]


@pytest.mark.parametrize("field", FIELDS)
def test_ranks_that_disagree(forks, template, tmp_path, field):
    copy(template, tmp_path / "w", ["x_pre.yaml"])
    first, second = launch(forks, tmp_path / "w", *FIELDS[field])
    assert first.is_sentence, said(first)
    assert field in first.last
    assert second.status == 2, said(second)
