"""Training by two nodes gives what one process gives, and goes on when one of them is lost or comes
later.

Two agents of torchrun on this machine, with real signals.
"""

import os
import signal

import pytest
from torch.distributed import TCPStore

from fastdiff.checkpoints.run_directory import list_checkpoints
from fastdiff.cli import main
from node_tools import Node
from parts_tools import children
from rank_runs import assert_same_run, command, only_line, step_of, wait_for
from training_tools import read_lines

STEPS = 18  # a step takes a tenth of a second: enough to lose a node between two of them


@pytest.fixture(scope="module")
def longer(cifar, tmp_path_factory):
    run = tmp_path_factory.mktemp("longer") / "run"
    assert main(command(cifar, run, "--steps", str(STEPS))) == 0
    return run


@pytest.fixture
def meeting_place():
    """The port of a store that is lost with neither node, as where a third machine holds it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


@pytest.fixture
def node(tmp_path):
    """``node(number, argv, ...)``: a ``Node`` that ends with the test."""
    nodes = []

    def start_node(*args, **options):
        nodes.append(Node(tmp_path, *args, **options))
        return nodes[-1]

    yield start_node
    for one in nodes:
        one.lose()


@pytest.mark.seconds
def test_two_nodes_give_the_curve_of_one(cifar, alone, node, meeting_place, tmp_path):
    argv = command(cifar, tmp_path / "run")
    nodes = [node(number, argv, nodes="2", port=meeting_place) for number in (1, 2)]
    logs = finished(nodes)
    assert_same_run(tmp_path / "run", alone)
    assert [log.count("6 steps done, 0 left") for log in logs] == [1, 0]  # rank 0 is the first's


def finished(nodes):
    ends = [one.finish() for one in nodes]
    logs = [log for _, log in ends]
    assert [code for code, _ in ends] == [0] * len(nodes), "".join(logs)
    return logs


@pytest.mark.long
@pytest.mark.parametrize(
    ("lost", "each", "options"), [(1, 1, []), (2, 1, []), (1, 2, ["--shard"]), (2, 2, ["--shard"])]
)
def test_a_node_is_lost_and_the_other_goes_on(
    cifar, longer, node, meeting_place, tmp_path, lost, each, options
):
    run = tmp_path / "run"
    argv = command(cifar, run, "--steps", str(STEPS), *options)
    settings = {"nodes": "1:2", "port": meeting_place, "restarts": 1, "each": each}
    nodes = {number: node(number, argv, **settings) for number in (1, 2)}
    wait_for(lambda: list_checkpoints(run))
    nodes[lost].lose()
    left = nodes[3 - lost]
    (log,) = finished([left])
    assert "lost " in only_line(log)
    assert left.worlds() == [2, 1]
    assert_same_run(run, longer)


@pytest.mark.long
@pytest.mark.parametrize(
    ("lost", "nodes"),
    [(2, "2"), (1, "2"), (1, "1:2")],  # with the first its store is lost, and no agent goes on
)
def test_a_node_is_lost_and_all_start_again(cifar, longer, node, tmp_path, lost, nodes):
    run = tmp_path / "run"
    argv = command(cifar, run, "--steps", str(STEPS))
    settings = {"nodes": nodes, "port": free_port(), "restarts": int(nodes == "1:2")}
    both = {n: node(n, argv, hosts=n == 1, **settings) for n in (1, 2)}
    wait_for(lambda: list_checkpoints(run))
    both[lost].lose()
    code, log = both[3 - lost].finish()
    assert code != 0 and "lost " in only_line(log), log
    checkpoints = list_checkpoints(run)
    assert sorted((run / "checkpoints").iterdir()) == checkpoints  # no half of one
    assert read_lines(run)[-1]["step"] - step_of(checkpoints[-1]) <= 3  # --save-every

    finished([node(n, [*argv, "--resume"], hosts=n == 1, **settings) for n in (1, 2)])
    assert_same_run(run, longer)


def free_port():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port


PATIENCE = ["--rank-minutes", "0.2"]


@pytest.mark.long
def test_a_node_vanishes_in_silence_and_the_other_goes_on(
    cifar, longer, node, meeting_place, tmp_path
):
    run = tmp_path / "run"
    argv = command(cifar, run, "--steps", str(STEPS), *PATIENCE)
    settings = {"nodes": "1:2", "port": meeting_place, "restarts": 1}
    stays, vanishes = (node(number, argv, **settings) for number in (1, 2))
    wait_for(lambda: list_checkpoints(run))
    vanishes.freeze()
    (log,) = finished([stays])
    assert "lost rank 1 of 2 without a word" in only_line(log)
    assert stays.worlds() == [2, 1]
    assert_same_run(run, longer)


@pytest.mark.long
@pytest.mark.parametrize("hosts", [False, True])  # the store at which the nodes meet
def test_the_node_of_rank_0_vanishes_in_silence_and_all_start_again(
    cifar, longer, node, meeting_place, tmp_path, hosts
):
    run = tmp_path / "run"
    argv = command(cifar, run, "--steps", str(STEPS), *PATIENCE)
    settings = {"nodes": "2", "port": free_port() if hosts else meeting_place}
    vanishes, stays = (node(n, argv, hosts=hosts and n == 1, **settings) for n in (1, 2))
    wait_for(lambda: list_checkpoints(run))
    vanishes.freeze()
    wait_for(lambda: "error: " in stays.said() and not stays.running())
    assert "lost another rank, and with it the store at 127.0.0.1" in only_line(stays.said())
    checkpoints = list_checkpoints(run)
    assert sorted((run / "checkpoints").iterdir()) == checkpoints  # no half of one
    for one in (vanishes, stays):  # torchrun may wait for its store for ever
        one.lose()
    again = {"nodes": "2", "port": free_port()}
    finished([node(n, [*argv, "--resume"], hosts=n == 1, **again) for n in (1, 2)])
    assert_same_run(run, longer)


@pytest.mark.long
@pytest.mark.parametrize("first", [1, 2])
def test_a_node_that_comes_later_takes_part(cifar, longer, node, meeting_place, tmp_path, first):
    run = tmp_path / "run"
    argv = command(cifar, run, "--steps", str(STEPS))
    settings = {"nodes": "1:2", "port": meeting_place, "later": True}
    there = node(first, argv, **settings)
    wait_for(lambda: list_checkpoints(run))
    (worker,) = children(there.agent.pid)
    os.kill(worker, signal.SIGSTOP)  # it would be done before the other comes
    comes = node(3 - first, argv, **settings)
    wait_for(lambda: "Detected 1 new nodes" in there.said())
    os.kill(worker, signal.SIGCONT)
    finished([there, comes])
    assert there.worlds() == [1, 2] and comes.worlds() == [2]
    assert_same_run(run, longer)
    assert there.said().count("stopped; continue with --resume from") == 1


@pytest.mark.long
def test_a_lost_node_is_replaced(cifar, longer, node, meeting_place, tmp_path):
    run = tmp_path / "run"
    argv = command(cifar, run, "--steps", str(STEPS))
    settings = {"nodes": "2", "port": meeting_place, "later": True, "restarts": 1}
    stays, goes = (node(number, argv, **settings) for number in (2, 3))
    wait_for(lambda: list_checkpoints(run))
    goes.lose()
    finished([stays, node(1, argv, **settings)])
    assert stays.worlds() == [2, 2]
    assert_same_run(run, longer)
