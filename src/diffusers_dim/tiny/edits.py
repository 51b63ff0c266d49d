"""The picture world's plain edits: what each does, in words and in shapes."""

import random
from collections.abc import Callable
from dataclasses import replace

from diffusers_dim.tiny.scenes import (
    CELLS,
    FORMS,
    SIZES,
    Ground,
    Scene,
    Shape,
    add_article,
    list_shapes,
    random_ground,
)


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


def mention(shape: Shape, rng: random.Random) -> str:
    """A scene's shape in an instruction's words, sometimes with its size and sometimes with its place."""
    size = f"{shape.size} " if rng.random() < 0.3 else ""
    place = f" {rng.choice(CELLS[shape.cell])}" if rng.random() < 0.25 else ""
    return f"{size}{shape.name}{place}"


def phrase(frame: str, order: str, rng: random.Random) -> str:
    """An order in one of `FRAMES`, as people put it: with a capital and a full stop, or not."""
    sentence = frame.format(order)
    if sentence[-1] != "?" and rng.random() < 0.6:
        sentence += "."
    first = sentence[0].upper() if rng.random() < 0.7 else sentence[0].lower()
    return first + sentence[1:]


def word_order(kind: str, words: dict[str, str], rng: random.Random) -> str:
    """A plain edit's order, "paint the red circle blue"."""
    return rng.choice(TEMPLATES[kind]).format(**words)


# The scene after an edit, the words that its templates need, and the blueprint's fourth part.
Edit = tuple[Scene, dict[str, str], str]


def swap(scene: Scene, old: Shape, new: Shape) -> Scene:
    """The scene with another shape in an old one's place."""
    return replace(scene, shapes=tuple(new if shape is old else shape for shape in scene.shapes))


# Each of the first ones makes an edit that is chosen, and gives the scene after it and the blueprint's fourth part.
def recolor(scene: Scene, old: Shape, color: str) -> tuple[Scene, str]:
    """Another color for a shape."""
    area = f"The {old.name} {old.where} becomes {color}; its shape, size and place stay."
    return swap(scene, old, replace(old, color=color)), area


def remove(scene: Scene, old: Shape) -> tuple[Scene, str]:
    """A shape less."""
    area = f"The {old.name} {old.where} goes away; the background fills its place."
    return replace(scene, shapes=tuple(shape for shape in scene.shapes if shape is not old)), area


def add(scene: Scene, new: Shape) -> tuple[Scene, str]:
    """A shape more."""
    area = f"The empty place {new.where} receives a {new.size} {new.name}."
    return replace(scene, shapes=(*scene.shapes, new)), area


def replace_shape(scene: Scene, old: Shape, color: str, kind: str) -> tuple[Scene, str]:
    """Another shape in a shape's place, of its size."""
    new = replace(old, color=color, kind=kind)
    area = f"The {old.name} {old.where} becomes {add_article(new.name)}; its size and place stay."
    return swap(scene, old, new), area


def move(scene: Scene, old: Shape, cell: str) -> tuple[Scene, str]:
    """A shape in the middle of another cell."""
    new = replace(old, cell=cell, offset=(0, 0))
    area = f"The {old.name} leaves its place {old.where} and lands {new.where}; its size stays."
    return swap(scene, old, new), area


def change_ground(scene: Scene, ground: Ground) -> tuple[Scene, str]:
    """Another ground under all shapes."""
    return replace(scene, ground=ground), f"The whole background becomes {ground.name}; every shape stays."


# Each below draws an edit. Where there is a shape to choose, `old` is it, if given.
def _recolor(scene: Scene, rng: random.Random, old: Shape | None = None) -> Edit:
    old = old or rng.choice(scene.shapes)
    color = rng.choice([color for color, kind in scene.free_names() if kind == old.kind])
    target, area = recolor(scene, old, color)
    return target, {"old": mention(old, rng), "color": color}, area


def _remove(scene: Scene, rng: random.Random, old: Shape | None = None) -> Edit:
    old = old or rng.choice(scene.shapes)
    target, area = remove(scene, old)
    return target, {"old": mention(old, rng)}, area


def _add(scene: Scene, rng: random.Random, old: Shape | None = None) -> Edit:
    color, kind = rng.choice(scene.free_names())
    new = Shape(kind, color, rng.choice(tuple(SIZES)), rng.choice(scene.free_cells()))
    words = {"new": f"a {new.size} {new.name}", "where": rng.choice(CELLS[new.cell])}
    target, area = add(scene, new)
    return target, words, area


def _replace(scene: Scene, rng: random.Random, old: Shape | None = None) -> Edit:
    old = old or rng.choice(scene.shapes)
    color, kind = rng.choice([name for name in scene.free_names() if name[1] != old.kind])
    target, area = replace_shape(scene, old, color, kind)
    return target, {"old": mention(old, rng), "new": add_article(f"{color} {kind}")}, area


def _move(scene: Scene, rng: random.Random, old: Shape | None = None) -> Edit:
    old = old or rng.choice(scene.shapes)
    cell = rng.choice(scene.free_cells())
    where = rng.choice(CELLS[cell])
    words = {"old": mention(old, rng), "where": where, "place": where.split(" ", 1)[1]}
    target, area = move(scene, old, cell)
    return target, words, area


def _background(scene: Scene, rng: random.Random, old: Shape | None = None) -> Edit:
    ground = scene.ground
    while ground == scene.ground:
        ground = random_ground(rng)
    words = {"ground": ground.name if ground.end or rng.random() < 0.5 else ground.color}
    target, area = change_ground(scene, ground)
    return target, words, area


def _resize(scene: Scene, rng: random.Random, old: Shape | None = None) -> Edit:
    old = old or rng.choice(scene.shapes)
    new = replace(old, size="small" if old.size == "large" else "large")
    sizer, verb = ("smaller", "shrink") if new.size == "small" else ("bigger", "enlarge")
    words = {"old": mention(old, rng), "size": new.size, "sizer": sizer, "verb": verb}
    area = f"The {old.name} {old.where} becomes {new.size}; its shape, color and place stay."
    return swap(scene, old, new), words, area


EDITS: dict[str, Callable[..., Edit]] = {
    "recolor": _recolor,
    "remove": _remove,
    "add": _add,
    "replace": _replace,
    "move": _move,
    "background": _background,
    "resize": _resize,
}


def write_blueprint(instruction: str, source: Scene, target: Scene, area: str) -> str:
    """The five parts as a designer writes them who sees the source and knows the target."""
    layout = ", ".join(f"{add_article(shape.name)} {shape.where}" for shape in source.shapes)
    objects = ", ".join(f"a {shape.size} {FORMS[shape.kind]} {shape.name}" for shape in source.shapes)
    before, after = (f"The background is {scene.ground.name}." for scene in (source, target))
    return (
        f"1. Edit Instruction: {instruction}\n"
        f"2. Global Layout Perception: {len(source.shapes)} shapes: {layout}. {before}\n"
        f"3. Local Object Perception: All are flat and evenly filled: {objects}.\n"
        f"4. Edit Area Localization: {area}\n"
        f"5. Edited Image Imagination: The picture shows {list_shapes(target)}. {after}"
    )
