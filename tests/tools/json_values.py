"""Anything that may stand in a JSON file, for a field that expects something else."""

from hypothesis import strategies as st


def json_values(largest: int) -> st.SearchStrategy:
    return st.recursive(
        st.none() | st.booleans() | st.integers(-5, largest) | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=5,
    )
