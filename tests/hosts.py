"""Hosts made of network namespaces on this machine: links of a chosen rate, that can be cut.

    with Hosts(2, mbit_per_s=200) as hosts:
        done = hosts.torchrun([script, "--flag"], ranks_per_host=2)

Needs root and iproute2 (`apt-get install iproute2`); `refusal()` says why where it cannot be.
A switch is a namespace with a bridge; every host hangs on it by a veth pair, whose two ends send at
the chosen rate (`tc ... tbf`). Nothing outside the namespaces is touched, and all go with the last.

As a program it runs torchrun on them:

    python tests/hosts.py --hosts 2 --ranks-per-host 1 --mbit 200 -- SCRIPT ARGUMENTS
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_NETWORK = "10.77.0"
_PORT = 29571
_CARD = "eth0"
#: What tbf may send at once and hold back: enough for 1 Gbit/s at the kernel's timer.
_BURST_BYTES, _LATENCY_MS = 128 << 10, 50


def refusal() -> str:
    """Why no hosts can be made here; empty: they can."""
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"{program} is missing: apt-get install iproute2"
    probe = f"sl{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return ""


@dataclass
class Hosts:
    """A switch and hosts around it; a context manager.

    Attributes:
        count: hosts.
        mbit_per_s: rate of every host's link, each way; None: as fast as memory.
    """

    count: int
    mbit_per_s: float | None = None
    _started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __enter__(self) -> Hosts:
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    @staticmethod
    def address(host: int) -> str:
        """IP address of a host."""
        return f"{_NETWORK}.{host + 1}"

    def start(self, host: int, command: Sequence[str],
              environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Starts a program on a host; stdout and stderr come together, as text."""
        variables = {**os.environ, "GLOO_SOCKET_IFNAME": _CARD, "TP_SOCKET_IFNAME": _CARD,
                     "OMP_NUM_THREADS": "1", **(environ or {})}
        process = subprocess.Popen(["ip", "netns", "exec", self._name(host), *command],
                                   env=variables, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, start_new_session=True)
        self._started.append(process)
        return process

    def start_torchrun(self, arguments: Sequence[str], ranks_per_host: int = 1,
                       environ: Mapping[str, str] | None = None) -> list[subprocess.Popen[str]]:
        """Starts torchrun on every host, with the hosts' ranks as one job."""
        return [self.start(host, [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", str(self.count),
            "--nproc-per-node", str(ranks_per_host), "--node-rank", str(host), "--master-addr",
            self.address(0), "--master-port", str(_PORT), *arguments], environ)
            for host in range(self.count)]

    def torchrun(self, arguments: Sequence[str], ranks_per_host: int = 1,
                 timeout_s: float = 300.0) -> list[tuple[int, str]]:
        """Runs torchrun on every host to its end: (exit code, output) by host."""
        processes = self.start_torchrun(arguments, ranks_per_host)
        deadline = time.monotonic() + timeout_s
        outputs = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0]
                   for process in processes]
        return [(process.returncode, output)
                for process, output in zip(processes, outputs, strict=True)]

    def set_rate(self, mbit_per_s: float) -> None:
        """Changes the rate of all links, both ways."""
        self.mbit_per_s = mbit_per_s
        shape = ["root", "tbf", "rate", f"{mbit_per_s}mbit", "burst", str(_BURST_BYTES), "latency",
                 f"{_LATENCY_MS}ms"]
        for host in range(self.count):
            _run("tc", "-n", self._name(host), "qdisc", "replace", "dev", _CARD, *shape)
            _run("tc", "-n", self._switch, "qdisc", "replace", "dev", f"port{host}", *shape)

    def cut(self, host: int) -> None:
        """Unplugs a host: what it sends and gets is lost from now on."""
        _run("ip", "-n", self._switch, "link", "set", f"port{host}", "down")

    def sent_packets(self, host: int) -> int:
        """Packets that the switch has sent to a host."""
        counter = f"/sys/class/net/port{host}/statistics/tx_packets"
        done = subprocess.run(["ip", "netns", "exec", self._switch, "cat", counter],
                              capture_output=True, text=True)
        return int(done.stdout)

    @property
    def _switch(self) -> str:
        return f"sl{os.getpid()}s"

    def _name(self, host: int) -> str:
        return f"sl{os.getpid()}h{host}"

    def _build(self) -> None:
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "bridge0", "up")
        for host in range(self.count):
            name, port = self._name(host), f"port{host}"
            _run("ip", "netns", "add", name)
            _run("ip", "-n", self._switch, "link", "add", port, "type", "veth", "peer", "name",
                 _CARD, "netns", name)
            _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge0", "up")
            _run("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", _CARD)
            for card in ("lo", _CARD):
                _run("ip", "-n", name, "link", "set", card, "up")
        if self.mbit_per_s is not None:
            self.set_rate(self.mbit_per_s)

    def _remove(self) -> None:
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, 9)
            process.communicate()
        for name in (*(self._name(host) for host in range(self.count)), self._switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--mbit", type=float, default=None)
    parser.add_argument("command", nargs="+", help="script and its arguments, for torchrun")
    options = parser.parse_args()
    reason = refusal()
    if reason:
        print(f"no hosts: {reason}", file=sys.stderr)
        return 1
    with Hosts(options.hosts, options.mbit) as hosts:
        ends = hosts.torchrun(options.command, options.ranks_per_host, timeout_s=3600)
    for host, (_, output) in enumerate(ends):
        print("\n".join(f"host {host}: {line}" for line in output.splitlines()))
    return max(code for code, _ in ends)


if __name__ == "__main__":
    sys.exit(main())
