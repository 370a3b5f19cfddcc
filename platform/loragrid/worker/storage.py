"""Files on storage that every node reaches: a local path, or any URI that pyarrow knows."""

from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow import fs

BLOCK_BYTES = 2**24


class Storage:
    """A folder at `uri`: a path, `s3://bucket/path`, `gs://bucket/path` and so on. All names are relative to it.

    It can be pickled: every process opens its own connections.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def upload(self, local: Path, name: str) -> None:
        """Copy a local file to `name`; nothing is left there if that fails."""
        target = self._path(name)
        self._filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        try:
            with local.open("rb") as source, self._filesystem.open_output_stream(target) as stream:
                while block := source.read(BLOCK_BYTES):
                    stream.write(block)
        except OSError:
            if self._filesystem.get_file_info(target).type == fs.FileType.File:
                self._filesystem.delete_file(target)
            raise

    def download(self, name: str, local: Path) -> None:
        """Copy a file, or a folder with its files, to a local path.

        Raises:
            FileNotFoundError: there is no such file.
        """
        fs.copy_files(
            self._path(name),
            str(local),
            source_filesystem=self._filesystem,
            destination_filesystem=fs.LocalFileSystem(),
        )

    def names(self, folder: str) -> list[str]:
        """The names of files and folders in a folder, without their paths; none if it does not exist."""
        selector = fs.FileSelector(self._path(folder), allow_not_found=True)
        return [info.base_name for info in self._filesystem.get_file_info(selector)]

    def is_folder(self, name: str = "") -> bool:
        """Whether there is a folder of this name."""
        return bool(self._filesystem.get_file_info(self._path(name)).type == fs.FileType.Directory)

    def has_files(self) -> bool:
        """Whether any file lies in the folder or below it."""
        found = self._filesystem.get_file_info(fs.FileSelector(self._path(), recursive=True))
        return any(info.type != fs.FileType.Directory for info in found)

    def touch(self, name: str) -> None:
        """Write an empty file."""
        target = self._path(name)
        self._filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        with self._filesystem.open_output_stream(target) as stream:
            stream.write(b"")

    def delete_file(self, name: str) -> None:
        """Delete a file."""
        self._filesystem.delete_file(self._path(name))

    def delete_folder(self, name: str = "") -> None:
        """Delete a folder with everything in it."""
        self._filesystem.delete_dir(self._path(name))

    def _path(self, name: str = "") -> str:
        return f"{str(self._location[1]).rstrip('/')}/{name}".rstrip("/")

    @property
    def _filesystem(self) -> Any:
        return self._location[0]

    @cached_property
    def _location(self) -> tuple[Any, str]:
        if "://" in self._uri:
            filesystem, path = fs.FileSystem.from_uri(self._uri)
            return filesystem, path
        return fs.LocalFileSystem(), self._uri

    def __getstate__(self) -> dict[str, str]:
        return {"_uri": self._uri}
