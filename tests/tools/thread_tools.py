"""Calls in threads of their own."""

import threading
from concurrent.futures import ThreadPoolExecutor


def at_once(*calls):
    """The results of calls that run in threads of their own, which begin together."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait(30)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [result.result(60) for result in [pool.submit(run, call) for call in calls]]
