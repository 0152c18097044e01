"""Folders that are there whole or not at all: what a full disk, a kill and a flipped bit leave."""

import errno
import json
import os
import resource
import signal

import pytest

from ctxenc.training import durable

FILES = (("a.bin", bytes(range(256))), ("b.bin", b""), ("c.json", b"{}"))


@pytest.fixture
def folder(tmp_path):
    durable.write_folder(tmp_path / "folders" / "2", FILES)
    return tmp_path / "folders" / "2"


def test_what_is_written_is_there_and_intact(folder):
    assert {each.name: each.read_bytes() for each in folder.iterdir() if each.name != durable.MANIFEST} == dict(FILES)
    assert durable.damage(folder) == ""
    assert [each.name for each in folder.parent.iterdir()] == ["2"]


@pytest.mark.parametrize("name", ["a.bin", "c.json", durable.MANIFEST])
def test_every_flipped_bit_and_every_lost_end_is_found(folder, name):
    content = (folder / name).read_bytes()
    for position in range(0, len(content), max(1, len(content) // 40)):
        for bit in (1, 16, 32, 128):
            flipped = bytearray(content)
            flipped[position] ^= bit
            (folder / name).write_bytes(flipped)
            assert durable.damage(folder), (position, bit)
        (folder / name).write_bytes(content[:position])
        assert durable.damage(folder), position
    (folder / name).write_bytes(content)
    assert durable.damage(folder) == ""


def test_a_file_too_few_or_too_many_is_found(folder):
    (folder / "d.bin").touch()
    assert durable.damage(folder) == "its files are not those of manifest.json"
    (folder / "d.bin").unlink()
    (folder / "b.bin").unlink()
    assert durable.damage(folder) == "its files are not those of manifest.json"
    (folder / "b.bin").symlink_to("b.bin")
    assert durable.damage(folder) == "b.bin: Too many levels of symbolic links"


@pytest.mark.parametrize(
    "manifest", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"../2/a.bin": "0"}', b'{"a.bin": 3}']
)
def test_a_manifest_that_is_none_is_found(folder, manifest):
    (folder / durable.MANIFEST).write_bytes(manifest)
    assert durable.damage(folder)


@pytest.mark.parametrize("failing", ["a.bin", "c.json", durable.MANIFEST])
def test_a_full_disk_leaves_what_was_there(folder, monkeypatch, failing):
    """Half a file is written, then the disk is full."""
    real = durable._write

    def write(path, content):
        if path.name != failing:
            return real(path, content)
        path.write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(durable, "_write", write)
    for name in ("2", "3"):  # in place of one that is there, and beside it
        with pytest.raises(OSError, match="No space left"):
            durable.write_folder(folder.parent / name, FILES)
        assert durable.damage(folder) == ""
        assert [each.name for each in folder.parent.iterdir()] == ["2"]


def test_a_limit_of_the_system_leaves_what_was_there(folder):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            durable.write_folder(folder.parent / "3", [*FILES, ("d.bin", bytes(10_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [each.name for each in folder.parent.iterdir()] == ["2"]


def test_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    """Else a machine that loses its power may keep the name and lose what is in it."""
    done, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    durable.write_folder(tmp_path / "2", FILES)
    names = [os.path.basename(each) for each in done]
    assert names.pop(4).startswith(".2.")  # the folder under its temporary name
    assert names == ["a.bin", "b.bin", "c.json", durable.MANIFEST, "renamed", tmp_path.name]


def test_the_newest_are_kept(tmp_path):
    for name in ("1", "2", "3", "4", "5", ".6.tmp"):
        (tmp_path / name).mkdir()
    durable.keep_newest(tmp_path, "4", 2)  # 5 is damaged, else it would be the last
    assert sorted(each.name for each in tmp_path.iterdir()) == ["3", "4"]


def test_the_manifest_names_each_file(folder):
    assert set(json.loads((folder / durable.MANIFEST).read_text())) == {"a.bin", "b.bin", "c.json"}
