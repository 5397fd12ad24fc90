"""``fastdiff train``: the process that is trained, by a preset and by flags."""

import json

import pytest

from fastdiff import cli
from fastdiff.commands.train_process import build_process
from fastdiff.errors import InputError
from fastdiff.process.edm import EDM
from fastdiff.process.variance_exploding import VarianceExploding, geometric_sigmas
from train_command import QUICK, last_config, refused, train

# Other processes than a preset's


EDM_FLAGS = "--process edm --sigma-data 0.7 --P-mean -0.4 --P-std 1 --sigma-min 0.01 --rho 5"
VE_FLAGS = "--process variance-exploding --sigma-max 20 --predict v --min-snr 3"


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("flags", "process", "changes"),
    [
        (
            EDM_FLAGS,
            EDM(8, sigma_data=0.7, P_mean=-0.4, P_std=1.0, sigma_min=0.01, rho=5.0),
            {"--process gaussian": "--process is 'gaussian', but", "--rho 7": "--rho is 7.0, but"},
        ),
        (
            VE_FLAGS,
            VarianceExploding(
                geometric_sigmas(8, sigma_max=20.0),
                mean_type="v",
                loss_weighting="min_snr",
                min_snr_gamma=3,
            ),
            {"--sigma-min 0.1": "schedule is not", "--diffusion-steps 9": "--diffusion-steps is 9"},
        ),
    ],
    ids=["edm", "variance-exploding"],
)
def test_another_process_is_trained_resumed_and_sampled(
    tmp_path, images, capsys, flags, process, changes
):
    run, again = tmp_path / "run", tmp_path / "again"
    assert train(QUICK, flags, "--steps 1 --device cpu --data", images, "--out", run) == 0
    assert last_config(run)["diffusion"] == json.loads(json.dumps(process.to_config()))
    assert last_config(run)["model"]["out_channels"] == 3  # no variance is learned
    for changed, words in changes.items():
        assert words in refused(capsys, "--resume --device cpu --out", run, changed)
    assert train(flags, "--resume --steps 2 --device cpu --quiet --out", run) == 0
    assert train("--device cpu --quiet --config", run / "run.toml", "--out", again) == 0
    assert (run / "run.toml").read_text() == (again / "run.toml").read_text()
    assert last_config(again)["diffusion"] == last_config(run)["diffusion"]
    drawn = f"sample --checkpoint {run} --device cpu --num 2 --steps 3 --out {tmp_path / 'drawn'}"
    assert cli.main(drawn.split()) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sigma-data 0.7", "--sigma-data is of the process edm, and this one is gaussian: leave"),
        ("--sigma-min 0.1", "--sigma-min is of the process edm or variance-exploding, and this"),
        ("--process edm --loss mse", "--loss is of the process gaussian, and this one is edm"),
        ("--process edm --noise-schedule cosine", "--noise-schedule is of the process gaussian"),
        ("--process edm --learn-sigma", "--learn-sigma is of the process gaussian"),
        ("--process edm --predict v", "--predict is of the process gaussian or variance-exploding"),
        ("--process edm --variance learned", "var_type must be one of fixed_small, fixed_large"),
        ("--process edm --sigma-data 0", "sigma_data must be"),
        ("--process edm --sigma-min 90", "sigma_min is 90.0 and sigma_max 80.0"),
        ("--process edm --timestep-sampler loss-second-moment", "use 'uniform'"),
        ("--process edm --nll-every 1", "nll_every is 1, and bits/dim are those of a Gaussian"),
        ("--process variance-exploding --P-mean 0", "--P-mean is of the process edm"),
        ("--process variance-exploding --predict previous_x", "mean_type must be one of epsilon"),
        ("--process variance-exploding --diffusion-steps 1", "number of steps is 1"),
    ],
)
def test_flags_of_another_process_are_refused(tmp_path, images, capsys, flags, words):
    run = tmp_path / "run"
    message = refused(capsys, f"--steps 1 --device cpu --data {images} --out {run} {flags}")
    assert words in message
    assert not run.exists()


# Flags into create_diffusion


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ({}, {}, ("epsilon", "fixed_large", "mse")),
        ({}, {"learn_sigma": True}, ("epsilon", "learned_range", "rescaled_mse")),
        ({"sigma_small": True}, {"variance": "learned"}, ("epsilon", "learned", "mse")),
        ({"learn_sigma": True, "use_kl": True}, {}, ("epsilon", "learned_range", "rescaled_kl")),
        ({"use_kl": True}, {"learn_sigma": True}, ("epsilon", "learned_range", "rescaled_kl")),
        ({"use_kl": True}, {"loss": "mse"}, ("epsilon", "fixed_large", "mse")),
        ({"loss_type": "kl"}, {"learn_sigma": True}, ("epsilon", "learned_range", "kl")),
        ({"learn_sigma": True}, {"learn_sigma": False}, ("epsilon", "fixed_large", "mse")),
        ({"learn_sigma": True}, {"variance": "fixed_small"}, ("epsilon", "fixed_small", "mse")),
        ({"predict_xstart": True}, {"predict": "v"}, ("v", "fixed_large", "mse")),
        ({}, {"learn_sigma": True, "loss": "kl"}, ("epsilon", "learned_range", "kl")),
    ],
)  # fmt: skip
def test_a_flag_replaces_what_else_decides_its_matter(recipe, flags, expected):
    diffusion = build_process({"noise_schedule": "cosine", "steps": 10, **recipe}, flags, "it")
    assert (diffusion.mean_type, diffusion.var_type, diffusion.loss_type) == expected


def test_min_snr_can_be_taken_back():
    weighted = {"noise_schedule": "cosine", "loss_weighting": "min_snr", "min_snr_gamma": 3.0}
    assert build_process(weighted, {}, "it").loss_weighting == "min_snr"
    assert build_process(weighted, {"min_snr": 0.0}, "it").loss_weighting is None
    with pytest.raises(InputError):
        build_process({}, {"min_snr": -1.0}, "it")
