"""Classes by name: data sets against networks, samples against data sets, --classes in words."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.checkpoints.checkpoint import save
from fastdiff.cli import main
from fastdiff.commands import evaluate
from fastdiff.commands.class_options import choose_classes, class_names
from fastdiff.data import ArrayDataset, load_dataset, match_classes
from fastdiff.errors import InputError
from fastdiff.images import load_samples_npz, read_samples, save_samples_npz
from fastdiff.models.unet import UNet
from fastdiff.process.gaussian import create_diffusion
from fastdiff.training import Trainer
from network_tools import SmallDiT
from training_tools import make_dataset, make_trainer

ANIMALS = ["ant", "bee", "cow"]


def images_of(*names, numbered=False):
    """A set with one image of each class, in this order; classes numbered by their names' order."""
    classes = sorted(set(names))
    labels = np.array([classes.index(name) for name in names])
    pixels = np.zeros((len(names), 8, 8, 1), np.uint8)
    return ArrayDataset(pixels, labels=labels, class_names=classes, numbered=numbered)


def folder_of(root, *files):
    for i, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(path)
    return root


# --- match_classes ---------------------------------------------------------------------------


def test_labels_take_the_networks_numbers():
    data = images_of("cow", "bee", "cow")
    matched = match_classes(data, ANIMALS, 3)
    assert matched.labels.tolist() == [2, 1, 2]
    assert matched.class_names == ANIMALS and matched.num_classes == 3
    assert matched.images is data.images and data.labels.tolist() == [1, 0, 1]
    assert match_classes(images_of("bee"), ["cow", "bee", "ant"], 3).labels.tolist() == [1]
    assert match_classes(images_of("cafe\u0301"), ["tea", "caf\u00e9"], 2).labels.tolist() == [1]


def test_names_the_network_does_not_have():
    with pytest.raises(InputError, match=r"it has classes .*: zebra; the network has 3 .*ant, bee"):
        match_classes(images_of("bee", "cow", "zebra"), ANIMALS, 3, "it")
    with pytest.raises(InputError, match="Bee"):
        match_classes(images_of("Bee"), ANIMALS, 3)
    with pytest.raises(InputError, match="does not know: ant"):
        match_classes(images_of("ant", "bee", "cow"), ["0", "1", "2"], 3)


def test_numbers_stand_for_themselves_where_the_counts_fit():
    named, numbered = images_of("x", "y"), images_of("0", "1", numbered=True)
    for data, names in ((named, None), (numbered, None), (numbered, ["ant", "bee"])):
        assert match_classes(data, names, 2).labels.tolist() == [0, 1]
    for data, names in ((named, None), (numbered, None), (numbered, ANIMALS)):
        with pytest.raises(InputError, match="has 2 classes; the network was trained with 3"):
            match_classes(data, names, 3)
    # A network whose names are the numbers knows which are missing.
    assert match_classes(numbered, ["0", "1", "2"], 3).labels.tolist() == [0, 1]
    with pytest.raises(InputError, match="does not know: 1"):
        match_classes(numbered, ["0"], 1)
    sorted_names = sorted(str(i) for i in range(12))  # 0, 1, 10, 11, 2, ...
    many = ArrayDataset(
        np.zeros((12, 8, 8, 1), np.uint8),
        labels=np.arange(12),
        class_names=[str(i) for i in range(12)],
        numbered=True,
    )
    with pytest.raises(InputError, match="class '10' is number 2, so 10 could mean either"):
        match_classes(many, sorted_names, 12)


def test_without_classes_there_is_nothing_to_match():
    data = images_of("ant")
    assert match_classes(data, None, None) is data
    plain = ArrayDataset(np.zeros((1, 8, 8, 1), np.uint8))
    assert match_classes(plain, ANIMALS, 3) is plain
    with pytest.raises(InputError, match="3 classes and names for 2"):
        match_classes(data, ["ant", "bee"], 3)


# --- samples ------------------------------------------------------------------------------------


def test_samples_record_their_classes_beside_the_published_arrays(tmp_path):
    pixels = np.zeros((2, 8, 8, 1), np.uint8)
    path = save_samples_npz(tmp_path / "a.npz", pixels, np.array([2, 0]), ANIMALS)
    with np.load(path) as archive:
        assert sorted(archive) == ["arr_0", "arr_1", "class_names"]
    assert (
        load_samples_npz(path)[1].tolist() == [2, 0] and read_samples(path).class_names == ANIMALS
    )
    data = load_dataset(path, class_cond=True)
    assert data.class_names == ANIMALS and not data.numbered
    assert match_classes(data, ["cow", "bee", "ant"], 3).labels.tolist() == [0, 2]
    np.savez(tmp_path / "b.npz", pixels, np.array([2, 0]), class_names=np.array(["ant"]))
    with pytest.raises(InputError, match=r"class_names: <U3 \(1,\), expected a string for every"):
        load_dataset(tmp_path / "b.npz")


def test_a_name_stands_for_one_class(tmp_path):
    pixels, labels = np.zeros((2, 8, 8, 1), np.uint8), np.array([2, 0])
    for names in (["cow", "bee", "bee"], ["caf\u00e9", "tea", "cafe\u0301"]):
        np.savez(tmp_path / "a.npz", pixels, labels, class_names=np.array(names))
        for read in (read_samples, load_dataset):
            with pytest.raises(InputError, match=r"class_names holds '(bee|cafe.)' twice"):
                read(tmp_path / "a.npz")
        with pytest.raises(InputError, match=r"class_names holds .* twice"):
            save_samples_npz(tmp_path / "b.npz", pixels, labels, names)
        checkpoint = argparse.Namespace(
            path="it", info={"class_names": names}, model=SmallDiT(num_classes=3), diffusion=None
        )
        with pytest.raises(InputError, match=r"it: info.class_names holds .* twice"):
            class_names(checkpoint)
    assert not (tmp_path / "b.npz").exists()


def evaluated_labels(samples, data, monkeypatch, *options):
    """The labels that ``fastdiff evaluate`` hands on, or the error it raises."""
    seen = {}

    def spy(images, dataset, *, labels, **rest):
        seen["labels"] = labels.tolist()
        raise InputError("seen")

    monkeypatch.setattr(evaluate, "evaluate", spy)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    words = ["--samples", str(samples), "--data", str(data), *options]
    with pytest.raises(InputError) as caught:
        evaluate.run(parser.parse_args(words))
    return seen.get("labels", str(caught.value))


def test_evaluate_says_where_it_matches_by_number(tmp_path, monkeypatch, capsys):
    pixels = np.zeros((2, 8, 8, 1), np.uint8)
    real = folder_of(tmp_path / "real", "ant/0.png", "bee/1.png", "cow/2.png")
    counted = folder_of(tmp_path / "counted", "0/0.png", "1/1.png", "2/2.png")
    sorted_names = folder_of(tmp_path / "sorted", *(f"{i}/{i}.png" for i in range(11)))

    def outcome(data, *labels, names=None):
        file = save_samples_npz(tmp_path / "s.npz", pixels, np.array(labels), names)
        capsys.readouterr()
        found = evaluated_labels(file, data, monkeypatch)
        return found, "no names: matched by number" in capsys.readouterr().out

    assert outcome(real, 0, 2) == ([0, 2], True)
    assert outcome(real, 0, 2, names=ANIMALS) == ([0, 2], False)
    assert outcome(counted, 0, 2) == ([0, 2], False)
    same = save_samples_npz(tmp_path / "same.npz", pixels, np.array([0, 1]))
    assert outcome(same, 1, 0) == ([1, 0], False)
    error, _ = outcome(real, 0, 3)
    assert error == "--samples has the label 3; --data has 3 classes, 0 to 2"
    assert "has the label 2" in outcome(same, 0, 2)[0]
    assert "has the label -1" in outcome(real, 0, -1, names=ANIMALS)[0]
    assert "10 could mean either" in outcome(sorted_names, 0, 2)[0]


def test_evaluate_matches_samples_to_real_images_by_name(tmp_path, monkeypatch):
    pixels = np.zeros((3, 8, 8, 1), np.uint8)
    named = save_samples_npz(tmp_path / "named.npz", pixels, np.array([1, 2, 1]), ANIMALS)
    real = folder_of(tmp_path / "real", "bee/0.png", "cow/1.png", "zebra/2.png")
    assert evaluated_labels(named, real, monkeypatch) == [0, 1, 0]
    numbers = save_samples_npz(tmp_path / "numbers.npz", pixels, np.array([1, 2, 1]))
    assert evaluated_labels(numbers, real, monkeypatch) == [1, 2, 1]
    ants = save_samples_npz(tmp_path / "ants.npz", pixels, np.array([0, 2, 1]), ANIMALS)
    error = evaluated_labels(ants, real, monkeypatch)
    assert error.startswith("--samples has classes that --data does not know: ant; ")
    # The samples' names choose between two readings of the real images.
    shards = folder_of(tmp_path / "shards", "part0/cow_0.png", "part1/bee_1.png")
    assert evaluated_labels(named, shards, monkeypatch) == [0, 1, 0]


# --- --classes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "names", "expected"),
    [
        (None, ANIMALS, [0, 1, 2]),
        (["all"], ANIMALS, [0, 1, 2]),
        (["bee, 0,cow"], ANIMALS, [1, 0, 2]),
        (["bee", "0,2"], ANIMALS, [1, 0, 2]),
        (["2"], None, [2]),
        (['"salt, pepper",tea'], ["salt, pepper", "tea", "x"], [0, 1]),
        (["salt, pepper", "tea"], ["salt, pepper", "tea", "x"], [0, 1]),
        (['"a,b"', "a,b,a"][:1], ["a", "b", "a,b"], [2]),
        (["a", "b"], ["a", "b", "a,b"], [0, 1]),
        (["name:all"], ["all", "b", "c"], [0]),
        (["name:10,number:1"], ["0", "1", "10"], [2, 1]),
        (["10"], ["0", "1", "10"], [2]),
        (["name:2,number:2"], ["0", "2", "1"], [1, 2]),
        (["name:b"], ["a", "name:b", "c"], [1]),
        (["cafe\u0301,name:the\u0301"], ["caf\u00e9", "th\u00e9", "x"], [0, 1]),
        (["caf\u00e9"], ["tea", "cafe\u0301", "x"], [1]),
        (['" spaced",b"'], [" spaced", 'b"', "c"], [0, 1]),
    ],
)
def test_classes_in_words(texts, names, expected):
    assert choose_classes(texts, 3, names) == expected


@pytest.mark.parametrize(
    ("texts", "names", "words"),
    [
        (
            ["2"],
            ["0", "2", "1"],
            "class number 2, or the class '2', which is number 1.*number:2 or",
        ),
        (["all"], ["all", "b", "c"], "write name:all"),
        (["all,b"], ANIMALS, "'all' is no class"),
        (["a,b"], ["a", "b", "a,b"], "is one class' name, and 2 classes"),
        (["dog"], ANIMALS, r"'dog' is no class; there are 0 … 2 \(ant, bee, cow\)"),
        (["3"], ANIMALS, "'3' is no class"),
        (["9" * 5000], ANIMALS, "is no class"),
        (["²"], ANIMALS, "is no class"),
        (["number:bee"], ANIMALS, "'number:bee' is no class"),
        ([""], ANIMALS, "'' is no class"),
        (["0,,1"], ANIMALS, "'' is no class"),
        (['"ant'], ANIMALS, "double|quotes|stand in"),
    ],
)
def test_words_that_are_no_class_or_two(texts, names, words):
    with pytest.raises(InputError, match=words):
        choose_classes(texts, 3, names)


def test_classes_of_a_network_without():
    assert choose_classes(None, None, None) == []
    with pytest.raises(InputError, match="--classes 1 for a network without classes"):
        choose_classes(["1"], None, None)


# --- the commands -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """An untrained network of three animals."""
    torch.manual_seed(0)
    model = UNet(1, 32, 1, 1, (), channel_mult=(1,), num_classes=3, image_size=8)
    info = {"image_size": [8, 8], "channels": 1, "class_names": ANIMALS}
    folder = tmp_path_factory.mktemp("animals") / "ckpt"
    return save(
        folder, model, diffusion=create_diffusion(steps=2, noise_schedule="cosine"), info=info
    )


def scored_labels(checkpoint, data, monkeypatch, *options):
    seen = []
    forward = UNet.forward

    def spy(self, x, timesteps, y=None, low_res=None):
        seen.append(y.tolist())
        return forward(self, x, timesteps, y, low_res)

    monkeypatch.setattr(UNet, "forward", spy)
    code = main(["nll", "--checkpoint", str(checkpoint), "--data", str(data), *options])
    return code, seen[:1]


def test_nll_scores_a_bee_as_a_bee(animals, tmp_path, monkeypatch, capsys):
    data = folder_of(tmp_path / "two", "bee/0.png", "cow/1.png")
    assert scored_labels(animals, data, monkeypatch) == (0, [[1, 2]])
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0] == f"{data}: 2 images" and lines[3] == "  classes  2, from folders: bee 1, cow 1"
    )
    folder_of(data, "zebra/2.png")
    assert scored_labels(animals, data, monkeypatch) == (2, [])
    error = capsys.readouterr().err
    assert "has classes that the network does not know: zebra" in error and error.count("\n") == 1


def test_nll_reads_what_the_network_knows(animals, tmp_path, monkeypatch, capsys):
    shards = folder_of(tmp_path / "shards", "part0/cow_0.png", "part1/bee_1.png")
    assert scored_labels(animals, shards, monkeypatch) == (0, [[2, 1]])
    one = folder_of(tmp_path / "one", "bee/a_0.png", "bee/b_1.png")
    assert scored_labels(animals, one, monkeypatch) == (0, [[1, 1]])
    unknown = folder_of(tmp_path / "unknown", "part0/x_0.png", "part1/y_1.png")
    assert scored_labels(animals, unknown, monkeypatch)[0] == 2
    assert "--labels folders or --labels prefixes" in capsys.readouterr().err
    assert scored_labels(animals, unknown, monkeypatch, "--labels", "prefixes")[0] == 2
    assert "does not know: x, y" in capsys.readouterr().err


def test_sample_takes_names_and_records_them(animals, tmp_path, capsys):
    words = ["sample", "--checkpoint", str(animals), "--out", str(tmp_path), "--num", "4"]
    words += ["--no-pngs", "--steps", "1", "--classes", "cow", "--classes", "0"]
    assert main(words) == 0
    samples = read_samples(tmp_path / "samples_4x8x8x1.npz")
    assert samples.labels.tolist() == [2, 0, 2, 0] and samples.class_names == ANIMALS


SMALL = "--model-channels 32 --channel-mult 1 --attention-resolutions none --batch-size 2 --quiet"
SMALL += " --diffusion-steps 4 --no-tensorboard --device cpu --no-use-scale-shift-norm"


def train(run, *words):
    return main(["train", "--out", str(run), *SMALL.split(), *map(str, words)])


def info(run):
    return json.loads((run / "config.json").read_text())["info"]


@pytest.mark.seconds
def test_a_run_says_what_it_found_and_remembers_how_it_read(tmp_path, capsys):
    run = tmp_path / "run"
    data = folder_of(tmp_path / "data", "part0/cat_0.png", "part1/dog_1.png", "part1/cat_2.png")
    start = ("--data", data, "--class-cond", "--steps", 1)
    assert train(run, *start) == 2
    assert "--labels folders or --labels prefixes" in capsys.readouterr().err
    (data / "cut.png").write_text("")
    assert train(run, *start, "--labels", "prefixes") == 2
    assert "cut.png' is not a readable image" in capsys.readouterr().err
    assert train(run, *start, "--labels", "prefixes", "--skip-broken") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [f"{data}: 3 images", "  sizes    8x8 3"]
    assert out[3] == "  classes  2, from prefixes: cat 2, dog 1"
    assert out[4].startswith("  broken   1, left out: 'cut.png' is not a readable image")
    source = info(run)["data"]
    assert (source["labels"], source["skip_broken"]) == ("prefixes", True)

    assert train(run, "--resume", "--steps", 2) == 0
    assert info(run)["class_names"] == ["cat", "dog"]
    assert "from prefixes" in capsys.readouterr().out
    assert train(run, "--resume", "--steps", 3, "--labels", "folders") == 2
    assert "--labels is 'folders', but" in capsys.readouterr().err


@pytest.mark.seconds
def test_a_run_resumes_on_the_names_it_knows(tmp_path, capsys):
    run = tmp_path / "run"
    data = folder_of(tmp_path / "data", "ant/x_0.png", "bee/y_1.png")
    assert train(run, "--data", data, "--class-cond", "--steps", 1, "--labels", "folders") == 0
    # As from before the reading was recorded: the names say which it was.
    for path in (run / "checkpoints").glob("*/config.json"):
        config = json.loads(path.read_text())
        del config["info"]["data"]["labels"]
        path.write_text(json.dumps(config))
    assert train(run, "--resume", "--steps", 2) == 0
    assert info(run)["data"]["labels"] == "folders"
    (data / "bee").rename(data / "wasp")
    capsys.readouterr()
    assert train(run, "--resume", "--steps", 3) == 2
    assert "does not know: wasp" in capsys.readouterr().err


@pytest.mark.seconds
def test_images_for_evaluation_are_matched(tmp_path, monkeypatch, capsys):
    data = folder_of(tmp_path / "data", "ant/0.png", "bee/1.png", "cow/2.png")
    some = folder_of(tmp_path / "some", "bee_0.png", "cow_1.png")
    seen = []
    monkeypatch.setattr(
        "fastdiff.training.preview.measure_nll",
        lambda trainer: seen.append(trainer.eval_dataset.labels.tolist()) or {},
    )
    words = ("--data", data, "--class-cond", "--steps", 1, "--nll-every", 1)
    assert train(tmp_path / "run", *words, "--eval-data", some) == 0
    assert seen == [[1, 2]]
    assert f"{some}: 2 images" in capsys.readouterr().out
    folder_of(some, "eel_2.png")
    assert train(tmp_path / "other", *words, "--eval-data", some) == 2
    assert "does not know: eel" in capsys.readouterr().err


def test_a_trainer_matches_what_it_is_given(tmp_path):
    make_trainer(tmp_path, steps=1).fit()
    same = make_dataset()
    turned = make_dataset()
    turned.labels, turned.class_names = 2 - same.labels, ["c2", "c1", "c0"]
    few = ArrayDataset(
        same.images[:1].permute(0, 2, 3, 1).numpy(), labels=np.array([0]), class_names=["c2"]
    )
    trainer = Trainer.resume(tmp_path, turned, eval_dataset=few, device="cpu", progress=False)
    assert trainer.data.labels.tolist() == same.labels.tolist()
    assert trainer.data.class_names == ["c0", "c1", "c2"]
    assert trainer.eval_dataset.labels.tolist() == [2]
    turned.class_names = ["c3", "c1", "c0"]
    with pytest.raises(InputError, match="does not know: c3"):
        Trainer.resume(tmp_path, turned, device="cpu", progress=False)


def test_a_summary_of_arrays():
    lines = load_dataset("digits", class_cond=True).describe().splitlines()
    assert lines[0] == "digits: 1,797 images"
    assert lines[3].startswith("  classes  10 (174 to 183 images each): 0 178, 1 182, ")
    assert lines[3].endswith(" and 2 more")
    assert "none taken: not asked for" in load_dataset("digits").describe()
