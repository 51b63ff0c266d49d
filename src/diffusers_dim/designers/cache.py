# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Blueprints kept on disk, so that no picture is designed twice."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from PIL import Image


# A file aside that is older than this was left by a process that was killed.
_STALE_SECONDS = 3600


class BlueprintCache:
    """
    Texts on disk, one small file each. Many processes and threads may use one folder: files are written aside and
    renamed, and there are no locks. A damaged file counts as absent.

    Args:
        folder (`str` or `os.PathLike`): Where the files are; made if it is not there.
        max_entries (`int`, defaults to 100,000):
            How many are kept; beyond, the ones that were not used for longest are deleted. With several writers there
            may for a moment be more, up to a 64th of it (and one) for each.

    Raises:
        ValueError: If `max_entries` is below 1, or `folder` is a file or cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], max_entries: int = 100_000):
        if max_entries < 1:
            raise ValueError(f"`max_entries` has to be at least 1, but is {max_entries}.")
        self.folder = Path(folder)
        self.max_entries = max_entries
        self._puts_until_count = 1
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ValueError(
                f"`folder` has to be a folder that can be written to, but {str(folder)!r} is not: {error.strerror}."
            ) from error

    @staticmethod
    def key(image: Image.Image | None, instruction: str, settings: dict[str, Any]) -> str:
        """
        The name of an entry.

        Args:
            image (`PIL.Image.Image`, *optional*): Its size, mode and pixels count, not its file.
            instruction (`str`): What was asked.
            settings (`dict`): What else the text depends on, of types that JSON has. Nothing secret.

        Returns:
            64 hexadecimal digits.
        """
        picture = None if image is None else [image.mode, image.size, image.getpalette()]
        told = json.dumps([picture, instruction, settings], sort_keys=True)
        digest = hashlib.sha256(told.encode() + b"\0")
        if image is not None:
            digest.update(image.tobytes())
        return digest.hexdigest()

    def get(self, key: str) -> str | None:
        """The text kept under a key, `None` if there is none or its file is damaged."""
        path = self._path(key)
        try:
            digest, _, text = path.read_bytes().partition(b"\n")
        except OSError:
            return None
        if digest.decode("latin-1") != hashlib.sha256(text).hexdigest():
            return None
        _set_used(path)
        return text.decode("utf-8", "surrogatepass")

    def put(self, key: str, text: str) -> None:
        """Keeps a text under a key, in place of an older one."""
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = text.encode("utf-8", "surrogatepass")
        aside = path.with_name(f"{key}-{uuid.uuid4().hex}.blueprint-aside")
        try:
            with open(aside, "xb") as file:
                file.write(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
            _set_used(aside)
            os.replace(aside, path)
        except BaseException:
            _delete(aside)
            raise
        self._puts_until_count -= 1
        if self._puts_until_count <= 0:
            self._evict()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.blueprint"

    def _evict(self) -> None:
        """Counts the entries, deletes the oldest above the limit, and says when to count again."""
        # Some more are deleted than need be, so that a full cache is not counted at each put.
        slack = self.max_entries // 64
        entries = []
        stale = time.time_ns() - _STALE_SECONDS * 10**9
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(folder, name)
                if name.endswith(".blueprint"):
                    entries.append(path)
                elif name.endswith(".blueprint-aside") and _used(path) < stale:
                    _delete(path)
        if len(entries) > self.max_entries:
            entries.sort(key=_used, reverse=True)
            while len(entries) > self.max_entries - slack:
                _delete(entries.pop())
        self._puts_until_count = min(slack, self.max_entries - len(entries)) + 1


def _set_used(path: str | os.PathLike[str]) -> None:
    # With the time told, as the file system's own is in steps of milliseconds. An entry of another user cannot be set.
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(path, ns=(now, now))


def _used(path: str) -> int:
    """When a file was used last, in nanoseconds; 0 if another process has deleted it."""
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return 0


def _delete(path: str | os.PathLike[str]) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
