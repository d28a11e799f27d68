"""Several hosts on one machine: ranks find each other, and a cut link is named."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from tests.hosts import Hosts, refusal

RANKS = str(Path(__file__).with_name("host_ranks.py"))
TIMEOUT_S = 3.0


@pytest.fixture(scope="module", autouse=True)
def permitted():
    reason = refusal()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def ends(permitted) -> list[tuple[int, str]]:
    """Exit code and output, by host, of two ranks each that exchange and then train."""
    with Hosts(2, mbit_per_s=1000) as hosts:
        return hosts.torchrun([RANKS, "60", "train"], ranks_per_host=2)


def test_ranks_on_two_hosts_exchange_over_gloo(ends):
    for host, (code, output) in enumerate(ends):
        assert code == 0, output
        for rank in (2 * host, 2 * host + 1):
            assert f"rank {rank} got [0.0, 1.0, 2.0, 3.0] over gloo: ranks are on 2 hosts" in output


def test_two_stages_train_as_flat_does_and_send_less(ends):
    words = ("two stages, shared memory inside 2 hosts of 2 ranks, gloo between them; rows at most "
             "{}; fewer bytes across: True")
    for host, (code, output) in enumerate(ends):
        assert code == 0, output
        for rank in (2 * host, 2 * host + 1):
            assert re.search(f"rank {rank}: " + words.format(r"(0\.0e\+00|\d\.\de-0[6-9]) apart"),
                             output), output


def test_cut_link_ends_every_rank_and_names_the_host():
    with Hosts(3) as hosts:
        processes = [hosts.start(rank, [sys.executable, RANKS, str(TIMEOUT_S), "forever"], {
            "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": hosts.address(0), "MASTER_PORT": "29572"}) for rank in range(3)]
        _wait_for_traffic(hosts)
        hosts.cut(2)
        start = time.monotonic()
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        passed = time.monotonic() - start
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 3, output
        assert f"rows: all_to_all failed on rank {rank} of 3: no answer within 3 s" in output
    for output in outputs[:2]:
        assert "rank 2 cannot be reached (link or host down)" in output
    assert passed < TIMEOUT_S + 15


def _wait_for_traffic(hosts: Hosts) -> None:
    """Until ranks exchange: the switch forwards thousands of packets to the last host."""
    for _ in range(600):
        if hosts.sent_packets(hosts.count - 1) > 2000:
            return
        time.sleep(0.1)
    raise AssertionError("ranks did not start to exchange within 60 s")
