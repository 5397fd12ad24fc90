"""Nodes of a job on this machine: each a torchrun agent with an address of its own, its processes
and its log, which can be lost as a machine is."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from parts_tools import children
from paths import ROOT
from patience import WAIT

# Seconds until torchrun believes that a node is gone, and for which it waits for more of them.
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2,read_timeout=10"


class Node:
    """``torchrun … fastdiff ARGV`` as the machine with number ``number`` has it: 127.0.0.number.

    torchrun numbers the nodes in the order of their addresses, so it is also the place among them.
    """

    def __init__(
        self,
        folder,
        number,
        argv,
        *,
        nodes,
        port,
        hosts=False,
        restarts=0,
        each=1,
        later=False,
    ):
        """
        Args:
            nodes: how many meet: "2", or "1:2" for one or two.
            port: of the store at which they do. ``hosts``: it is this node's, and lost with it.
            restarts: how often torchrun starts lost processes again.
            each: processes of a node.
            later: nodes may come later, as docs/training.md says.
        """
        self.log = Path(folder) / f"node{number}.log"
        place = f"127.0.0.{number}"
        options = {
            "nnodes": nodes,
            "nproc-per-node": each,
            "max-restarts": restarts,
            "rdzv-backend": "c10d",
            "rdzv-id": "job",
            "rdzv-endpoint": f"127.0.0.1:{port}",
            "rdzv-conf": f"{QUICK},is_host={int(hosts)}",
            "local-addr": place,
            "monitor-interval": 0.1,
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        launcher = [sys.executable, "-m", "torch.distributed.run", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOGLEVEL": "INFO"}
        if later:
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with self.log.open("a") as out:
            self.agent = subprocess.Popen(
                [*launcher, "-m", "--", "fastdiff", *argv],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                env=environment,
            )

    def lose(self):
        """All that runs there ends at once, and can say nothing any more."""
        workers = children(self.agent.pid)
        self.agent.send_signal(signal.SIGSTOP)  # it would report them
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        self.agent.kill()
        self.agent.wait()

    def freeze(self):
        """Nothing runs there any more, and no connection is closed: the machine stands still, or
        its network is cut."""
        for pid in (self.agent.pid, *children(self.agent.pid)):
            os.kill(pid, signal.SIGSTOP)

    def running(self):
        """Its processes that have not ended; the agent may be in no state to notice that."""
        states = (Path(f"/proc/{pid}/stat").read_text() for pid in children(self.agent.pid))
        return [state for state in states if state.rpartition(") ")[2][0] != "Z"]

    def finish(self):
        """(exit code, what all of the node printed)"""
        return self.agent.wait(WAIT), self.said()

    def said(self):
        return self.log.read_text()

    def worlds(self):
        """Of how many nodes each attempt was, as torchrun logs it."""
        return [int(size) for size in re.findall(r"group_world_size=(\d+)", self.said())]
