"""``--classes``: class numbers and names as one says them on a command line.

A word is a class' name or its number. Where it could be two things it is refused, and the forms
``name:WORD`` and ``number:WORD`` say which: the name "10" of class 2 against class number 10, a
class called "all" against all classes. Commas separate words, as in CSV: a name that holds one
stands in double quotes, or alone in its option.
"""

import csv
from collections.abc import Sequence

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.commands.networks import num_classes
from fastdiff.data.classes import form
from fastdiff.data.text import listed, shown
from fastdiff.errors import InputError
from fastdiff.images import repeated

ALL = "all"


def class_names(checkpoint: Checkpoint) -> list[str] | None:
    """The names of the network's classes in their order, where the checkpoint records them."""
    names, count = checkpoint.info.get("class_names"), num_classes(checkpoint)
    if names is None or count is None:
        return None
    if not isinstance(names, list) or len(names) != count:
        raise InputError(
            f"{checkpoint.path}: info.class_names is {names!r:.60}, expected a name for each of "
            f"the network's {count} classes"
        )
    names = [str(name) for name in names]
    if (twice := repeated(names)) is not None:
        raise InputError(
            f"{checkpoint.path}: info.class_names holds {twice!r:.60} twice, expected another name "
            "for every class"
        )
    return names


def choose_classes(
    texts: Sequence[str] | None, count: int | None, names: Sequence[str] | None
) -> list[int]:
    """The class numbers to go through in turn; empty for a network without classes.

    texts: what was given, an entry for each time; None: all classes.
    count: the network's classes. names: theirs in order, where it has any.
    Raises InputError for words that are no class, or could be two.
    """
    if count is None:
        if texts is not None:
            raise InputError(f"--classes {','.join(texts)} for a network without classes")
        return []
    known = {form(name): number for number, name in enumerate(names or [])}
    texts = None if texts is None else [form(text) for text in texts]
    if texts is None or (texts == [ALL] and ALL not in known):
        return list(range(count))
    return [_number(word, count, known) for text in texts for word in _words(text, known)]


def _words(text: str, known: dict[str, int]) -> list[str]:
    """The words of one option; the whole of it where that is a class' name with commas."""
    try:
        words = next(csv.reader([text], skipinitialspace=True, strict=True), []) or [""]
    except csv.Error as error:
        if text in known:
            return [text]
        raise InputError(f'--classes {text}: {error}; names with commas stand in "..."') from None
    if text not in known or words == [text]:
        return words
    if all(word.strip() in known for word in words):
        raise InputError(
            f"--classes {text} is one class' name, and {len(words)} classes with commas between "
            f"them: write '\"{text}\"' for the one, or give --classes for each of the others"
        )
    return [text]


def _number(word: str, count: int, known: dict[str, int]) -> int:
    kind, colon, rest = word.strip().partition(":")
    if colon and kind == "name" and rest in known:
        return known[rest]
    if colon and kind == "number" and is_number(rest, count):
        return int(rest)
    word = word if word in known else word.strip()
    as_name, as_number = known.get(word), int(word) if is_number(word, count) else None
    if word == ALL and as_name is not None:
        raise InputError(
            f"--classes {ALL}: a class is called so; write name:{ALL} for it, and leave --classes "
            "out for all classes"
        )
    if as_name is not None and as_number not in (None, as_name):
        raise InputError(
            f"--classes {word}: class number {word}, or the class '{word}', which is number "
            f"{as_name}? Write number:{word} or name:{word}"
        )
    found = as_number if as_name is None else as_name
    if found is None:
        names = f" ({listed([shown(name) for name in known], 10)})" if known else ""
        raise InputError(f"--classes: {word!r} is no class; there are 0 … {count - 1}{names}")
    return found


def is_number(word: str, count: int) -> bool:
    """Whether the word is one of 0 … count - 1."""
    return word.isascii() and word.isdecimal() and len(word) < 20 and int(word) < count
