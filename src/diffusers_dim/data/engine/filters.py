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
"""
What is dropped without asking a judge, and what is checked after it.

Each is called with a sample and gives `None`, or why it is dropped as "kind: particulars", so that reasons can be
counted by what stands before the colon.
"""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ...designers import Blueprint
from ...files import READ_ERRORS
from .records import EngineSample


Filter = Callable[[EngineSample], str | None]

# By PIL's names, how files of the types that are let in begin. All else is refused, whatever a file's name says.
ALLOWED_TYPES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF.{4}WEBP",
    "AVIF": rb".{4}ftyp(?:avif|mif1)",
    "GIF": rb"GIF8[79]a",
    "TIFF": rb"II\*\0|MM\0\*",
    "BMP": rb"BM",
}
# Only to say what a refused file is.
REFUSED_TYPES = {
    "SVG": rb"(?=[\xef\xbb\xbf\s]{0,16}<).*<svg",
    "XML": rb"[\xef\xbb\xbf\s]{0,16}<\?xml",
    "HTML": rb"[\xef\xbb\xbf\s]{0,16}<(?:!doctype\s+html|html|head|body|script)",
    "PDF": rb"\s*%PDF",
    "PostScript": rb"\s*%!|\xc5\xd0\xd3\xc6",
    "an AVIF sequence": rb".{4}ftypavis",
    "a HEIF picture or a film": rb".{4}ftyp",
    "Photoshop": rb"8BPS",
    "a Windows program": rb"MZ",
    "an ELF program": rb"\x7fELF",
    "a Mach-O program": rb"\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe",
    "a script": rb"#!",
    "an archive": rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ",
}

MAX_PIXELS = 1024 * 1024 * 1024 // 12  # PIL's limit: a quarter of a GiB in RGB
GRID = 24  # cells a side of the change mask, when it is compared with words

# Of the painter's 8192 condition tokens, what the vision tokens of a 1024 px source leave.
MAX_TOKENS = 8192 - (1036 // 28) ** 2


def _files(sample: EngineSample) -> dict[str, bytes]:
    return {"target": sample.target} if sample.source is None else {"source": sample.source, "target": sample.target}


def _find_type(data: bytes, types: dict[str, bytes]) -> str | None:
    start = data[:1024]
    return next((name for name, head in types.items() if re.match(head, start, re.DOTALL | re.IGNORECASE)), None)


def _open(data: bytes) -> Image.Image:
    """The picture in a file of an allowed type, not decoded."""
    Image.init()
    # An older PIL has no reader of AVIF, and fails at its name.
    return Image.open(io.BytesIO(data), formats=[name for name in ALLOWED_TYPES if name in Image.OPEN])


@dataclass(frozen=True)
class UnsafeType:
    """Drops files that are not of `ALLOWED_TYPES` by their first bytes, and pictures of more than one frame."""

    def __call__(self, sample: EngineSample) -> str | None:
        for name, data in _files(sample).items():
            kind = _find_type(data, ALLOWED_TYPES)
            if kind is None:
                found = _find_type(data, REFUSED_TYPES) or ("of an unknown type" if data else "empty")
                return f"unsafe type: the {name} is {found}"
            if kind == "JPEG":  # a second picture in it is a camera's preview or gain map
                continue
            try:
                with _open(data) as image:
                    several = getattr(image, "is_animated", False)
            except READ_ERRORS:  # for the filters of what is unreadable or too large
                continue
            if several:
                return f"unsafe type: the {name} is a {kind} of several frames"
        return None


@dataclass(frozen=True)
class TooLarge:
    """
    Drops decompression bombs by their headers, before they are decoded.

    Args:
        max_pixels (`int`): The largest area. PIL's own limit by default, 89 million.
    """

    max_pixels: int = MAX_PIXELS

    def __call__(self, sample: EngineSample) -> str | None:
        for name, data in _files(sample).items():
            try:
                with _open(data) as image:
                    width, height = image.size
            except Image.DecompressionBombError as error:
                return f"too large: the {name}: {error}"
            except READ_ERRORS:  # for the filter of what is unreadable
                continue
            if width * height > self.max_pixels:
                return f"too large: the {name} has {width}x{height} pixels (at most {self.max_pixels})"
        return None


@dataclass(frozen=True)
class Unreadable:
    """Drops pictures that PIL does not read to their end, or that are beyond 200:1."""

    def __call__(self, sample: EngineSample) -> str | None:
        try:
            len(sample.pictures)
        except ValueError as error:
            return f"unreadable: {error}"
        return None


@dataclass(frozen=True)
class Tiny:
    """
    Drops small pictures.

    Args:
        min_side (`int`, defaults to 64): Pixels that the shorter side has to have.
    """

    min_side: int = 64

    def __call__(self, sample: EngineSample) -> str | None:
        for name, picture in zip(_files(sample), sample.pictures):
            if min(picture.size) < self.min_side:
                return (
                    f"tiny: the {name} has {picture.width}x{picture.height} pixels (at least {self.min_side} a side)"
                )
        return None


@dataclass(frozen=True)
class Aspect:
    """
    Drops long pictures, and pairs of different shapes.

    Args:
        max_ratio (`float`, defaults to 4.0): The longer side by the shorter; 4 is that of SANA's longest bins.
        max_difference (`float`, defaults to 1.1): How many times one picture's width by height may be the other's.
    """

    max_ratio: float = 4.0
    max_difference: float = 1.1

    def __call__(self, sample: EngineSample) -> str | None:
        for name, picture in zip(_files(sample), sample.pictures):
            if max(picture.size) > self.max_ratio * min(picture.size):
                return f"aspect: the {name} has {picture.width}x{picture.height} pixels (at most {self.max_ratio}:1)"
        ratios = [picture.width / picture.height for picture in sample.pictures]
        if max(ratios) > self.max_difference * min(ratios):
            sizes = " and ".join(f"{picture.width}x{picture.height}" for picture in sample.pictures)
            return f"aspect: source and target differ: {sizes}"
        return None


@dataclass(frozen=True)
class Identical:
    """
    Drops pairs in which nothing changed but for noise.

    Args:
        min_share (`float`, defaults to 0.0005):
            The part of the picture that has to be in the [`change_mask`]: 23x23 pixels of 1024x1024.
    """

    min_share: float = 0.0005

    def __call__(self, sample: EngineSample) -> str | None:
        if sample.source is None:
            return None
        share = sample.changed.histogram()[255] / (sample.changed.width * sample.changed.height)
        if share < self.min_share:
            return f"identical: {share:.3%} of the picture changed (at least {self.min_share:.3%})"
        return None


# How many bits each 16-bit number has.
_BIT_COUNTS = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(1, dtype=np.uint8)


@dataclass
class NearDuplicate:
    """
    Drops a pair like an earlier one: its source's difference hash (dHash, 64 bits) is near the earlier one's, and so
    are all colours of what changed, at 8x8 cells. Hashes of both pictures alone would take different small edits of a
    picture for one. A single picture is compared by its hash and its own colours.

    Samples are compared with those that it let pass before, so that it has to be called by one thread, in the samples'
    own order, and a set that is gone through again needs a fresh one.

    Args:
        distance (`int`, defaults to 4): Bits of 64 in which hashes may differ.
        tolerance (`int`, defaults to 8): Levels of 255 in which each cell's change of colour may differ.
        capacity (`int`, defaults to 250,000):
            How many samples it remembers, the last ones: some 280 bytes and 8 ns of each later call for each.
    """

    distance: int = 4
    tolerance: int = 8
    capacity: int = 250_000
    _ids: list[str] = field(default_factory=list, init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.distance < 64:
            raise ValueError(f"`distance` has to be from 0 to 63 bits, but is {self.distance}.")
        if self.capacity < 1:
            raise ValueError(f"`capacity` has to be at least 1, but is {self.capacity}.")

    def __call__(self, sample: EngineSample) -> str | None:
        if self._count == 0:  # not before, so that a fresh filter is small to send; zeros take no memory until used
            self._hashes = np.zeros((4, self.capacity), np.uint16)
            self._changes = np.zeros((self.capacity, 8 * 8 * 3), np.int8)
        hash, change = self._fingerprint(sample)
        held = len(self._ids)
        distances = sum(_BIT_COUNTS[part[:held] ^ own] for part, own in zip(self._hashes, hash))
        near = np.flatnonzero(distances <= self.distance)
        unlike = np.abs(self._changes[near].astype(np.int16) - change).max(1, initial=0)
        # Halved, since a change of colour has one bit more than a colour.
        alike = near[2 * unlike <= self.tolerance]
        if len(alike):
            return f"near duplicate: of {self._ids[alike[0]]}"
        place = self._count % self.capacity
        self._hashes[:, place], self._changes[place] = hash, change
        self._ids[place : place + 1] = [sample.id]
        self._count += 1
        return None

    @staticmethod
    def _fingerprint(sample: EngineSample) -> tuple[np.ndarray, np.ndarray]:
        first, *rest = sample.reduced
        grey = _shrink(first.convert("L"), (9, 8))
        # Two levels more, so that noise on an even ground makes no bits.
        bits = grey[:, 1:] - grey[:, :-1] > 2
        cells = _shrink(first, (8, 8))
        change = _shrink(rest[0], (8, 8)) - cells if rest else cells - 128
        return np.packbits(bits).view(np.uint16), (change // 2).astype(np.int8).ravel()


def _shrink(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.resize(size, Image.Resampling.BOX), np.int16)


_PICTURE = (
    r"(?:(?:whole|entire|original|source)\s+)?(?:picture|image|photo(?:graph)?|frame|scene|canvas|composition|view|shot|"
    r"illustration)\b"
)
_ROWS = {"top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}
_COLUMNS = {"left": "left", "right": "right"}
_MIDDLE = r"cent(?:er|re|ral)|middle"
_ROW, _COLUMN = "|".join(_ROWS), "|".join(_COLUMNS)
_PART = (
    r"(?:most|[\s-]hand)?[\s-](?:corner|side|half|halve|part|edge|third|quarter|quadrant|portion|area|region|section|"
    r"border|margin|cell)s?\b"
)
# A place of the picture, not of a thing in it: "the top of the table" says nothing about where in the picture that is,
# nor does "his left hand", nor "to the left".
_PLACE = re.compile(
    rf"(?<!['’]s )(?<!his )(?<!her )(?<!its )(?<!their )\b(?>"
    rf"(?P<row>{_ROW}|{_MIDDLE})[\s-]*(?P<column>{_COLUMN}|{_MIDDLE})\b(?:{_PART})?"
    rf"|(?P<column2>{_COLUMN}|{_MIDDLE})[\s-]+(?P<row2>{_ROW}|{_MIDDLE})\b(?:{_PART})?"
    rf"|(?P<part>{_ROW}|{_COLUMN}|{_MIDDLE})(?:{_PART}|(?=\s+of\s+(?:the|this)\s+{_PICTURE}))"
    rf"|(?:at|in|on|along|near)\s+the\s+(?:very\s+|far\s+)?(?P<bare>{_ROW}|{_COLUMN}|{_MIDDLE})\b"
    rf"(?!{_PART}|[\s-]+(?:{_ROW}|{_COLUMN}|{_MIDDLE}|hand|arm|leg|foot|feet|eye|ear|lip|cheek|shoulder|wing|paw|"
    r"ground|distance|finger|moment|way|shelf)s?\b)"
    rf")(?!\s+of\s+(?!(?:the|this)\s+{_PICTURE}))",
    re.IGNORECASE,
)
_WHOLE = re.compile(rf"\b(?:whole|entire|full|complete)\s+(?:{_PICTURE}|background|backdrop)", re.IGNORECASE)
# Many small things may be meant, or a mood: nothing that pixels could contradict.
_ANYWHERE = re.compile(r"\b(?:everywhere|all over|throughout|across the|global(?:ly)?|overall)\b", re.IGNORECASE)
_STAYS = re.compile(
    r"\b(?:stay|remain|unchanged|unaltered|unaffected|untouched|unmodified|intact|preserv|identical|the same\b|keep|"
    r"kept|leav(?:e|ing)\b|left (?:as|un|alone)|except|other than|rest of|else(?:where)?\b|nothing|"
    r"(?:not|n['’]t|never|no)\s+(?:\w+\s+)?(?:chang|alter|affect|modif|edit|touch|mov))",
    re.IGNORECASE,
)
# Where a clause begins, with the word that begins it.
_CLAUSE = re.compile(
    r"(?=(?<=[.!?])\s|;|\s(?:while|whereas|but|although)\s|,\s+(?:keeping|leaving|preserving|without)\s)",
    re.IGNORECASE,
)
# Places as cells of the grid: not thirds alone, since things are larger than the places that are said of them.
_SIDES = {
    "top": slice(0, 10),
    "left": slice(0, 10),
    "middle": slice(5, 19),
    "bottom": slice(14, 24),
    "right": slice(14, 24),
    "all": slice(0, 24),
}


def _changing_clauses(text: str) -> Iterator[str]:
    """What a text says about things that change: not the clauses on what stays, nor the lists under such a head."""
    staying = False
    for line in text.split("\n"):
        line = line.strip(" \t*_#-•")
        if line.endswith(":"):
            staying = bool(_STAYS.search(line))
        elif not line:
            staying = False
        elif not staying:
            yield from (clause for clause in _CLAUSE.split(line) if not _STAYS.search(clause))


def find_areas(text: str) -> np.ndarray | None:
    """
    The places of the picture that a text says change.

    Args:
        text (`str`): The fourth part of a blueprint.

    Returns:
        A boolean `(24, 24)` array, all of it for the whole picture or background; `None` if no place is named.
    """
    area = np.zeros((GRID, GRID), bool)
    for clause in _changing_clauses(text):
        if _ANYWHERE.search(clause):
            return None
        if _WHOLE.search(clause):
            return np.ones_like(area)
        for place in _PLACE.finditer(clause):
            words = [word.lower() for word in place.groupdict().values() if word]
            row = next((_ROWS[word] for word in words if word in _ROWS), "all")
            column = next((_COLUMNS[word] for word in words if word in _COLUMNS), "all")
            if len(words) == 2 or row == column:  # "middle left", "in the center"
                row, column = (side.replace("all", "middle") for side in (row, column))
            area[_SIDES[row], _SIDES[column]] = True
    return area if area.any() else None


@dataclass(frozen=True)
class AreasAgree:
    """
    Drops a sample whose blueprint places the edit (its fourth part, in the column "prompt") where the pixels did not
    change. Only clear contradictions count: what a text leaves open passes.

    Args:
        min_inside (`float`, defaults to 0.25): The part of the [`change_mask`] that has to lie in the places named.
        max_outside (`float`, defaults to 0.5): The part of all else that may be in the mask.
        min_thirds (`int`, defaults to 4):
            If the whole picture or background is said to change: in how many of 3x3 cells at least 5% has to.
    """

    min_inside: float = 0.25
    max_outside: float = 0.5
    min_thirds: int = 4

    def __call__(self, sample: EngineSample) -> str | None:
        area = find_areas(Blueprint.parse(sample.columns["prompt"]).edit_area_localization)
        if area is None:
            return None
        changed = np.asarray(sample.changed.resize((GRID, GRID), Image.Resampling.BOX)) / 255
        if not changed.any():
            return None
        if area.all():
            thirds = changed.reshape(3, GRID // 3, 3, GRID // 3).mean((1, 3)) >= 0.05
            if thirds.sum() < self.min_thirds:
                return f"areas disagree: all is said to change, but {changed.mean():.1%} of the picture did"
            return None
        inside = changed[area].sum() / changed.sum()
        if inside < self.min_inside:
            return f"areas disagree: {inside:.1%} of the change is where the blueprint says"
        outside = changed[~area].mean()
        if outside > self.max_outside:
            return f"areas disagree: {outside:.1%} of what the blueprint does not name changed"
        return None


@dataclass(frozen=True)
class Length:
    """
    Drops a sample whose text the painter's context does not hold.

    Args:
        max_tokens (`int`, defaults to 6823): What of 8192 tokens a source of 1024x1024 pixels leaves.
        tokenizer (*optional*): Its `encode(text)` gives the tokens. Without one they are estimated.
        characters_per_token (`float`, defaults to 3.5): For the estimate; English blueprints have some 4.5.
        column (`str`, defaults to "prompt"): Which text; "caption" for captions.
    """

    max_tokens: int = MAX_TOKENS
    tokenizer: Any = None
    characters_per_token: float = 3.5
    column: str = "prompt"

    def __call__(self, sample: EngineSample) -> str | None:
        text = sample.columns[self.column]
        if self.tokenizer is None:
            count = round(len(text) / self.characters_per_token)
        else:
            count = len(self.tokenizer.encode(text))
        if count > self.max_tokens:
            return f"too long: the {self.column} has {count} tokens (at most {self.max_tokens})"
        return None


def default_filters(min_side: int = 64, max_ratio: float = 4.0, distance: int = 4) -> list[Filter]:
    """
    All filters that need no judge, in the order in which they are to be asked: no file is decoded before its type and
    size are known.

    Args:
        min_side (`int`, defaults to 64): Of [`Tiny`].
        max_ratio (`float`, defaults to 4.0): Of [`Aspect`].
        distance (`int`, defaults to 4): Of [`NearDuplicate`].
    """
    return [
        UnsafeType(),
        TooLarge(),
        Unreadable(),
        Tiny(min_side),
        Aspect(max_ratio),
        Identical(),
        NearDuplicate(distance),
    ]
