"""The two errors fastdiff raises on purpose. The command line prints them as one line and exits with 2."""


class InputError(ValueError):
    """Bad input: the message says in one line what came, what was expected and what to do."""


class TrainingError(RuntimeError):
    """A training run that cannot go on (a loss that is not finite, for one); earlier checkpoints are kept."""
