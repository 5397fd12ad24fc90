"""Which classes the paths of a folder say: one reading, or a refusal that names the others."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdiff.data.labels import WAYS, Reading, Refusal, read_labels


def read(*paths, way=None, known=()):
    return read_labels([tuple(path.split("/")) for path in paths], way, known)


@pytest.mark.parametrize(
    ("paths", "way", "names"),
    [
        ("cat/0.png dog/1.png", "folders", "cat dog"),
        ("cat/0.png cat/deep/1.png dog/2_a.png", "folders", "cat cat dog"),
        ("cat_0.png dog_1.png dog_x_2.png", "prefixes", "cat dog dog"),
        # A camera's prefix, a common second level, splits within the classes: no rival.
        ("cat/IMG_0.png dog/IMG_1.png", "folders", "cat dog"),
        ("cat/images/0.png dog/images/1.png", "folders", "cat dog"),
        ("cat/train/0.png cat/val/1.png dog/train/2.png", "folders", "cat cat dog"),
        ("cat/train_0.png dog/val_1.png", "folders", "cat dog"),
        # Two readings that say the same are one.
        ("cat/cat_0.png dog/dog_1.png", "folders", "cat dog"),
        ("n01/images/n01_0.JPEG n02/images/n02_0.JPEG", "folders", "n01 n02"),
        # A single folder called like a split holds the data; any other is a class.
        ("train/cat/0.png train/dog/1.png", "subfolders", "cat dog"),
        ("train/cat_0.png train/dog_1.png", "prefixes", "cat dog"),
        ("bee/0.png bee/1.png", "folders", "bee bee"),
        ("bee/IMG_0.png bee/IMG_1.png", "folders", "bee bee"),
        ("train/images/cat/0.png train/images/dog/1.png", "parents", "cat dog"),
        ("cat/images/0.png dog/1.png", "folders", "cat dog"),
        ("cat/train/0.png cat/val/1.png dog/2.png", "folders", "cat cat dog"),
        ("a/x/images/0.png b/x/images/1.png", "folders", "a b"),
        # Numbers are names, and one folder like a part stands beside classes.
        (" ".join(f"{i}/x{i}.png" for i in range(10)), "folders", "0 1 2 3 4 5 6 7 8 9"),
        ("bullet_train/0.png car/1.png", "folders", "bullet_train car"),
        ("part1/0.png cat/1.png", "folders", "part1 cat"),
        ("IMG_0.png IMG_1.png", "prefixes", "IMG IMG"),
        # A train is a thing, too, where no validation set stands beside it.
        ("train/0.png car/1.png", "folders", "train car"),
        # The top may hold images where the folders say what the prefixes say.
        ("cat_0.png dog_1.png cat/cat_2.png", "prefixes", "cat dog cat"),
    ],
)
def test_one_reading(paths, way, names):
    assert read(*paths.split()) == Reading(way, names.split())


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ("a/x_0.png b/y_1.png", ["folders (a 1, b 1)", "prefixes (x 1, y 1)", "--labels prefixes"]),
        ("part0/cat_0.png part0/dog_1.png part1/cat_2.png", ["part0 2", "cat 2", "--labels"]),
        ("part0/cat/0.png part1/cat/1.png part1/dog/2.png", ["part0 1", "--labels subfolders"]),
        ("pets/cat/0.png pets/dog/1.png", ["folders (pets 2)", "subfolders (cat 1, dog 1)"]),
        ("bee/a_0.png bee/b_1.png", ["folders (bee 2)", "prefixes (a 1, b 1)"]),
        ("train/0.png val/1.png", ["train, val", "like the parts of a data set", "'train'"]),
        ("Train/cat/0.png Test/cat/1.png", ["Test, Train", "--labels folders"]),
        ("train/cat/0.png val/dog/1.png", ["--labels folders or --labels subfolders"]),
        ("train/cat_0.png validation/dog_1.png", ["prefixes (cat 1, dog 1)"]),
        ("train/0.png val/1.png extra/2.png", ["train, val"]),
        ("train2017/0.png val2017/1.png", ["train2017, val2017"]),
        ("trainA/0.png testB/1.png", ["testB, trainA"]),
        ("imagenet-train/0.png imagenet-val/1.png", ["imagenet-train, imagenet-val", "folders"]),
        ("x_train/0.png x_test/1.png", ["x_test, x_train", "parts", "--labels folders"]),
        ("x_train/cat/0.png x_test/dog/1.png", ["--labels folders or --labels subfolders"]),
        ("part1/0.png part2/1.png", ["part1, part2", "parts", "--labels folders"]),
        ("part1/images/0.png part2/images/1.png", ["part1, part2", "--labels folders"]),
        ("shard-00/0.png shard-01/1.png", ["shard-00, shard-01", "--labels folders"]),
        ("fold0/0.png fold1/1.png", ["fold0, fold1", "--labels folders"]),
        ("data_batch_1/0.png data_batch_2/1.png", ["data_batch_1", "--labels folders"]),
        ("Chunk3/0.png test/1.png", ["Chunk3, test", "--labels folders"]),
        ("fold0_a.png fold1_b.png", ["fold0, fold1", "--labels prefixes"]),
        # Some images deeper than others.
        (
            "part0/cat/0.png part0/dog/0.png cat/0.png dog/0.png",
            [
                "different depths",
                "part0 2",
                "parents (cat 2, dog 2)",
                "folders or --labels parents",
            ],
        ),
        ("train/cat/0.png train/dog/1.png extra/0.png", ["extra 1, train 2", "--labels parents"]),
        ("a/cat/0.png a/dog/1.png b/0.png b/1.png", ["(a 2, b 2)", "parents (b 2, cat 1, dog 1)"]),
        ("train/0.png train/cat/1.png train/dog/2.png", ["(train 3)", "cat 1, dog 1, train 1"]),
        # Classes below a level that says nothing.
        (
            "batch_0/images/cat/0.png batch_0/images/dog/1.png batch_1/images/cat/2.png",
            [
                "(batch_0 2, batch_1 1)",
                "parents (cat 2, dog 1)",
                "--labels folders or --labels parents",
            ],
        ),
        (
            "x/images/cat/0.png y/images/dog/1.png",
            ["folders (x 1, y 1)", "parents (cat 1, dog 1)", "--labels parents"],
        ),
        ("ant/2019/x.png ant/2020/y.png bee/2019/z.png", ["--labels folders or --labels subf"]),
        ("train_0.png val_1.png", ["like the parts", "--labels prefixes"]),
        ("cat/x_0.png dog/y_1.png stray_2.png", ["'cat/x_0.png'", "--labels prefixes"]),
        ("cat_0.png more/dog_1.png", ["'more/dog_1.png'", "some do not"]),
        ("cat/0.png 1.png", ["no labels for '1.png'"]),
        ("0.png 1.png", ["no labels for '0.png'", "one sub-folder per class"]),
        ("_0.png a_1.png", ["no labels for '_0.png'"]),
        ("Cat/0.png cat/1.png", ["'Cat' and 'cat' differ in case alone", "--labels folders"]),
    ],
)
def test_a_refusal_shows_the_readings_and_the_flag(paths, words):
    refusal = read(*paths.split())
    assert isinstance(refusal, Refusal)
    for word in words:
        assert word in refusal.reason
    assert "\n" not in refusal.reason


def test_what_is_asked_for_is_what_is_read():
    paths = "part0/a/cat_0.png", "part1/b/dog_1.png"
    assert read(*paths, way="folders").names == ["part0", "part1"]
    assert read(*paths, way="subfolders").names == ["a", "b"]
    assert read(*paths, way="prefixes").names == ["cat", "dog"]
    assert read("train/0.png", "val/1.png", way="folders").names == ["train", "val"]
    assert read("Cat/0.png", "cat/1.png", way="folders").names == ["Cat", "cat"]
    assert read("x/y/cat/0.png", "dog/1.png", way="parents").names == ["cat", "dog"]
    assert read("part1/0.png", "part2/1.png", way="folders").names == ["part1", "part2"]
    assert "in no sub-folder" in read("cat_0.png", way="parents").reason
    for way, part in [("folders", "in no sub-folder"), ("subfolders", "of a sub-folder")]:
        assert part in read("cat_0.png", way=way).reason
    assert "no name that starts with a class" in read("cat/0.png", way="prefixes").reason


def test_known_names_choose():
    paths = "part0/cat_0.png", "part1/dog_1.png"
    assert read(*paths, known=["cat", "dog", "eel"]).way == "prefixes"
    assert read(*paths, known=["part0", "part1"]).way == "folders"
    assert isinstance(read(*paths, known=["cat", "dog", "part0", "part1"]), Refusal)
    assert isinstance(read(*paths, known=["eel"]), Refusal)
    assert read("bee/a_0.png", "bee/b_1.png", known=["ant", "bee"]).names == ["bee", "bee"]


@pytest.mark.parametrize(
    "paths",
    [
        "part0/cat/0.png part0/dog/0.png cat/0.png dog/0.png",
        "a/cat/0.png a/dog/1.png b/0.png",
        "part1/0.png part2/1.png",
        "batch_0/images/cat/0.png batch_1/images/dog/0.png",
    ],
)
def test_a_network_that_read_the_folders_reads_them_again(paths):
    paths = paths.split()
    assert isinstance(read(*paths), Refusal)
    names = [path.split("/")[0] for path in paths]
    assert read(*paths, known=sorted(set(names))) == Reading("folders", names)


def test_names_are_one_in_either_form_of_unicode():
    assert set(read("caf\u00e9/0.png", "cafe\u0301/1.png", "tea/2.png").names) == {"café", "tea"}
    assert read("cafe\u0301/x_0.png", "tea/y_1.png", known=["café", "tea"]).way == "folders"


# Any tree of a few folders: names that are splits, classes, or the same as a prefix.
word = st.sampled_from(["cat", "dog", "Cat", "train", "val", "IMG", "part0", "part1"])
name = st.builds(lambda p, n: f"{p}_{n}.png" if p else f"{n}.png", st.none() | word, st.integers())
tree = st.lists(
    st.builds(lambda folders, file: (*folders, file), st.lists(word, max_size=3), name),
    min_size=1,
    max_size=6,
    unique=True,
)


PARTS = {"train", "val", "part0", "part1"}


@pytest.mark.seconds
@settings(deadline=None, max_examples=300)
@given(tree, st.randoms())
@example([("part0", "cat_0.png"), ("part1", "dog_1.png")], None)
def test_never_a_guess(paths, random):
    reading = read_labels(paths)
    asked = [read_labels(paths, way) for way in WAYS]
    complete = [other for other in asked if isinstance(other, Reading)]
    if isinstance(reading, Refusal):
        assert reading.reason and "\n" not in reading.reason
        return
    assert reading in asked and len(reading.names) == len(paths)
    # Whatever else gives every image a class gives the same, or says nothing: one class for all,
    # or parts of a data set.
    for other in complete:
        if other.names != reading.names:
            lengths = [len(path) for path in paths]
            deeper = [n > min(lengths) or other.way != "parents" for n in lengths]
            deeper = deeper if any(deeper) else [True] * len(paths)
            classes = {c.lower() for c, deep in zip(other.names, deeper, strict=True) if deep}
            alone = len(classes) == 1 and other.way != "folders"
            assert alone or classes <= {"train", "val"}
    assert len(set(reading.names)) == 1 or not set(reading.names) <= PARTS
    if reading.way == "parents":
        assert len({len(path) for path in paths}) == 1
    if reading.way == "prefixes":
        deep = [path for path in paths if len(path) > 1]
        if 0 < len(deep) < len(paths):
            assert all(path[0] == path[-1].split("_")[0] for path in deep)
    # The order of the files is no matter.
    if random is not None:
        order = list(range(len(paths)))
        random.shuffle(order)
        again = read_labels([paths[i] for i in order])
        assert again == Reading(reading.way, [reading.names[i] for i in order])
