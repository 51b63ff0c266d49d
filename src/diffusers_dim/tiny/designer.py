"""A designer for the picture world, by rule: it reads a picture's shapes and writes the true blueprint of an edit."""

import re
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from PIL import Image

from diffusers_dim.designers import DesignError, FunctionDesigner
from diffusers_dim.tiny import edits
from diffusers_dim.tiny.edits import FRAMES, TEMPLATES, write_blueprint
from diffusers_dim.tiny.scenes import (
    CELLS,
    GROUND_COLORS,
    SHAPE_COLORS,
    SHAPE_KINDS,
    SIZES,
    Ground,
    Scene,
    Shape,
    join_words,
    list_shapes,
)


SIZE = 64  # pixels of a side at which pictures are read
DRAWN_SIZES = (128, 256, 512, 1024)  # at which shapes are tried besides
REACH = 10  # the largest radius and offset from a cell's middle
# Mean differences of 0 to 255 up to which a picture is one of the world: what painting and JPEG leave.
MOST_DIFFERENT = 10.0
KINDS = ("recolor", "remove", "add", "replace", "move", "background")
EXAMPLES = "Paint the red circle blue. / Remove the red circle. / Put a large red star at the top."


@lru_cache
def _grounds() -> tuple[list[Ground], np.ndarray]:
    """All grounds, and their pictures (grounds, SIZE, SIZE, 3)."""
    grounds = [Ground(color) for color in GROUND_COLORS]
    for direction in ("vertical", "horizontal"):
        grounds += [Ground(a, b, direction) for a in GROUND_COLORS for b in GROUND_COLORS if a != b]
    return grounds, np.stack([np.asarray(Scene((), ground).render(SIZE), dtype=np.float32) for ground in grounds])


@lru_cache(maxsize=8)
def _shapes(drawn_at: int) -> tuple[list[tuple[str, str, tuple[int, int]]], np.ndarray]:
    """
    Kinds, sizes and offsets of shapes, and how they cover a cell's middle (shapes, 2 REACH, 2 REACH, 1), 0 to 1, when
    they are drawn at a size and shrunk to SIZE: small squares differ a little.
    """
    window = slice(11 + 21 - REACH, 11 + 21 + REACH)
    dark, light = SHAPE_COLORS["black"][0], GROUND_COLORS["white"][0]
    found, masks = [], []
    for kind in SHAPE_KINDS:
        for size in SIZES:
            for offset in ((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)):
                found.append((kind, size, offset))
                scene = Scene((Shape(kind, "black", size, "center", offset),), Ground("white"))
                drawn = np.asarray(_shrink(scene.render(drawn_at)), dtype=np.float32)
                masks.append((light - drawn[window, window, :1]) / (light - dark))
    return found, np.stack(masks)


def _shrink(image: Image.Image) -> Image.Image:
    return image if image.size == (SIZE, SIZE) else image.resize((SIZE, SIZE), Image.Resampling.BOX)


def read_scene(image: Image.Image) -> Scene | None:
    """
    What a picture of the world shows, also one that was painted, enlarged or compressed; `None` if it is none of the
    world.

    Args:
        image: In RGB, of any size; it is read at 64x64 pixels.
    """
    pixels = np.asarray(_shrink(image), dtype=np.float32)
    grounds, pictures = _grounds()
    lines = [0, 21, 42, 63]  # no shape reaches these rows and columns
    errors = np.abs(pictures - pixels)
    errors = (errors[:, lines].mean(axis=(1, 2, 3)) + errors[:, :, lines].mean(axis=(1, 2, 3))) / 2
    place = int(errors.argmin())
    if errors[place] > MOST_DIFFERENT:
        return None
    drawn_at = {SIZE, image.width} if image.width in DRAWN_SIZES else {SIZE}
    readings = [_read_shapes(pixels, pictures[place], size) for size in sorted(drawn_at)]
    error, shapes = min(readings, key=lambda reading: reading[0])
    return None if error > MOST_DIFFERENT else Scene(shapes, grounds[place])


def _read_shapes(pixels: np.ndarray, ground: np.ndarray, drawn_at: int) -> tuple[float, tuple[Shape, ...]]:
    """The shapes in the cells, and how much the cell that differs the most differs from its shape or the ground."""
    kinds, masks = _shapes(drawn_at)
    worst, shapes = 0.0, []
    for index, cell in enumerate(CELLS):
        row, column = (11 + 21 * i for i in divmod(index, 3))
        window = (slice(row - REACH, row + REACH), slice(column - REACH, column + REACH))
        seen, under = pixels[window], ground[window]
        best, shape = float(np.abs(seen - under).mean()), None
        middle = seen[REACH - 1 : REACH + 1, REACH - 1 : REACH + 1].mean(axis=(0, 1))  # each shape covers it
        nearest = sorted(SHAPE_COLORS, key=lambda name: np.abs(np.array(SHAPE_COLORS[name]) - middle).sum())
        for name in nearest[:2]:
            drawn = under + masks * (np.array(SHAPE_COLORS[name], dtype=np.float32) - under)
            errors = np.abs(drawn - seen).mean(axis=(1, 2, 3))
            if errors.min() < best:
                best = float(errors.min())
                kind, size, offset = kinds[int(errors.argmin())]
                shape = Shape(kind, name, size, cell, offset)
        worst = max(worst, best)
        if shape is not None:
            shapes.append(shape)
    return worst, tuple(shapes)


def _either(words: Iterable[str], name: str) -> str:
    """A group of that name for one of the words."""
    return rf"(?P<{name}>{'|'.join(sorted(map(re.escape, words), key=len, reverse=True))})"


_WHERES = [words for cell in CELLS.values() for words in cell]
_NAME = rf"{_either(SHAPE_COLORS, 'COLOR')} {_either(SHAPE_KINDS, 'KIND')}"
_PATTERNS = {
    "old": rf"(?:{_either(SIZES, 'old_size')} )?{_NAME}(?: {_either(_WHERES, 'old_where')})?".replace(
        "COLOR", "old_color"
    ).replace("KIND", "old_kind"),
    "new": rf"an? (?:{_either(SIZES, 'new_size')} )?{_NAME}".replace("COLOR", "new_color").replace("KIND", "new_kind"),
    "color": _either(SHAPE_COLORS, "color"),
    "where": _either(_WHERES, "where"),
    "place": _either([words.split(" ", 1)[1] for words in _WHERES], "place"),
    "ground": rf"(?:a {_either(('vertical', 'horizontal'), 'direction')} gradient from"
    rf" {_either(GROUND_COLORS, 'start')} to {_either(GROUND_COLORS, 'end')}|(?:plain )?"
    + _either(GROUND_COLORS, "plain")
    + ")",
}


@lru_cache
def _orders() -> list[tuple[str, re.Pattern]]:
    """The kinds of edits, each with the words of one of its templates."""
    return [
        (
            kind,
            re.compile(re.escape(template).replace(r"\{", "{").replace(r"\}", "}").format(**_PATTERNS), re.IGNORECASE),
        )
        for kind in KINDS
        for template in TEMPLATES[kind]
    ]


def _understand(instruction: str) -> tuple[str, dict[str, str]] | None:
    """The kind of an edit and what it names, in lower case."""
    plain = " ".join(instruction.split()).rstrip(".!?").strip()
    for frame in FRAMES:
        before, after = frame.rstrip("?").split("{}")
        if plain.lower().startswith(before.lower()) and plain.lower().endswith(after.lower()):
            order = plain[len(before) : len(plain) - len(after)]
            for kind, pattern in _orders():
                if found := pattern.fullmatch(order):
                    return kind, {name: said.lower() for name, said in found.groupdict().items() if said}
    return None


def _cell(words: str) -> str:
    """The cell that is meant by "in the top left" or "the top left"."""
    return next(cell for cell, wheres in CELLS.items() if any(where.endswith(words) for where in wheres))


def _find(scene: Scene, said: dict[str, str]) -> Shape:
    """The shape that an instruction names."""
    looks = [f"{said['old_color']} {said['old_kind']}"]
    shapes = [shape for shape in scene.shapes if shape.name == looks[0]]
    if "old_size" in said:
        looks.insert(0, said["old_size"])
        shapes = [shape for shape in shapes if shape.size == said["old_size"]]
    if "old_where" in said:
        looks.append(said["old_where"])
        shapes = [shape for shape in shapes if shape.cell == _cell(said["old_where"])]
    if len(shapes) != 1:
        number = "no" if not shapes else "more than one"
        raise DesignError(f"There is {number} {' '.join(looks)} in the picture. It shows {list_shapes(scene)}.")
    return shapes[0]


def _check_free(scene: Scene, cell: str) -> str:
    """The cell, if no shape is in it."""
    if cell not in scene.free_cells():
        free = join_words([CELLS[cell][0] for cell in scene.free_cells()]) or "nowhere"
        raise DesignError(f"There is a shape {CELLS[cell][0]} already. There is room {free}.")
    return cell


def design_edit(image: Image.Image | None, instruction: str) -> str:
    """
    The true blueprint of a plain edit of the world, one of `EDIT_KINDS`, told as the world tells it.

    Args:
        image: A picture of the world in RGB.
        instruction: Such as "Paint the red circle blue."

    Raises:
        DesignError: The picture is none of the world, or the instruction is none that is known or names what is not
            in the picture; in words for the person who wrote it.
    """
    scene = None if image is None else read_scene(image)
    if scene is None:
        raise DesignError("This designer knows pictures of the embedded model's world of flat shapes only.")
    understood = _understand(instruction)
    if understood is None:
        raise DesignError(f"This designer understands plain edits of its world only, such as: {EXAMPLES}")
    kind, said = understood
    if not scene.shapes and kind not in ("add", "background"):
        raise DesignError("There is no shape in the picture.")
    if kind == "recolor":
        target, area = edits.recolor(scene, _find(scene, said), said["color"])
    elif kind == "remove":
        target, area = edits.remove(scene, _find(scene, said))
    elif kind == "add":
        cell = _check_free(scene, _cell(said["where"]))
        new = Shape(said["new_kind"], said["new_color"], said.get("new_size", "large"), cell)
        target, area = edits.add(scene, new)
    elif kind == "replace":
        old = _find(scene, said)
        if said.get("new_size", old.size) != old.size:
            raise DesignError(f"The {old.name} is {old.size}, and what takes its place is of its size.")
        target, area = edits.replace_shape(scene, old, said["new_color"], said["new_kind"])
    elif kind == "move":
        cell = _check_free(scene, _cell(said["where"] if "where" in said else said["place"]))
        target, area = edits.move(scene, _find(scene, said), cell)
    else:
        ground = Ground(said.get("plain") or said["start"], said.get("end"), said.get("direction", "vertical"))
        target, area = edits.change_ground(scene, ground)
    return write_blueprint(instruction, scene, target, area)


class ShapesDesigner(FunctionDesigner):
    """
    Writes the blueprints of plain edits of the picture world by rule, since the embedded model is too small to write
    any. To be used as `pipe.designer`.

    Args:
        on_failure: "error", or "instruction" to paint what it does not understand by the plain instruction.
    """

    def __init__(self, on_failure: str = "error"):
        super().__init__(design_edit, version="1", on_failure=on_failure)

    def __repr__(self) -> str:
        return "ShapesDesigner()"
