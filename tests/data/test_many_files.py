"""What a folder of very many files costs: memory for each, in bytes."""

import tracemalloc
import zipfile

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.data import load_dataset
from fastdiff.data.labels import WAYS, Reading, read_labels
from fastdiff.data.listing import list_folder
from fastdiff.data.paths import Chosen, PathTable
from picture_tools import encoded

NAMES = st.text("ab_.", min_size=1, max_size=5)
PATHS = st.lists(
    st.tuples(st.sampled_from(["", "cat", "cat/deep", "dog"]), NAMES), min_size=1, max_size=20
)


def test_a_listing_holds_little_more_than_the_names(tmp_path):
    for folder in ("cat", "dog"):
        (tmp_path / folder).mkdir()
        for number in range(1500):
            (tmp_path / folder / f"{folder}_{number:08d}.png").touch()
    list_folder(tmp_path)  # what is allocated once
    tracemalloc.start()
    files = list_folder(tmp_path).files
    groups = files.groups(np.arange(3000))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / 3000 < 50 and peak / 3000 < 150  # a Path with its string: 250
    reading = read_labels(groups.examples, counts=groups.counts)
    assert str(reading) == "folders (cat 1,500, dog 1,500)"


@settings(max_examples=100)
@given(PATHS, st.randoms(use_true_random=False))
def test_classes_of_groups_are_those_of_their_paths(paths, random):
    table = PathTable()
    for folder, name in paths:
        table.add(folder, [name])
    whole = [f"{folder}/{name}" if folder else name for folder, name in paths]
    assert list(table) == table[:] == whole
    rows = np.array(sorted(random.sample(range(len(paths)), (len(paths) + 1) // 2)), np.int64)
    chosen = [tuple(path.split("/")) for path in Chosen(table, rows)]
    groups = table.groups(rows)
    for way in (*WAYS, None):
        one_by_one = read_labels(chosen, way)
        grouped = read_labels(groups.examples, way, counts=groups.counts)
        assert str(grouped) == str(one_by_one)
        if isinstance(one_by_one, Reading):
            assert [grouped.names[group] for group in groups.of] == one_by_one.names


def test_names_that_are_no_text_come_back():
    table = PathTable()
    table.add("caf\udce9", ["\udcff.png"])
    assert list(table) == ["caf\udce9/\udcff.png"]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "a-b", "a.b", "A", "b", ".h", "@eaDir"]), max_size=2),
        min_size=1,
        max_size=8,
    )
)
def test_an_archive_is_listed_as_its_folder_would_be(tmp_path_factory, folders):
    root = tmp_path_factory.mktemp("tree")
    paths = {"/".join([*folder, f"{i % 3}.png"]) for i, folder in enumerate(folders)}
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
        with zipfile.ZipFile(root / "all.zip", "a") as archive:
            archive.writestr(path, encoded(0))
    found = list_folder(root)
    if len(found.files):
        listed = load_dataset(root / "all.zip").files
        assert [str(file).removeprefix(f"{root}/all.zip/") for file in listed] == list(found.files)
