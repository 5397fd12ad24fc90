"""The two errors fastdiff raises on purpose; the command line prints one line and exits with 2."""


class InputError(ValueError):
    """Bad input: the message says in one line what came, what was expected and what to do."""


class TrainingError(RuntimeError):
    """A run that cannot go on (a loss that is not finite, for one); older checkpoints are kept."""
