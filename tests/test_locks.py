"""One process at a time in a folder, whatever the file system says."""

import errno
import os

import pytest
from filelock import FileLock

from fastdiff.errors import InputError
from fastdiff.locks import release, take


def test_the_second_is_refused_until_the_first_lets_go(tmp_path):
    first = take(tmp_path, "taken")
    before = (tmp_path / ".lock").stat()
    with pytest.raises(InputError, match="^taken$"):
        take(tmp_path, "taken")
    assert (tmp_path / ".lock").stat() == before
    release(first)
    release(take(tmp_path, "taken"))
    assert os.listdir(tmp_path) == [".lock"]


def failing(monkeypatch, number):
    def acquire(self, *args, **options):
        raise OSError(number, os.strerror(number), self.lock_file)

    monkeypatch.setattr(FileLock, "acquire", acquire)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_into_is_one_line(tmp_path, monkeypatch, number):
    failing(monkeypatch, number)
    with pytest.raises(InputError, match="may not be written into: (Perm|Read-only)") as caught:
        take(tmp_path, "taken")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, number):
    failing(monkeypatch, number)
    with pytest.warns(RuntimeWarning, match="cannot be locked .*no other process"):
        lock = take(tmp_path, "taken")
    release(lock)


def test_other_errors_are_raised_as_they_are(tmp_path, monkeypatch):
    failing(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        take(tmp_path, "taken")
