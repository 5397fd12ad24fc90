"""``fastdiff train`` on small images, called as by the command line."""

import json
from pathlib import Path

from fastdiff import cli
from fastdiff.checkpoints.run_directory import list_checkpoints

SMALL = "--model-channels 32 --channel-mult 1 --attention-resolutions none --batch-size 8"
QUICK = f"{SMALL} --diffusion-steps 8 --log-every 2 --warmup 0 --quiet --no-tensorboard"


def train(*arguments: object) -> int:
    words = [word for argument in arguments for word in str(argument).split()]
    return cli.main(["train", *words])


def last_config(run: Path) -> dict:
    return json.loads((list_checkpoints(run)[-1] / "config.json").read_text())


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert train(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastdiff train: error: ") and message.count("\n") == 1
    return message
