"""The two errors fastdiff raises on purpose; the command line prints one line and exits with 2."""


class InputError(ValueError):
    """Bad input: the message says in one line what came, what was expected and what to do."""


class TrainingError(RuntimeError):
    """A run that cannot go on (a loss that is not finite, for one); older checkpoints are kept."""


class LostRank(TrainingError):
    """Another process of the run is gone, or hangs."""


def first_line(error: BaseException) -> str:
    """What to quote of another library's error inside one of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
