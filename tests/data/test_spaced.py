import numpy as np
import pytest
import torch

from fastdiff.data import load_dataset
from fastdiff.data.spaced import evenly_spaced
from fastdiff.errors import InputError


def test_some_images_of_a_set_with_their_classes():
    digits = load_dataset("digits", class_cond=True)
    some = evenly_spaced(digits, 5)
    places = np.array([0, 449, 898, 1347, 1796])
    assert len(some) == 5 and some.class_names == digits.class_names
    assert torch.equal(some.gather(np.arange(5)), digits.gather(places))
    assert torch.equal(some.gather_labels(np.array([1, 4])), digits.gather_labels(places[[1, 4]]))
    assert evenly_spaced(digits, None) is evenly_spaced(digits, 1797) is digits
    with pytest.raises(InputError, match="holds no images"):
        evenly_spaced(digits, 0)
