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
"""The five parts that a designer writes for the painter, and how they are read from what models really write."""

import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any


HEADS = (
    "Edit Instruction",
    "Global Layout Perception",
    "Local Object Perception",
    "Edit Area Localization",
    "Edited Image Imagination",
)

# Every repeat is bounded, or cannot be entered again after it failed, so that hostile text costs linear time.
_GAP = r"[\s_-]{0,3}"
_NAMES = "|".join(
    f"({name})"
    for name in (
        rf"edit(?:ed|ing)?{_GAP}instructions?",
        rf"global{_GAP}layout{_GAP}perceptions?",
        rf"local{_GAP}objects?{_GAP}perceptions?",
        rf"edit(?:ed|ing)?{_GAP}areas?{_GAP}locali[sz]ations?",
        rf"edit(?:ed|ing)?{_GAP}images?{_GAP}imaginations?",
    )
)
# A head: before its name no letters but a number's, behind it a sign that the name ends there. A quote, brace or angle
# bracket in front would be JSON or a tag, a bar a table.
_HEAD = re.compile(
    rf"(?:{_NAMES})"
    r"(?P<close>[\s*_#`\]】」]{0,8}(?:[(（][^()（）]{1,160}[)）][\s*_]{0,8})?)"
    r"(?P<end>[:：﹕]|[–—]|-{1,3}(?=\s|\Z)|\.(?=\s|\Z)|)",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:(?![\"“'‘<{/|])[\W\d_①-⑤]){0,24}"
    r"(?:(?:part|step|section)\s{0,3}\d[\W_]{0,6}|(?:[ivx]{1,3}|[一二三四五])[.)．、）][\W_]{0,6})?",
    re.IGNORECASE,
)
_HEAD_IN_A_LINE = re.compile(
    rf"(?<!\w)[*_(（]{{0,4}}(?:[1-5１-５][.)．、）]\s{{0,3}}[*_]{{0,3}})?(?:{_NAMES})(?=[*_\s]{{0,4}}[:：])",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"[<◁](/?)(?:seed:)?(?:think|thinking|thoughts?|reasoning)[>▷]", re.IGNORECASE)
_ANSWER = re.compile(r"<answer>", re.IGNORECASE)
_ANSWER_END = re.compile(r"</answer>", re.IGNORECASE)
_SPECIAL_TOKEN = re.compile(r"<\|\w{1,40}\|>|<end_of_turn>|</s>")
_FENCE = re.compile(r"(?:`{3,9}|~{3,9})[\w+.-]{0,20}")
_RULER_OR_TAG = re.compile(r"[-*_=~—]{3,}|</?[a-z][\w-]{0,40}>|", re.IGNORECASE)
_PLEASANTRY = re.compile(
    r"[\W_]{0,8}(?:(?:please )?(?:let me know|feel free to)|(?:i )?hope (?:this|that|it) |would you like |"
    r"if you(?:'d|’d| would) like|if you (?:need|want|have) (?:any|me|further|more|additional)|is there anything else|"
    r"希望这|如果您?(?:需要|有))",
    re.IGNORECASE,
)


class BlueprintError(ValueError):
    """
    A text is not a blueprint.

    Attributes:
        missing (`list[str]`): The heads of the parts that are missing, empty, there more than once or not allowed.
        text (`str`): The text.
    """

    def __init__(self, message: str, missing: Iterable[str] = (), text: str = ""):
        super().__init__(message)
        self.missing = list(missing)
        self.text = text


def strip_thoughts(text: str) -> str:
    """
    Takes from a model's answer what it wrote around it: `<think>...</think>` (all before a lone end and all after a
    lone beginning is thoughts, too), `<answer>` and what stands outside of it, special tokens such as
    `<|begin_of_box|>`, and the lines that begin and end blocks of code.

    Args:
        text (`str`): All that a model wrote.

    Returns:
        The answer; empty if there are only thoughts.
    """
    answer, _ = _unwrap(text)
    return "\n".join(line for line in answer.split("\n") if not _FENCE.fullmatch(line.strip())).strip()


def _unwrap(text: str) -> tuple[str, str]:
    """The answer in a text, and the thoughts that were begun last and never ended."""
    text = _unix(text)
    kept: list[str] = []
    start, thinking = 0, False
    for tag in _THOUGHT.finditer(text):
        if not tag[1]:
            if not thinking:
                kept.append(text[start : tag.start()])
                start, thinking = tag.end(), True
        else:
            # All before an end without a beginning is thoughts: some chat templates write the beginning themselves.
            if not thinking:
                kept.clear()
            start, thinking = tag.end(), False
    tail = text[start:]
    answer = _ANSWER.search(tail) if thinking else None
    if answer:
        tail, thinking = tail[answer.start() :], False
    if thinking:
        return _answer("".join(kept)), _answer(tail)
    return _answer("".join(kept) + tail), ""


def _answer(text: str) -> str:
    before, *answers = _ANSWER.split(text)
    inside = "\n".join(_ANSWER_END.split(answer)[0] for answer in answers or [before])
    if not inside.strip():
        inside = _ANSWER_END.sub("", _ANSWER.sub("", text))
    return _SPECIAL_TOKEN.sub("", inside).strip()


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_empty(line: str) -> bool:
    """Whether a line at the end of a part says nothing: it is blank, a ruler, or a tag that stands alone."""
    return bool(_RULER_OR_TAG.fullmatch(line.strip()))


def _trim(lines: list[str]) -> str:
    first, last = 0, len(lines)
    while first < last and _is_empty(lines[first]):
        first += 1
    while last > first and _is_empty(lines[last - 1]):
        last -= 1
    return "\n".join(lines[first:last]).strip()


def _head(line: str) -> tuple[int, str] | None:
    """The index of the part whose head a line begins with, and the rest of the line."""
    line = line.lstrip()
    if not line:
        return None
    lead = _LEAD.match(line)[0]
    match = _HEAD.match(line, len(lead))
    if match is None:
        return None
    end, rest = match["end"], line[match.end() :].lstrip()
    found = re.search(r"(\*{1,3}|_{1,3})(?=\S)", lead + ".")
    marks = found[0] if found and lead.count(found[0]) % 2 else ""
    closed = bool(marks) and marks in match["close"]
    if not end and rest and not closed:
        return None  # only mentioned
    if end == "." and not marks and not any(c.isdigit() for c in lead):
        return None
    if marks and not closed:
        # The emphasis ends behind the colon, or has the whole line.
        if rest.startswith(marks):
            rest = rest[len(marks) :].lstrip()
        elif rest.count(marks) % 2:
            rest = "".join(rest.rsplit(marks, 1))
    return next(index for index in range(len(HEADS)) if match[index + 1]), rest


def _sections(text: str) -> list[tuple[int, str]]:
    """All that stands under one of the five heads, in order."""
    sections: list[tuple[int, list[str]]] = []
    outside = True
    # Within a fenced block: whether it holds a head. Such a block is the answer, and what follows it is not.
    block: bool | None = None
    for line in text.split("\n"):
        head = _head(line)
        if head:
            index, rest = head
            # "### 1. Edit Instruction" and, below it, "**Edit Instruction:** ..." are one.
            if sections and sections[-1][0] == index and not _trim(sections[-1][1]):
                sections.pop()
            sections.append((index, [rest]))
            outside = False
            block = None if block is None else True
        elif _FENCE.fullmatch(line.strip()):
            outside = outside or block is True
            block = False if block is None else None
        elif not outside:
            sections[-1][1].append(line)
    return [(index, _body(lines)) for index, lines in sections]


def _body(lines: list[str]) -> str:
    if not lines[0]:  # the text begins below its head, perhaps indented
        lines = textwrap.dedent("\n".join(lines[1:])).split("\n")
    return _trim(lines)


def without_pleasantry(part: str) -> str:
    """A text without last paragraphs that are an offer or a wish ("Let me know...", "I hope this...")."""
    lines = part.split("\n")
    while len(lines) > 2 and _is_empty(lines[-2]) and _PLEASANTRY.match(lines[-1]):
        lines.pop()
        while _is_empty(lines[-1]):
            lines.pop()
    return "\n".join(lines)


def _choose(sections: list[tuple[int, str]], text: str) -> tuple[str, ...]:
    """The last complete set of five parts. A set ends where a head comes that it already has."""
    sets: list[dict[int, str]] = [{}]
    for index, part in sections:
        if part:
            if index in sets[-1]:
                sets.append({})
            sets[-1][index] = part
    for parts in reversed(sets):
        if len(parts) == len(HEADS):
            last = next(reversed(parts))
            parts[last] = without_pleasantry(parts[last])
            return tuple(parts[index] for index in range(len(HEADS)))

    found = [[part for index, part in sections if index == place] for place in range(len(HEADS))]
    wrong = {
        "missing": [head for head, parts in zip(HEADS, found) if not parts],
        "empty": [head for head, parts in zip(HEADS, found) if parts and not any(parts)],
        "more than once": [head for head, parts in zip(HEADS, found) if len([part for part in parts if part]) > 1],
    }
    said = "; ".join(f"{what}: {', '.join(heads)}" for what, heads in wrong.items() if heads)
    raise BlueprintError(
        f"the text is not a blueprint of five parts ({said}).",
        [head for head in HEADS if any(head in heads for heads in wrong.values())],
        text,
    )


def _from_json(text: str) -> str:
    """A JSON object whose keys are the heads, as they are or as names of fields, written as parts."""
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
        if len(found) == 1 and isinstance(inner := next(iter(found.values())), dict):
            found = inner
        parts = [(head[0], _said(value)) for key, value in found.items() if (head := _head(key))]
    except (ValueError, RecursionError):
        return ""
    return "\n".join(f"{HEADS[index]}:\n{part}" for index, part in parts)


def _said(value: Any) -> str:
    """A value of JSON as text: a list as its items, an object as its names and values."""
    if isinstance(value, list):
        return "\n".join(f"- {_said(item)}" for item in value)
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_said(item)}" for name, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _readings(text: str) -> Iterator[str]:
    answer, unended_thoughts = _unwrap(text)
    yield answer
    yield _from_json(answer)
    yield _HEAD_IN_A_LINE.sub(r"\n\g<0>", answer)  # all in one line, as small models write
    yield unended_thoughts
    yield _HEAD_IN_A_LINE.sub(r"\n\g<0>", unended_thoughts)


def _read(text: str) -> tuple[str, ...]:
    errors = []
    for reading in _readings(text):
        try:
            return _choose(_sections(reading), text)
        except BlueprintError as error:
            errors.append(error)
    raise min(errors, key=lambda error: len(error.missing))


def _layout(parts: Iterable[str]) -> str:
    return "\n".join(f"{place}. {head}: {part}" for place, (head, part) in enumerate(zip(HEADS, parts), 1))


class Blueprint(str):
    """
    A designer's plan of an edit, in five parts (Draw-In-Mind, https://huggingface.co/papers/2509.01986, section 3).
    As a string it is what the painter was trained on, one `"1. Edit Instruction: ..."` after the other.

    Args:
        edit_instruction (`str`): What is to be changed.
        global_layout_perception (`str`): All key objects and where they are.
        local_object_perception (`str`): Shape, colour, texture and state of each object.
        edit_area_localization (`str`): Which objects or regions change.
        edited_image_imagination (`str`): How the edited picture looks.

    A part may have several lines. Blanks, rulers (`---`) and lone tags at its ends are dropped.

    Attributes:
        parts (`tuple[str, ...]`): The five, in order.

    Raises:
        BlueprintError:
            If a part is empty, or would not be read back as it is: one with a line like the head of a part, with a
            fence of code, or with the tags of thoughts and answers.
    """

    parts: tuple[str, ...]

    def __new__(
        cls,
        edit_instruction: str,
        global_layout_perception: str,
        local_object_perception: str,
        edit_area_localization: str,
        edited_image_imagination: str,
    ) -> "Blueprint":
        given = (
            edit_instruction,
            global_layout_perception,
            local_object_perception,
            edit_area_localization,
            edited_image_imagination,
        )
        parts = tuple(_trim(_unix(part).split("\n")) for part in given)
        text = _layout(parts)
        if not all(parts) or not _survives(parts):
            # Each part alone, among parts that are surely good.
            frames = [
                tuple(part if i == place else "x" for i in range(len(HEADS))) for place, part in enumerate(parts)
            ]
            wrong = [head for head, frame in zip(HEADS, frames) if not all(frame) or not _survives(frame)]
            raise BlueprintError(
                f"{', '.join(wrong)}: a part must not be empty, nor hold a line like the head of a part, a fence of"
                " code, or a tag of thoughts or answers.",
                wrong,
                text,
            )
        blueprint = super().__new__(cls, text)
        object.__setattr__(blueprint, "parts", parts)
        return blueprint

    @classmethod
    def parse(cls, text: str) -> "Blueprint":
        """
        Reads a blueprint from what a model wrote: after its thoughts, within tags or fences, heads in bold or as
        headings, without numbers, with other punctuation, or as JSON. Where the five parts come several times, the
        last complete set counts. What stands before them, and an offer of further help after them, is dropped.

        Args:
            text (`str`): All that the model wrote.

        Raises:
            BlueprintError: If a part is missing, empty, or there more than once.
        """
        return text if isinstance(text, cls) else cls(*_read(text))

    def format(self) -> str:
        """The blueprint as a plain string."""
        return str(self)

    @property
    def edit_instruction(self) -> str:
        """What is to be changed."""
        return self.parts[0]

    @property
    def global_layout_perception(self) -> str:
        """All key objects and where they are."""
        return self.parts[1]

    @property
    def local_object_perception(self) -> str:
        """Shape, colour, texture and state of each object."""
        return self.parts[2]

    @property
    def edit_area_localization(self) -> str:
        """Which objects or regions change."""
        return self.parts[3]

    @property
    def edited_image_imagination(self) -> str:
        """How the edited picture looks."""
        return self.parts[4]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"A blueprint cannot be changed: {name!r} was to be set. Make a new one.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.parts

    def __repr__(self) -> str:
        fields = ", ".join(f"{head.lower().replace(' ', '_')}={part!r}" for head, part in zip(HEADS, self.parts))
        return f"{type(self).__name__}({fields})"


def _survives(parts: tuple[str, ...]) -> bool:
    try:
        return _read(_layout(parts)) == parts
    except BlueprintError:
        return False
