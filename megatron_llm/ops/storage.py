"""Folders that checkpoints live in: local ones, and any that fsspec reaches (`s3://`, `gs://`, `memory://`, ...).

What a checkpoint needs of a file system is little, and is all here: write a file so that it survives a crash, make a small
file appear whole or not at all, read parts of a file, list, delete. POSIX gives it by fsync and rename; an object store shows
an object when its upload is complete, and has nothing to sync. Names inside a folder are relative, with `/` between parts.

fsspec and its file systems are imported when a remote folder is opened. Called by: `ops/safetensors.py`, `checkpoint/`, `hf/`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

BLOCK_BYTES = 1 << 24
"""What is read or written at once where the size is ours to choose: large for a request, small beside a tensor."""


_SYNC_BYTES = 1 << 28


class Sink(Protocol):
    """A file being written."""

    path: str

    def write(self, data: bytes | memoryview) -> object:
        """Append all of `data`."""
        ...


class ReadFile(ABC):
    """A file open for reading any part of it.

    Attributes:
        path: for messages. size: in bytes, when it was opened. seeks: whether many small reads cost no more than a large one.
    """

    seeks: bool

    def __init__(self, path: str, size: int):
        self.path, self.size = path, size

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @abstractmethod
    def read(self, start: int, into: memoryview) -> None:
        """Fill `into` with the bytes from `start` on. Raises ValueError naming the file if it has become too short."""

    def bytes(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop)."""
        data = bytearray(stop - start)
        self.read(start, memoryview(data))
        return bytes(data)

    def _too_short(self, start: int, wanted: int) -> ValueError:
        return ValueError(f"{self.path} was cut off while it was read: no {wanted} bytes at {start} of what were {self.size}")


class Folder(ABC):
    """A folder, which need not exist yet. `str()` gives what a user calls it."""

    @property
    def name(self) -> str:
        """The last part of what a user calls it."""
        return str(self).rsplit("/", 1)[-1]

    @abstractmethod
    def child(self, name: str) -> Folder:
        """A folder inside it."""

    @abstractmethod
    def parent(self) -> Folder:
        """The folder it is in."""

    def absolute(self) -> Folder:
        """The same, named in a way that does not depend on the working directory."""
        return self

    @abstractmethod
    def names(self) -> list[str]:
        """The files and folders directly in it; none if it does not exist."""

    @abstractmethod
    def files(self) -> dict[str, int]:
        """Name -> bytes of every file in it and in the folders below; none if it does not exist. One request."""

    @abstractmethod
    def open(self, name: str) -> ReadFile:
        """A file to read from. Raises FileNotFoundError."""

    @abstractmethod
    def make(self) -> None:
        """Create it, and its parents, if need be; durably."""

    @abstractmethod
    def create(self, name: str) -> AbstractContextManager[Sink]:
        """A file to write, replacing one that is there; its content is safe when the context ends without an error."""

    @abstractmethod
    def commit(self, name: str, data: bytes) -> None:
        """Write a small file that appears whole or not at all, after everything that was created in the folder before."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file, durably, if it is there."""

    @abstractmethod
    def delete(self) -> None:
        """Delete the folder and all that is in it."""

    def read_bytes(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError."""
        file = self.open(name)
        return file.bytes(0, file.size)


def open_folder(place: str | Path | Folder) -> Folder:
    """The folder that a path or a URL names.

    Raises ValueError for a URL of an unknown protocol, or of one whose package is not installed.
    """
    if isinstance(place, Folder):
        return place
    protocol, url, path = str(place).partition("://")
    if not url:
        return LocalFolder(Path(place))
    if protocol in ("file", "local"):
        return LocalFolder(Path(path))
    import fsspec

    try:
        # Listings change while a run saves, and other nodes change them.
        fs, path = fsspec.url_to_fs(str(place), use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise ValueError(f"{place}: {protocol}:// needs a package that is not installed ({error})") from error
    except ValueError as error:
        raise ValueError(f"{place} cannot be used: {error}") from error
    return RemoteFolder(fs, path.rstrip("/"), str(place).rstrip("/"))


class _LocalSink:
    def __init__(self, path: Path):
        self.path = str(path)
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._unsynced = 0

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        self._unsynced += len(rest)
        while rest:
            rest = rest[os.write(self.descriptor, rest[: 1 << 30]) :]
        if self._unsynced >= _SYNC_BYTES:  # a single fsync of a hundred gigabytes looks like a hang
            os.fsync(self.descriptor)
            self._unsynced = 0


class _LocalFile(ReadFile):
    seeks = True

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)
        super().__init__(str(path), os.fstat(self._descriptor).st_size)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it could not be opened; the interpreter is ending
            os.close(self._descriptor)

    def read(self, start: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            read = os.preadv(self._descriptor, [into[done : done + (1 << 30)]], start + done)
            if not read:
                raise self._too_short(start, len(into))
            done += read


class LocalFolder(Folder):
    """A folder of the machine's file system."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def parent(self) -> LocalFolder:
        return LocalFolder(self.path.parent)

    def absolute(self) -> LocalFolder:
        return LocalFolder(self.path.absolute())

    def names(self) -> list[str]:
        return sorted(os.listdir(self.path)) if self.path.is_dir() else []

    def files(self) -> dict[str, int]:
        found = {}
        for folder, _, names in os.walk(self.path):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # it has been deleted since
                    found[str(path.relative_to(self.path))] = path.stat().st_size
        return found

    def open(self, name: str) -> ReadFile:
        return _LocalFile(self.path / name)

    def make(self) -> None:
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        os.makedirs(self.path, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        path = self.path / name
        if "/" in name:
            LocalFolder(path.parent).make()
        sink = _LocalSink(path)
        try:
            yield sink
            os.fsync(sink.descriptor)
        finally:
            os.close(sink.descriptor)
        sync_folder(path.parent)

    def commit(self, name: str, data: bytes) -> None:
        with self.create(f"{name}.tmp") as sink:
            sink.write(data)
        os.replace(self.path / f"{name}.tmp", self.path / name)
        sync_folder(self.path)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path / name)
            sync_folder(self.path)

    def delete(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path)
            sync_folder(self.path.parent)


@contextlib.contextmanager
def _reaching(shown: str) -> Iterator[None]:
    """File systems have errors of all kinds: what is raised is an OSError that says where, or FileNotFoundError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"cannot be used: {type(error).__name__}: {error}", shown) from error


class _RemoteFile(ReadFile):
    seeks = False

    def __init__(self, fs: Any, path: str, shown: str):
        self._fs, self._path = fs, path
        with _reaching(shown):
            super().__init__(shown, int(fs.info(path)["size"]))

    def read(self, start: int, into: memoryview) -> None:
        for at in range(0, len(into), BLOCK_BYTES):
            wanted = into[at : at + BLOCK_BYTES]
            with _reaching(self.path):
                data = self._fs.cat_file(self._path, start=start + at, end=start + at + len(wanted))
            if len(data) != len(wanted):
                raise self._too_short(start, len(into))
            wanted[:] = data


class _RemoteSink:
    def __init__(self, file: Any, path: str):
        self._file, self.path = file, path

    def write(self, data: bytes | memoryview) -> None:
        with _reaching(self.path):
            for at in range(0, len(data), BLOCK_BYTES):  # it is copied until it is sent
                self._file.write(data[at : at + BLOCK_BYTES])


class RemoteFolder(Folder):
    """A folder of an fsspec file system. Whatever its methods raise is an OSError with the URL."""

    def __init__(self, fs: Any, path: str, shown: str):
        self._fs, self._path, self._shown = fs, path, shown

    def __str__(self) -> str:
        return self._shown

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def child(self, name: str) -> RemoteFolder:
        return RemoteFolder(self._fs, self._at(name), f"{self}/{name}")

    def parent(self) -> RemoteFolder:
        return RemoteFolder(self._fs, self._path.rsplit("/", 1)[0], self._shown.rsplit("/", 1)[0])

    def names(self) -> list[str]:
        with _reaching(self._shown):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._path, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in found if path.rstrip("/") != self._path})

    def files(self) -> dict[str, int]:
        with _reaching(self._shown):
            self._fs.invalidate_cache()
            found = self._fs.find(self._path, detail=True)
            return {path.removeprefix(f"{self._path}/"): int(info["size"]) for path, info in found.items()}

    def open(self, name: str) -> ReadFile:
        return _RemoteFile(self._fs, self._at(name), f"{self}/{name}")

    def make(self) -> None:
        with _reaching(self._shown):
            self._fs.makedirs(self._path, exist_ok=True)  # nothing on an object store

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Sink]:
        if "/" in name:
            self.child(name.rsplit("/", 1)[0]).make()
        with _reaching(f"{self}/{name}"):
            file = self._fs.open(self._at(name), "wb", block_size=4 * BLOCK_BYTES)
        try:
            yield _RemoteSink(file, f"{self}/{name}")
        except BaseException:
            with contextlib.suppress(Exception):  # what it says cannot matter more
                file.close()
            raise
        with _reaching(f"{self}/{name}"):
            file.close()

    def commit(self, name: str, data: bytes) -> None:
        with _reaching(f"{self}/{name}"):
            self._fs.pipe_file(self._at(name), data)  # one request

    def remove(self, name: str) -> None:
        with _reaching(f"{self}/{name}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def delete(self) -> None:
        with _reaching(self._shown), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path, recursive=True)


def sync_folder(path: Path) -> None:
    """fsync a local folder: the names of the files made in it, renamed or removed survive a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)
