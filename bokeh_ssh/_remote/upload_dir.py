"""The folder where what a client brings is kept while its server runs, and no longer.

Names come from the client and have slashes between their parts; none leads out of the folder.
"""

from __future__ import annotations

import contextlib
import os

from bokeh_ssh._remote.run_dir import private, remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO


class UploadDir:
    """A new, empty folder that only its owner may enter.

    :param path: where it is to be; None for the system's temporary directory
    :ivar fault: why something could not be stored; empty while all could
    """

    def __init__(self, path: str | None) -> None:
        with private():
            if path:
                os.mkdir(path, 0o700)
            else:
                import tempfile  # as long as the rest of a launch's imports

                path = tempfile.mkdtemp(prefix="bokeh-ssh-app-")
        self.path = path
        self.fault = ""
        #: Where what is not whole yet is: beside the folders, under a name that nothing of a client's has.
        self._hidden = os.path.join(path, ".bokeh-ssh-" + os.urandom(8).hex())
        self._name = ""  # of the file that is being written
        self._file: BinaryIO | None = None

    def at(self, name: str) -> str:
        """Return the path of what has this name.

        :raises ValueError: if that would be outside
        """
        parts = name.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise ValueError(name)
        return os.path.join(self.path, *parts)

    def attempt(self, method: str, *args: object) -> None:
        """Do one of the following; where that is not possible that is noted, and nothing more is done."""
        try:
            with private():
                if not self.fault:
                    getattr(self, method)(*args)
        except (OSError, ValueError) as exc:
            self.fault = f"{args[0]}: {getattr(exc, 'strerror', None) or repr(exc)}"

    def put(self, name: str, data: bytes, last: bool, runs: bool, skip: int = 0) -> None:
        """Add to a file, behind ``skip`` zeros; nobody sees its name before the last part is there."""
        path, hidden = self.at(name), self._hidden
        if name != self._name or self._file is None:
            self.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(hidden)  # its mode would be that of another file
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            self._file = os.fdopen(os.open(hidden, flags, 0o700 if runs else 0o600), "wb")
            self._name = name
        if skip:
            self._file.seek(skip, os.SEEK_CUR)
        self._file.write(data)
        if last:
            self.close()
            self._move_into_place(hidden, path)

    def finish_file(self, name: str, part: str, runs: bool) -> None:
        """Rename a file that was written beside the folders, over SFTP, to its name."""
        path, hidden = self.at(name), self.at(part)
        os.chmod(hidden, 0o700 if runs else 0o600)
        self._move_into_place(hidden, path)

    def link(self, name: str, to: str) -> None:
        """Make a symbolic link to another name in here."""
        path = self.at(name)
        hidden = self._hidden + "-link"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(hidden)
        os.symlink(os.path.relpath(self.at(to), os.path.dirname(path)), hidden)
        self._move_into_place(hidden, path)

    def _move_into_place(self, hidden: str, path: str) -> None:
        """Rename what is whole to its name, in place of whatever the server has put in the way."""
        folder = self.path
        for part in os.path.relpath(os.path.dirname(path), folder).split("/"):
            folder = os.path.join(folder, part)
            if os.path.islink(folder) or not os.path.isdir(folder):
                remove_tree(folder)
                os.mkdir(folder, 0o700)
        if os.path.isdir(path) and not os.path.islink(path):
            remove_tree(path)
        os.replace(hidden, path)

    def drop(self, name: str) -> None:
        """Remove a file, and the folders that are empty then."""
        path = self.at(name)
        if os.path.isdir(path) and not os.path.islink(path):
            return  # the server's, in place of what is to go
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            while os.path.dirname(path) != self.path:
                path = os.path.dirname(path)
                if os.listdir(path) == ["__pycache__"]:  # a folder without it would be a package all the same
                    remove_tree(os.path.join(path, "__pycache__"))
                os.rmdir(path)

    def close(self) -> None:
        """Let go of a file that is half there."""
        file, self._file, self._name = self._file, None, ""
        if file:
            file.close()

    def remove(self) -> None:
        """Remove it and all that is in it, what the server has put there too; quietly, and more than once."""
        with contextlib.suppress(OSError):
            self.close()
        remove_tree(self.path)
