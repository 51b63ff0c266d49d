"""The picture world of the embedded model: a few flat shapes on a quiet ground, and edits of it told in English."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from PIL import Image, ImageDraw


EDIT_KINDS = ("recolor", "remove", "add", "replace", "move", "background")
# Drawn only when asked for: the embedded model was never taught it, so that a LoRA can be.
UNSEEN_EDIT_KINDS = ("resize",)
SHAPE_KINDS = ("circle", "square", "triangle", "star")
SHAPE_COLORS = {
    "red": (220, 30, 40),
    "green": (20, 150, 50),
    "blue": (30, 70, 230),
    "yellow": (250, 215, 20),
    "purple": (140, 30, 180),
    "orange": (250, 125, 10),
    "black": (15, 15, 15),
    "cyan": (20, 205, 225),
}
# Low saturation throughout, so that no gradient between two grounds comes near a shape's colour.
GROUND_COLORS = {
    "white": (252, 252, 252),
    "cream": (246, 230, 200),
    "pink": (252, 200, 215),
    "mint": (195, 238, 212),
    "lavender": (208, 200, 245),
    "gray": (150, 150, 155),
    "brown": (125, 92, 72),
    "slate": (75, 92, 115),
}
SIZES = {"small": 6, "large": 9}  # radii in pixels of a 64 pixel picture
# Each cell with the words that say where a thing is; the first is the blueprint's own.
CELLS = {
    "top left": ("in the top left", "in the top left corner"),
    "top": ("at the top",),
    "top right": ("in the top right", "in the top right corner"),
    "left": ("on the left side",),
    "center": ("in the center", "in the middle"),
    "right": ("on the right side",),
    "bottom left": ("in the bottom left", "in the bottom left corner"),
    "bottom": ("at the bottom",),
    "bottom right": ("in the bottom right", "in the bottom right corner"),
}
FORMS = {"circle": "round", "square": "four-sided", "triangle": "upright", "star": "five-pointed"}
MIN_SHAPES, MAX_SHAPES = 3, 6

TEMPLATES = {
    "recolor": (
        "recolor the {old} to {color}",
        "recolour the {old} in {color}",
        "paint the {old} {color}",
        "turn the {old} {color}",
        "make the {old} {color}",
        "change the {old} to {color}",
        "change the color of the {old} to {color}",
        "switch the color of the {old} to {color}",
        "give the {old} a new color: {color}",
        "fill the {old} with {color}",
    ),
    "remove": (
        "remove the {old}",
        "delete the {old}",
        "erase the {old}",
        "take away the {old}",
        "get rid of the {old}",
        "wipe out the {old}",
        "take the {old} out of the picture",
        "remove the {old} from the image",
        "make the {old} disappear",
    ),
    "add": (
        "add {new} {where}",
        "draw {new} {where}",
        "put {new} {where}",
        "place {new} {where}",
        "insert {new} {where}",
        "paint {new} {where}",
        "create {new} {where}",
        "{where}, add {new}",
        "{where}, draw {new}",
    ),
    "replace": (
        "replace the {old} with {new}",
        "replace the {old} by {new}",
        "swap the {old} for {new}",
        "exchange the {old} for {new}",
        "substitute the {old} with {new}",
        "change the {old} into {new}",
        "turn the {old} into {new}",
        "transform the {old} into {new}",
        "make the {old} become {new}",
    ),
    "move": (
        "move the {old} to {place}",
        "shift the {old} to {place}",
        "slide the {old} to {place}",
        "bring the {old} to {place}",
        "drag the {old} over to {place}",
        "relocate the {old} to {place}",
        "transfer the {old} to {place}",
        "take the {old} and put it {where}",
        "move the {old} so that it is {where}",
    ),
    "background": (
        "change the background to {ground}",
        "set the background to {ground}",
        "switch the background to {ground}",
        "replace the background with {ground}",
        "fill the background with {ground}",
        "make the background {ground}",
        "turn the background into {ground}",
        "change the background color to {ground}",
        "put {ground} behind the shapes",
    ),
    "resize": (
        "resize the {old} to {size}",
        "make the {old} {size}",
        "make the {old} {sizer}",
        "{verb} the {old}",
        "change the {old} to {size}",
        "change the size of the {old} to {size}",
        "switch the size of the {old} to {size}",
        "give the {old} a new size: {size}",
        "turn the {old} into a {size} one",
        "replace the {old} with a {size} one",
    ),
}
# The plain imperative three times: half of all instructions.
FRAMES = ("{}", "{}", "{}", "please {}", "{}, please", "could you {}?", "can you {}?", "I want you to {}")


@dataclass(frozen=True)
class Shape:
    """One flat shape: what it is, and its cell and offset from that cell's middle (x, y; pixels at size 64)."""

    kind: str
    color: str
    size: str
    cell: str
    offset: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """Colour and kind, "red circle": unique within a scene."""
        return f"{self.color} {self.kind}"

    @property
    def where(self) -> str:
        """The cell in the blueprint's words, "in the top left"."""
        return CELLS[self.cell][0]


@dataclass(frozen=True)
class Ground:
    """A plain ground, or a gradient from `color` (top or left) to `end` (bottom or right)."""

    color: str
    end: str | None = None
    direction: str = "vertical"

    @property
    def name(self) -> str:
        """In words: "plain pink" or "a vertical gradient from pink to white"."""
        return f"a {self.direction} gradient from {self.color} to {self.end}" if self.end else f"plain {self.color}"


@dataclass(frozen=True)
class Scene:
    """At most one shape a cell, and no two shapes of the same colour and kind."""

    shapes: tuple[Shape, ...]
    ground: Ground

    def render(self, size: int = 64) -> Image.Image:
        """Draw the scene, anti-aliased, as an RGB picture of `size` x `size` pixels."""
        image = _ground_image(self.ground, size).copy()
        for shape in self.shapes:
            row, column = divmod(list(CELLS).index(shape.cell), 3)
            radius = SIZES[shape.size] * size // 64
            x, y = ((11 + 21 * i + d) * size // 64 - radius for i, d in zip((column, row), shape.offset, strict=True))
            image.paste(SHAPE_COLORS[shape.color], (x, y), _shape_mask(shape.kind, radius))
        return image

    def free_cells(self) -> list[str]:
        """The cells that hold no shape, in reading order."""
        return [cell for cell in CELLS if cell not in {shape.cell for shape in self.shapes}]

    def free_names(self) -> list[tuple[str, str]]:
        """The (colour, kind) pairs that no shape of the scene has."""
        taken = {(shape.color, shape.kind) for shape in self.shapes}
        return [(c, k) for c in SHAPE_COLORS for k in SHAPE_KINDS if (c, k) not in taken]

    def caption(self) -> str:
        """All shapes, in reading order, and the ground, in one sentence."""
        return f"A picture of {_listing(self)} on {_article(self.ground.name)} background."


@dataclass(frozen=True)
class EditSample:
    """One edit: RGB pictures before and after, the instruction, the designer's five-part blueprint, the edit kind."""

    source: Image.Image
    target: Image.Image
    instruction: str
    blueprint: str
    kind: str


@lru_cache(maxsize=1024)
def _ground_image(ground: Ground, size: int) -> Image.Image:
    first, last = GROUND_COLORS[ground.color], GROUND_COLORS[ground.end or ground.color]
    ramp = Image.new("RGB", (size, 1) if ground.direction == "horizontal" else (1, size))
    end = size - 1
    ramp.putdata(
        [
            tuple((a * (end - i) + b * i + end // 2) // end for a, b in zip(first, last, strict=True))
            for i in range(size)
        ]
    )
    return ramp.resize((size, size), Image.Resampling.NEAREST)


@lru_cache(maxsize=256)
def _shape_mask(kind: str, radius: int) -> Image.Image:
    scale = 4
    r = radius * scale
    mask = Image.new("L", (2 * r, 2 * r))
    draw = ImageDraw.Draw(mask)
    if kind == "circle":
        draw.ellipse((0, 0, 2 * r - 1, 2 * r - 1), fill=255)
    elif kind == "square":
        inset = radius // 9 * scale  # whole pixels: crisp sides
        draw.rectangle((inset, inset, 2 * r - 1 - inset, 2 * r - 1 - inset), fill=255)
    elif kind == "triangle":
        draw.polygon(((r, 0), (2 * r - 1, 2 * r - 1), (0, 2 * r - 1)), fill=255)
    else:
        reach = [r * (1.0 if i % 2 == 0 else 0.45) for i in range(10)]
        turn = [math.pi * i / 5 for i in range(10)]
        # A five-pointed star is lower than wide: moved down a little, it fills its box.
        draw.polygon(
            [(r + d * math.sin(a), 1.05 * r - d * math.cos(a)) for d, a in zip(reach, turn, strict=True)], fill=255
        )
    return mask.resize((2 * radius, 2 * radius), Image.Resampling.BOX)


def _article(noun: str) -> str:
    if noun.startswith("a "):
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _listing(scene: Scene) -> str:
    ordered = sorted(scene.shapes, key=lambda shape: list(CELLS).index(shape.cell))
    items = [f"a {shape.size} {shape.name} {shape.where}" for shape in ordered]
    return ", ".join(items[:-1]) + f" and {items[-1]}"


def _random_ground(rng: random.Random) -> Ground:
    first, second = rng.sample(list(GROUND_COLORS), 2)
    if rng.random() < 0.5:
        return Ground(first)
    return Ground(first, second, rng.choice(("vertical", "horizontal")))


def _random_scene(rng: random.Random, most: int = MAX_SHAPES) -> Scene:
    count = rng.randint(MIN_SHAPES, most)
    cells = rng.sample(list(CELLS), count)
    names = rng.sample([(color, kind) for color in SHAPE_COLORS for kind in SHAPE_KINDS], count)
    shapes = tuple(
        Shape(kind, color, rng.choice(tuple(SIZES)), cell, (rng.randint(-1, 1), rng.randint(-1, 1)))
        for (color, kind), cell in zip(names, cells, strict=True)
    )
    return Scene(shapes, _random_ground(rng))


def _mention(shape: Shape, rng: random.Random) -> str:
    """A scene's shape in an instruction's words, sometimes with its size and sometimes with its place."""
    size = f"{shape.size} " if rng.random() < 0.3 else ""
    place = f" {rng.choice(CELLS[shape.cell])}" if rng.random() < 0.25 else ""
    return f"{size}{shape.name}{place}"


def _phrase(kind: str, words: dict[str, str], rng: random.Random) -> str:
    sentence = rng.choice(FRAMES).format(rng.choice(TEMPLATES[kind]).format(**words))
    if sentence[-1] != "?" and rng.random() < 0.6:
        sentence += "."
    first = sentence[0].upper() if rng.random() < 0.7 else sentence[0].lower()
    return first + sentence[1:]


# Each edit below returns the scene after it, the words that its templates need, and the blueprint's fourth part.
Edit = tuple[Scene, dict[str, str], str]


def _swap(scene: Scene, old: Shape, new: Shape) -> Scene:
    return replace(scene, shapes=tuple(new if shape is old else shape for shape in scene.shapes))


def _recolor(scene: Scene, rng: random.Random) -> Edit:
    old = rng.choice(scene.shapes)
    color = rng.choice([color for color, kind in scene.free_names() if kind == old.kind])
    area = f"The {old.name} {old.where} becomes {color}; its shape, size and place stay."
    return _swap(scene, old, replace(old, color=color)), {"old": _mention(old, rng), "color": color}, area


def _remove(scene: Scene, rng: random.Random) -> Edit:
    old = rng.choice(scene.shapes)
    area = f"The {old.name} {old.where} goes away; the background fills its place."
    return replace(scene, shapes=tuple(s for s in scene.shapes if s is not old)), {"old": _mention(old, rng)}, area


def _add(scene: Scene, rng: random.Random) -> Edit:
    color, kind = rng.choice(scene.free_names())
    new = Shape(kind, color, rng.choice(tuple(SIZES)), rng.choice(scene.free_cells()))
    words = {"new": f"a {new.size} {new.name}", "where": rng.choice(CELLS[new.cell])}
    area = f"The empty place {new.where} receives a {new.size} {new.name}."
    return replace(scene, shapes=(*scene.shapes, new)), words, area


def _replace(scene: Scene, rng: random.Random) -> Edit:
    old = rng.choice(scene.shapes)
    color, kind = rng.choice([name for name in scene.free_names() if name[1] != old.kind])
    new = replace(old, color=color, kind=kind)
    area = f"The {old.name} {old.where} becomes {_article(new.name)}; its size and place stay."
    return _swap(scene, old, new), {"old": _mention(old, rng), "new": _article(new.name)}, area


def _move(scene: Scene, rng: random.Random) -> Edit:
    old = rng.choice(scene.shapes)
    new = replace(old, cell=rng.choice(scene.free_cells()), offset=(0, 0))
    where = rng.choice(CELLS[new.cell])
    words = {"old": _mention(old, rng), "where": where, "place": where.split(" ", 1)[1]}
    area = f"The {old.name} leaves its place {old.where} and lands {new.where}; its size stays."
    return _swap(scene, old, new), words, area


def _background(scene: Scene, rng: random.Random) -> Edit:
    ground = scene.ground
    while ground == scene.ground:
        ground = _random_ground(rng)
    area = f"The whole background becomes {ground.name}; every shape stays."
    words = {"ground": ground.name if ground.end or rng.random() < 0.5 else ground.color}
    return replace(scene, ground=ground), words, area


def _resize(scene: Scene, rng: random.Random) -> Edit:
    old = rng.choice(scene.shapes)
    new = replace(old, size="small" if old.size == "large" else "large")
    sizer, verb = ("smaller", "shrink") if new.size == "small" else ("bigger", "enlarge")
    words = {"old": _mention(old, rng), "size": new.size, "sizer": sizer, "verb": verb}
    area = f"The {old.name} {old.where} becomes {new.size}; its shape, color and place stay."
    return _swap(scene, old, new), words, area


_EDITS: dict[str, Callable[[Scene, random.Random], Edit]] = {
    "recolor": _recolor,
    "remove": _remove,
    "add": _add,
    "replace": _replace,
    "move": _move,
    "background": _background,
    "resize": _resize,
}


def _blueprint(instruction: str, source: Scene, target: Scene, area: str) -> str:
    layout = ", ".join(f"{_article(shape.name)} {shape.where}" for shape in source.shapes)
    objects = ", ".join(f"a {shape.size} {FORMS[shape.kind]} {shape.name}" for shape in source.shapes)
    before, after = (f"The background is {scene.ground.name}." for scene in (source, target))
    return (
        f"1. Edit Instruction: {instruction}\n"
        f"2. Global Layout Perception: {len(source.shapes)} shapes: {layout}. {before}\n"
        f"3. Local Object Perception: All are flat and evenly filled: {objects}.\n"
        f"4. Edit Area Localization: {area}\n"
        f"5. Edited Image Imagination: The picture shows {_listing(target)}. {after}"
    )


def _check(count: int, size: int) -> None:
    if count < 1:
        raise ValueError(f"`count` is {count}, but must be at least 1.")
    if size < 32 or size % 8:
        raise ValueError(f"`size` is {size}, but must be a multiple of 8 and at least 32 pixels.")


def sample_edits(count: int, seed: int, size: int = 64, kinds: Sequence[str] | None = None) -> list[EditSample]:
    """Draw edits of the picture world.

    Args:
        count: How many, at least 1; the kinds take turns, then the order is shuffled.
        seed: The same seed gives the same samples on every platform.
        size: Side of the pictures in pixels, a multiple of 8 and at least 32.
        kinds: The edit kinds to draw from, some of `EDIT_KINDS` and `UNSEEN_EDIT_KINDS`; all of the former by default.

    Returns:
        `count` samples. What an edit does not name is the same, pixel for pixel, in source and target; a shape that is
        added or moved lies exactly in the middle of its cell, so the target follows from source and instruction.

    Raises:
        ValueError: `count`, `size` or a kind is outside what is allowed.
    """
    _check(count, size)
    kinds = EDIT_KINDS if kinds is None else tuple(kinds)
    if not kinds or not set(kinds) <= _EDITS.keys():
        raise ValueError(f"`kinds` is {list(kinds)}, but must name one or more of {', '.join(_EDITS)}.")
    rng = random.Random(seed)
    order = [kinds[i % len(kinds)] for i in range(count)]
    rng.shuffle(order)
    samples = []
    for kind in order:
        source = _random_scene(rng, MAX_SHAPES - 1 if kind == "add" else MAX_SHAPES)
        target, words, area = _EDITS[kind](source, rng)
        instruction = _phrase(kind, words, rng)
        blueprint = _blueprint(instruction, source, target, area)
        samples.append(EditSample(source.render(size), target.render(size), instruction, blueprint, kind))
    return samples


def sample_scenes(count: int, seed: int, size: int = 64) -> list[tuple[Image.Image, str]]:
    """Draw single pictures of the world, each with a caption that names its shapes and ground.

    Args:
        count: How many, at least 1.
        seed: The same seed gives the same pictures on every platform.
        size: Side of the pictures in pixels, a multiple of 8 and at least 32.

    Returns:
        `count` pairs of an RGB picture and its caption.

    Raises:
        ValueError: `count` or `size` is outside what is allowed.
    """
    _check(count, size)
    rng = random.Random(seed)
    scenes = [_random_scene(rng) for _ in range(count)]
    return [(scene.render(size), scene.caption()) for scene in scenes]
