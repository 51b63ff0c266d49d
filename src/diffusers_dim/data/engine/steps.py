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
What a judge is asked about a sample: Draw-In-Mind's three steps for edits (https://huggingface.co/papers/2509.01986,
section 3), and captions over many aspects of a picture.
"""

import json
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

from ...designers import Blueprint, BlueprintError, Conversation
from ...designers.blueprint import HEADS, strip_thoughts, without_pleasantry
from .records import EngineSample, Step


ASSESS_PROMPT = """\
You see two pictures: first the source, then the target, which was made from the source by an edit. The instruction \
that came with them is:

{instruction}

Compare the pictures closely: what was added, removed, replaced, moved, recoloured or restyled, and what stayed. Then \
judge how the instruction fits what really changed:

- fits: who follows it on the source gets the target. It says all that changed, and nothing that did not.
- partly: it is about what changed, but it is ambiguous, vague or incomplete, or asks for more than was done.
- misfits: something else changed, or nothing did.

Answer with exactly these three lines and nothing else:
Verdict: fits, partly or misfits
Reason: in one or two sentences, what really changed and how the instruction fits that
Edit type: in one or two words, such as add, remove, replace, recolor, move, resize, background, style or text"""

OPTIMISE_PROMPT = """\
You see two pictures: first the source, then the target, which was made from the source by an edit. The instruction \
that came with them is:

{instruction}
{assessment}
Write the instruction so that it says fully and only what changed: which thing, where it is if that could be \
mistaken, and what becomes of it, with all colours, numbers and words that can be seen. What stays is not to be \
mentioned. Speak to an editor who has only the source: use the imperative, in plain English, in one to three \
sentences. If the instruction does all that already, repeat it word for word.

Answer with the instruction alone: no heading, no quotes, no explanation."""

IMAGINE_PROMPT = f"""\
You see two pictures: first the source, then the target, which was made from the source by this edit:

{{instruction}}

Write the plan of this edit as a designer would have written it who has only the source and the instruction, and \
imagines the target. You know how it came out, so what you write has to be true of both pictures; but never speak of \
two pictures, of a target, or of a comparison. Write exactly these five numbered parts, in this order and under these \
headings, each in full sentences:

1. {HEADS[0]}: The instruction, word for word.
2. {HEADS[1]}: Name all key objects of the source and say where each of them is.
3. {HEADS[2]}: Describe the shape, colour, texture and state of each of these objects, before the edit.
4. {HEADS[3]}: Say which objects or regions change, and where in the picture they are. All else stays as it is.
5. {HEADS[4]}: Describe how the whole picture looks after the edit, with stress on the changed areas.

Write nothing before, between or after these five parts: no comment, no greeting, no summary."""

CAPTION_PROMPT = """\
Describe the picture for a painter who has to paint it without seeing it. Say only what can be seen; guess at \
nothing, name no feeling that the picture does not show, and do not write "the image shows".
{notes}
Write {wanted}

{layout}

Write nothing else."""

# What captions tell of, each with what is asked about it.
ASPECTS = {
    "Objects": "Which things, beings and people are there?",
    "Counts": "How many are there of each kind?",
    "Attributes": "Which shape, size, age, clothing and state do they have?",
    "Colors": "Which colours do they and their parts have?",
    "Materials": "What are they made of, and how do their surfaces look?",
    "Actions": "What do beings do, how do they stand and look, and what moves?",
    "Spatial relations": "Where in the picture is each of them, and how do they lie to each other?",
    "Text": "Which words and numbers can be read, where, and in which lettering? Quote them exactly.",
    "Background": "What is behind and around them: place, landscape, room, weather, season, time of day?",
    "Style": "Is it a photograph, a painting, a drawing, a rendering, a chart or a screen, and of which manner?",
    "Light": "Where does light come from, how hard is it, and where are shadows, reflections and highlights?",
    "Palette": "Which colours rule the whole picture, and with what contrast and saturation?",
    "Camera": "From which angle and distance is it seen, how is it framed, and what is in focus?",
    "Composition": "How are the weights laid out, where does the eye go first, and what is left empty?",
    "Mood": "Which mood do scene, light and colours make?",
}

VERDICTS = ("fits", "partly", "misfits")
MAX_INSTRUCTION_WORDS = 200

# Every repeat is bounded, so that hostile text costs little.
_VERDICT = re.compile(r"[\W_]{0,8}(?:" + "|".join(VERDICTS) + r")\b", re.IGNORECASE)
_SEVERAL_VERDICTS = re.compile(
    rf"\b(?:{'|'.join(VERDICTS)})[\"'\s]*(?:[|/,]|\bor\b)[\"'\s]*(?:or\s+)?[\"']?(?:{'|'.join(VERDICTS)})\b",
    re.IGNORECASE,
)
_VERDICT_END = re.compile(r"[.;:(（–—\n|]|\s-\s")
# The first that is found in the verdict's own words; not "fits" in "does not fit", nor that in "does not fully fit".
_VERDICT_WORDS = (
    ("misfits", r"^\W*(?:mis\W?(?:fit|match)|no\b)"),
    (
        "partly",
        r"\bpart(?:ly|ial)|\bin part\b|ambig|incomplete|vague|imprecise|unclear|mostly|somewhat|\bbut\b|"
        r"(?:not|n['’]t)\s+(?:\w+\s+){0,2}(?:fully|entirely|completely|quite|wholly|exactly)",
    ),
    (
        "misfits",
        r"mis\W?(?:fit|match)|unfit|(?:not|n['’]t)\s+(?:\w+\s+)?(?:fit|match|correspond|describe|agree|follow|correct)|"
        r"wrong|incorrect|unrelated|inaccurate|inconsistent|contradict|false",
    ),
    ("fits", r"\bfit|match|\bcorrect|\baccurate|\bconsistent|\byes\b|\btrue\b|agree"),
)
_ASSESSMENT = {
    "verdict": r"(?:(?:final|overall)\s)?(?:verdict|assessment|judge?ment|rating|answer)",
    "reason": r"reason(?:ing)?|explanation|rationale|justification",
    "edit type": r"edit\s?type|type(?:\sof\sedit)?|edit\scategory|category",
}
_INSTRUCTION = {
    "given": r"(?:original|given|old|current|source)\s(?:edit\s)?instruction",
    "instruction": (
        r"(?:(?:better|improved|optimi[sz]ed|rewritten|revised|new|final|updated)\s)?(?:edit(?:ing)?\s)?instruction"
    ),
    "comment": r"reason(?:ing)?|explanation|rationale|notes?|changes(?:\smade)?|why|justification",
}
_REFUSAL = re.compile(
    r"\W{0,4}(?:i['’]?m\s+(?:sorry|unable|not able)|i\s+(?:can\s?not|can['’]t|am\s+(?:sorry|unable|not able))|sorry\b|"
    r"unfortunately\b|as an ai\b)",
    re.IGNORECASE,
)
_NO_INSTRUCTION = re.compile(
    r"[{\[]|(?:i\b|the\s+(?:\w+\s+)?(?:instruction|edit|target|source)\b|(?:no|un)\s?chang|same\b|n/?a\b|none\b|here\b|"
    r"sure\b)",
    re.IGNORECASE,
)
# "Pictures" and "photos" may hang on a wall in it.
_OF_THE_PAIR = re.compile(
    r"\b(?:target\s+(?:picture|image|photo)|(?:second|2nd|both|two)\s+images?|(?:picture|image)\s+[2b])\b",
    re.IGNORECASE,
)
_NOTHING_SEEN = re.compile(
    r"(?:none|n/?a|nothing|not applicable)\b.{0,40}|(?:there (?:is|are) )?no(?:t any)?\s.{0,40}", re.IGNORECASE
)


def _fill(prompt: str, **values: str) -> str:
    """A prompt with its names in braces replaced, in one pass: what is put in may have braces, too."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), prompt)


def _unmark(text: str) -> str:
    """A value without the emphasis, bars and quotes that a label's line leaves on it."""
    text = re.sub(r"^[|*_`\s]+|[|*_`\s]+$", "", text)
    quoted = re.fullmatch(r"([\"'])([^\"]*)\1[,}\]\s]{0,8}|[“‘](.*)[”’]", text, re.DOTALL)
    return next((part.strip() for part in quoted.groups()[1:] if part), "") if quoted else text


def _plain(text: str) -> str:
    """One paragraph: without line breaks, rulers, marks of lists and emphasis."""
    marks = r"^\s*(?:(?:[-*•>]|#{1,6}|\d{1,2}[.)])\s+|[-*_=—]{3,}\s*$)"
    lines = (re.sub(marks, "", line) for line in text.split("\n"))
    return _unmark(" ".join(re.sub(r"\*\*|__|`", "", " ".join(lines)).split()))


def _sections(text: str, labels: Mapping[str, str], needed: set[str]) -> dict[str, str]:
    """
    What stands under each label of an answer, and as "" before the first. The last counts of those that come twice.

    Args:
        text (`str`): An answer without thoughts: JSON, or labels with colons, as headings, in bold, in a table.
        labels (`Mapping[str, str]`):
            How each label is written: a regular expression without groups of its own, blanks as `\\s`.
        needed (`set[str]`): For what of them lines are broken up, if it is not found at a line's beginning.
    """
    found: dict[str, str] = {}
    for place in islice(re.finditer(r"\{", text), 64):
        try:
            value, _ = json.JSONDecoder(strict=False).raw_decode(text, place.start())
        except (ValueError, RecursionError):
            continue
        for key, item in value.items():
            words = " ".join(re.sub(r"[\W_]+", " ", key).split())
            name = next((name for name, label in labels.items() if re.fullmatch(label, words, re.IGNORECASE)), None)
            if name is not None and not isinstance(item, dict):
                items = item if isinstance(item, list) else [item]
                found[name] = ", ".join(part if isinstance(part, str) else json.dumps(part) for part in items).strip()
    if found:
        return found

    one_of = "|".join(f"({label})" for label in labels.values()).replace(r"\s", r"[\s_-]")
    head = re.compile(
        rf"^[^\w\n]{{0,12}}(?:\d{{1,2}}[.)][^\w\n]{{0,6}})?(?:{one_of})(?:[ \t*_\"'`\]]{{0,6}}\([^()\n]{{1,80}}\))?"
        rf"[ \t*_\"'`\]]{{0,6}}(?:[:：=|]|[-–—](?=\s)|$)",
        re.IGNORECASE | re.MULTILINE,
    )
    inside = re.compile(rf"(?<=[\s{{|])(?<!\n)[*_\"']{{0,3}}(?:{one_of})(?=[*_\"'\s]{{0,4}}[:：=])", re.IGNORECASE)
    for reading in (text, inside.sub(r"\n\g<0>", text)):  # all in one line, as small models write
        heads = list(head.finditer(reading))
        sections = {"": reading[: heads[0].start()] if heads else reading}
        for match, following in zip(heads, [*heads[1:], None]):
            if said := _unmark(reading[match.end() : following.start() if following else None]):
                sections[list(labels)[match.lastindex - 1]] = said
        if len(needed & set(sections)) > len(needed & set(found)) or not found:
            found = sections
        if needed <= set(found):
            break
    return found


def _answer(text: str) -> str:
    text = without_pleasantry(strip_thoughts(text))
    if not text:
        raise ValueError("there is no answer.")
    if _REFUSAL.match(text):
        raise ValueError("it is a refusal.")
    return text


def _pair(prompt: str, sample: EngineSample, **values: str) -> Conversation:
    if sample.source is None:
        raise ValueError(f"{sample.id!r} has no source picture: edits need two pictures.")
    source, target = sample.shown
    return Conversation((_fill(prompt, **values),), source, sample.instruction, (target,))


class _PromptedStep(Step):
    """
    A step with a prompt, which is among its settings; a subclass may have another.

    Attributes:
        prompt (`str`): What the judge is asked.
    """

    prompt: str
    version = 2  # the first one showed JPEGs made of the files

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"prompt": self.prompt}


class Assess(_PromptedStep):
    """
    How the instruction fits what really changed between the pictures. Columns: `assessment` ("fits"; "partly" for one
    that is ambiguous or incomplete; "misfits", which drops the sample), `assessment_reason` and `edit_type` (a word
    or two in lower case, "" if the judge names none).
    """

    name = "assess"
    prompt = ASSESS_PROMPT

    def conversation(self, sample: EngineSample) -> Conversation:
        return _pair(self.prompt, sample, instruction=sample.instruction.strip())

    def read(self, text: str, sample: EngineSample) -> dict[str, Any]:
        text = _answer(text)
        if _VERDICT.match(text):  # the word alone, without its label
            text = f"Verdict: {text}"
        found = _sections(text, _ASSESSMENT, set(_ASSESSMENT))
        if "verdict" not in found:
            raise ValueError('it has no line "Verdict: ...".')
        verdict, rest = _read_verdict(found["verdict"])
        reason = _plain(found.get("reason", "")) or rest
        if not reason and verdict != "fits":
            raise ValueError('it has no line "Reason: ...".')
        edit_type = re.split(r"[,;.(/|\n]", found.get("edit type", ""))[0]
        return {
            "assessment": verdict,
            "assessment_reason": reason,
            "edit_type": " ".join(re.sub(r"[^\w\s-]|_", " ", edit_type).lower().split()[:3]),
        }

    def drop_reason(self, sample: EngineSample, columns: dict[str, Any]) -> str | None:
        return f"misfits: {columns['assessment_reason']}" if columns["assessment"] == "misfits" else None


def _read_verdict(text: str) -> tuple[str, str]:
    """One of `VERDICTS`, and what is said after it."""
    text = _plain(text.replace("\\boxed", "")).strip("([{ ")
    words, *rest = _VERDICT_END.split(text, maxsplit=1)
    if not _SEVERAL_VERDICTS.search(text):
        for verdict, pattern in _VERDICT_WORDS:
            if re.search(pattern, words, re.IGNORECASE):
                return verdict, "".join(rest).strip(" )*_-")
    raise ValueError(f"its verdict is {text[:80]!r}, but has to be one of {', '.join(VERDICTS)}.")


class Optimise(_PromptedStep):
    """
    The instruction, so that it says fully and only what changed. Column: `better_instruction`, one paragraph; a judge
    may repeat one that says it already. Reads `assessment` and `assessment_reason`, if they are there.
    """

    name = "optimise"
    prompt = OPTIMISE_PROMPT

    def conversation(self, sample: EngineSample) -> Conversation:
        verdict, reason = (sample.columns.get(name, "") for name in ("assessment", "assessment_reason"))
        assessment = f"\nIt was judged: {verdict}. {reason}\n" if verdict else ""
        return _pair(self.prompt, sample, instruction=sample.instruction.strip(), assessment=assessment)

    def read(self, text: str, sample: EngineSample) -> dict[str, Any]:
        found = _sections(_answer(text), _INSTRUCTION, {"instruction"})
        instruction = _plain(found.get("instruction") or _first_paragraph(found.get("", "")))
        # In the same line only after a sentence's end: "Notes: buy milk" may be what the instruction wants written.
        instruction = re.split(rf"(?<=[.!?])\s+(?:{_INSTRUCTION['comment']}):\s", instruction, flags=re.IGNORECASE)[0]
        if not instruction:
            raise ValueError("there is no instruction.")
        repeated = instruction.casefold() == _plain(sample.instruction).casefold()
        if not repeated and (_REFUSAL.match(instruction) or _NO_INSTRUCTION.match(instruction)):
            raise ValueError(f"{instruction[:80]!r} is no instruction in the imperative.")
        if (count := len(instruction.split())) > MAX_INSTRUCTION_WORDS:
            raise ValueError(f"it has {count} words, but an instruction has at most {MAX_INSTRUCTION_WORDS}.")
        letters = [char for char in instruction if char.isalpha()]
        if 2 * sum(char.isascii() for char in letters) < len(letters) or not letters:
            raise ValueError("it is not in English.")
        Blueprint(instruction, "x", "x", "x", "x")  # raises where it cannot be the first part of one
        return {"better_instruction": instruction}

    def depends_on(self, sample: EngineSample) -> Any:
        return [sample.columns.get(name) for name in ("assessment", "assessment_reason")]


def _first_paragraph(text: str) -> str:
    """Without an announcement before it ("Here it is:"), and without what is explained after it."""
    lines = text.strip().split("\n")
    if len(lines) > 1 and lines[0].rstrip("*_ ").endswith(":"):
        lines = lines[1:]
    return re.split(r"\n\s*\n", "\n".join(lines).strip())[0]


class Imagine(_PromptedStep):
    """
    The blueprint, by the four-step imagination under the better instruction. Column: `prompt`, a [`Blueprint`]'s text.

    Its first part is the better instruction, whatever the judge made of it: that is what optimise was for, and a
    judge's second wording could differ from it. Where there is none, as without that step, the judge's own stays. A
    blueprint that speaks of the pair, as a designer with the source alone could not, is refused.
    """

    name = "imagine"
    prompt = IMAGINE_PROMPT

    def conversation(self, sample: EngineSample) -> Conversation:
        instruction = sample.columns.get("better_instruction") or sample.instruction
        return _pair(self.prompt, sample, instruction=instruction.strip())

    def read(self, text: str, sample: EngineSample) -> dict[str, Any]:
        better = sample.columns.get("better_instruction")
        try:
            blueprint = Blueprint.parse(text)
        except BlueprintError as error:
            if error.missing != [HEADS[0]] or not better:
                raise
            blueprint = Blueprint.parse(f"1. {HEADS[0]}: {better}\n{strip_thoughts(text)}")
        if better:
            blueprint = Blueprint(better, *blueprint.parts[1:])
        if pair := _OF_THE_PAIR.search("\n".join(blueprint.parts[1:])):
            raise ValueError(f"it speaks of {pair[0]!r}, but a designer has the source alone.")
        return {"prompt": str(blueprint)}

    def depends_on(self, sample: EngineSample) -> Any:
        return sample.columns.get("better_instruction")


EDIT_STEPS = (Assess, Optimise, Imagine)


class Caption(_PromptedStep):
    r"""
    A long caption over many aspects of a picture: the judge writes a paragraph about each, and then merges them.
    Columns: `aspects` (its paragraphs by aspect, without those that the picture has nothing of, after those of earlier
    steps, see [`caption_steps`]) and, if it merges, `prompt`.

    With 15 aspects a judge writes some 1,500 tokens, so that its `max_new_tokens` has to be 4096 or so.

    Args:
        aspects (`Mapping[str, str]`, *optional*): What is asked about each aspect; `ASPECTS` by default.
        merge (`"judge"`, `"join"` or `None`, defaults to `"judge"`):
            The judge writes the caption after the paragraphs; or it is the paragraphs, one after the other; or there
            is none yet.
        name (`str`, defaults to "caption"): Of the step.

    Raises:
        ValueError: If there is nothing to ask, or an aspect's name is no plain words.
    """

    prompt = CAPTION_PROMPT

    def __init__(
        self,
        aspects: Mapping[str, str] | None = None,
        merge: Literal["judge", "join"] | None = "judge",
        name: str = "caption",
    ):
        self.aspects = dict(ASPECTS if aspects is None else aspects)
        if merge not in ("judge", "join", None):
            raise ValueError(f'`merge` has to be "judge", "join" or None, but is {merge!r}.')
        if not self.aspects and merge != "judge":
            raise ValueError("`aspects` is empty: name at least one.")
        for aspect in self.aspects:
            if not re.fullmatch(r"[^\W_]+(?:[ -][^\W_]+)*", aspect) or aspect.lower() == "caption":
                raise ValueError(f'An aspect has to be plain words and not "caption", but one is {aspect!r}.')
        self.merge = merge
        self.name = name

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"aspects": list(self.aspects.items()), "merge": self.merge}

    def conversation(self, sample: EngineSample) -> Conversation:
        earlier = sample.columns.get("aspects", {}) if self.merge == "judge" else {}
        notes = "".join(f"\n{aspect}: {said}" for aspect, said in earlier.items())
        parts, layout = [], [f"{aspect}: {question}" for aspect, question in self.aspects.items()]
        if self.aspects:
            parts.append(
                "one paragraph about each of these aspects, headed by its name and a colon as here, and the word none"
                " where the picture has nothing of it"
            )
        if self.merge == "judge":
            parts.append(
                "one long paragraph in fluent English, headed by Caption and a colon, which merges all of this without"
                " saying anything twice"
            )
            layout.append("Caption: The whole picture, from what matters most to the details.")
        prompt = _fill(
            self.prompt,
            notes=f"\nThis was seen already:\n{notes}\n" if notes else "",
            wanted=f"{', and after them '.join(parts)}:",
            layout="\n".join(layout),
        )
        return Conversation((prompt,), sample.shown[-1])

    def read(self, text: str, sample: EngineSample) -> dict[str, Any]:
        labels = {aspect: re.escape(aspect).replace(r"\ ", r"\s").replace(r"\-", r"\s") for aspect in self.aspects}
        needed = set(labels)
        if self.merge == "judge":
            labels["caption"], needed = r"(?:(?:final|merged|full|long)\s)?caption", {"caption"}
        text = _answer(text)
        found = _sections(text, labels, needed)
        if not self.aspects and "caption" not in found:
            found["caption"] = text
        missing = [aspect for aspect in self.aspects if aspect not in found]
        if 2 * len(missing) > len(self.aspects):
            raise ValueError(f"it has no paragraph about {', '.join(missing)}.")
        said = {aspect: _plain(found[aspect]) for aspect in self.aspects if aspect in found}
        aspects = {
            **sample.columns.get("aspects", {}),
            **{aspect: words for aspect, words in said.items() if not _NOTHING_SEEN.fullmatch(words)},
        }
        columns: dict[str, Any] = {"aspects": aspects}
        if self.merge is not None:
            caption = " ".join(aspects.values()) if self.merge == "join" else _plain(found.get("caption", ""))
            if not caption or _REFUSAL.match(caption):
                raise ValueError('it has no "Caption: ...".' if self.merge == "judge" else "nothing was seen.")
            columns["prompt"] = caption
        return columns

    def depends_on(self, sample: EngineSample) -> Any:
        # Also where they are not read: they are in the answer's columns.
        return list(sample.columns.get("aspects", {}).items())


def caption_steps(
    aspects: Mapping[str, str] | None = None,
    group_size: int | None = None,
    merge: Literal["judge", "join"] = "judge",
) -> list[Caption]:
    """
    The steps of a caption: all aspects in one call, or some at a time, for judges that tell more when asked less.

    Args:
        aspects (`Mapping[str, str]`, *optional*): What is asked about each; `ASPECTS` by default.
        group_size (`int`, *optional*): How many aspects a call; all in one by default.
        merge (`"judge"` or `"join"`, defaults to `"judge"`):
            Of several calls' paragraphs the judge makes the caption in a call of its own, or they are joined.
    """
    items = list((ASPECTS if aspects is None else aspects).items())
    if group_size is not None and group_size < 1:
        raise ValueError(f"`group_size` has to be at least 1, but is {group_size}.")
    if group_size is None or group_size >= len(items):
        return [Caption(aspects, merge)]
    groups = [dict(items[start : start + group_size]) for start in range(0, len(items), group_size)]
    steps = [Caption(group, None, f"caption-{place}") for place, group in enumerate(groups, 1)]
    return [*steps, Caption({}, "judge")] if merge == "judge" else [*steps[:-1], Caption(groups[-1], "join")]
