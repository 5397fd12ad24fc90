"""race: fastdiff and its peers, turn by turn in one run, so that all meet the same machine.

pytest-benchmark times fastdiff; the peers run between its rounds. Their medians and the ratios go
to ``extra_info`` (kept by --benchmark-json) and into the table after the run.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

RACES = pytest.StashKey[list[str]]()


@pytest.fixture
def race(benchmark, request):
    """race(ours, {"peer": step, ...}, rounds) -> {"peer": how many times faster ours is}."""

    def run(
        ours: Callable[[], object], peers: dict[str, Callable[[], object]], rounds: int
    ) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in peers}

        def peers_turn() -> None:
            for name, step in peers.items():
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)

        benchmark.pedantic(ours, setup=peers_turn, rounds=rounds, warmup_rounds=2)
        own = benchmark.stats.stats.data
        # The warm-up rounds called peers_turn too. Each pair of neighbours gives one ratio.
        times = {name: values[-rounds:] for name, values in times.items()}
        ratios = {
            name: statistics.median(p / o for p, o in zip(values, own, strict=True))
            for name, values in times.items()
        }
        benchmark.extra_info |= {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "peer_median_s": {name: statistics.median(values) for name, values in times.items()},
            "times_faster": ratios,
        }
        lines = request.config.stash.setdefault(RACES, [])
        for name, ratio in ratios.items():
            lines.append(
                f"{request.node.name:58} {statistics.median(own) * 1e3:9.1f} ms "
                f"{statistics.median(times[name]) * 1e3:9.1f} ms  {name:12} {ratio:5.2f}x"
            )
        return ratios

    return run


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(RACES, [])
    if lines:
        terminalreporter.section("fastdiff, peer, times faster (median of neighbouring pairs)")
        terminalreporter.write_line("\n".join(lines))
