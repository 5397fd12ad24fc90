"""Fidelity against diversity: how far a classifier should guide a sampler.

Question: Dhariwal & Nichol 2021 (arXiv:2105.05233, section 4) move every step of an unconditional
sampler by s·∇ log p(y | x_t) of a classifier that has learned to see through the noise. What does
the scale s buy, and what does it cost? A residual MLP learns scikit-learn's 1,797 digits without
their classes (eps-prediction, cosine schedule, T = 1000), an EncoderUNet their classes at every
noise level; 898 digits, every class as often as any other, are drawn in 20 steps of DDPM (algorithm
1) and of DDIM (algorithm 2).

Judged by another classifier, which saw no noise and no sample: how often it finds the class that
was asked for; the Fréchet distance of its features to half of the real digits; and on the same
features precision (is a sample like some digit?) and recall (is a digit like some sample?).

Look at: DDIM's Fréchet distance, which falls and rises again, while precision rises and recall
falls; and at a scale of 1, at which a perfect classifier would be all that is needed.

Result at scale 0 / 1 / 2 / 4 / 8 (two halves of the real digits: Fréchet distance 7.7):
DDIM: class found .09 / .61 / .86 / .97 / .99, Fréchet 48 / 68 / 28 / 20 / 32, precision .72 / .66 /
.79 / .89 / .96, recall .77 / .81 / .77 / .66 / .49. DDPM: class found .10 / .62 / .88 / .97 / .99,
Fréchet 76 / 91 / 57 / 40 / 37, precision .69 / .63 / .69 / .78 / .82, recall .70 / .72 / .72 / .70
/ .67: a noisier sampler forgives, and has not given up diversity at 8. A scale of 1 is worse than
none in the distance, in both: many a digit stays between what it was about to be and what was asked
for, as the pictures show.
The steps begin at t = 940. From t = 999 (cosine: signal 5e-5), DDIM's first step divides the
gradient by next to nothing, and at any scale from 1 on hardly a sample is like a digit (Fréchet 553
to 689, precision .04 and less); DDPM does not mind.
"""

import tempfile

import torch
from _common import (
    COLOURS,
    FrechetJudge,
    TinyMLP,
    draw_from,
    figure,
    load_digits,
    parse_arguments,
    print_table,
    save_plot,
    show_images,
    train,
)
from torch import Tensor

from fastdiff import (
    EncoderUNet,
    NoisyClassification,
    Sampler,
    classifier_gradient,
    create_diffusion,
)
from fastdiff.data import load_dataset
from fastdiff.evaluation.neighbours import precision_recall
from fastdiff.images import to_uint8
from fastdiff.models import presets
from fastdiff.training import TrainConfig, Trainer

FIRST = 940  # the noisiest step that is taken: x_t is 0.09·x_0 + noise
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0)
METHODS = {"ddpm": "DDPM (algorithm 1)", "ddim": "DDIM (algorithm 2)"}
MEASURES = ("class found", "Fréchet", "precision", "recall")


def main() -> None:
    args = parse_arguments(__doc__, "classifier_guidance")
    steps, scales = (3, SCALES[:2]) if args.quick else (20, SCALES)
    timesteps = torch.linspace(0, FIRST, steps).round().int().tolist()
    judge = FrechetJudge(quick=args.quick)
    diffusion = create_diffusion(steps=1000, noise_schedule="cosine")
    network = train_network(diffusion, 20 if args.quick else 4000)
    classifier = train_classifier(diffusion, 3 if args.quick else 400)

    classes = torch.arange(judge.count) % 10
    samples, scores = {}, {}
    for method in METHODS:
        for scale in scales:
            guided = {}
            if scale:
                guided["cond_fn"] = classifier_gradient(classifier, scale)
            sampler = Sampler(network, diffusion, timesteps=timesteps, method=method, **guided)
            kwargs = {"cond_kwargs": {"y": classes}} if guided else {}
            samples[method, scale] = sampler.sample((judge.count, 1, 8, 8), seed=2, **kwargs)
            scores[method, scale] = judged(judge, samples[method, scale], classes)
    for method, title in METHODS.items():
        print_table(
            f"{title}: {judge.count} samples in {steps} steps (Fréchet distance of two halves of "
            f"the real digits: {judge.halves:.3g})",
            ["scale", *MEASURES],
            [[f"{scale:g}", *scores[method, scale]] for scale in scales],
        )
    plot(args.out, scales, scores, samples, judge.halves)


def judged(judge: FrechetJudge, images: Tensor, classes: Tensor) -> list[float]:
    """The measures of samples, of which each was to be of its class."""
    probabilities, features = judge.classifier(to_uint8(images))
    found = float((probabilities.argmax(1) == classes).double().mean())
    near = precision_recall(*(torch.from_numpy(f) for f in (judge.real[0], features)))
    return [found, judge(images), near["precision"], near["recall"]]


def train_network(diffusion, steps: int) -> TinyMLP:
    """The network that knows no classes."""
    images = torch.cat(load_digits())
    draw = draw_from(images)
    return train(TinyMLP((1, 8, 8), t_max=1000, width=256), diffusion, draw, steps, batch=128)


def train_classifier(diffusion, steps: int) -> EncoderUNet:
    """The classifier that guides."""
    model = EncoderUNet.from_preset("classifier-digits")
    training = presets.get("classifier-digits").train
    config = TrainConfig(**{**training, "steps": steps, "tensorboard": False})
    parts = (model, NoisyClassification(diffusion), load_dataset("digits", class_cond=True), config)
    with tempfile.TemporaryDirectory() as run_dir:
        Trainer(*parts, run_dir, device="cpu", progress=False).fit()
    return model


def plot(out, scales, scores, samples, halves: float) -> None:
    fig, [[trade_off, shares, pictures]] = figure(3, height=4.4)
    for method, colour in zip(METHODS, COLOURS, strict=False):
        found, distance, precision, recall = zip(*[scores[method, s] for s in scales], strict=True)
        trade_off.plot(found, distance, "o-", color=colour, label=METHODS[method])
        for scale, x, y in zip(scales, found, distance, strict=True):
            trade_off.annotate(f"{scale:g}", (x, y), textcoords="offset points", xytext=(4, 4))
        shares.plot(scales, precision, "o-", color=colour, label=f"{method}: precision")
        shares.plot(scales, recall, "s--", color=colour, label=f"{method}: recall")
    trade_off.axhline(halves, color="0.5", lw=1, label="two halves of the real digits")
    trade_off.set(xlabel="share whose class the judge finds", ylabel="Fréchet distance")
    trade_off.set(title="The trade-off, by the scale", yscale="log")
    shares.set(xlabel="scale", title="Fidelity and diversity", ylim=(0, 1))
    for ax in (trade_off, shares):
        ax.legend(fontsize=8)
    shown = [(f"scale {s:g}", samples["ddpm", s]) for s in (scales[0], scales[1], scales[-1])]
    show_images(pictures, shown, columns=20, lines=4)
    pictures.set_title("DDPM; a column each was to be one digit")
    save_plot(fig, out)


if __name__ == "__main__":
    main()
