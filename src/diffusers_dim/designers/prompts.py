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
"""What designers are told: to write a blueprint, to mend one, and to rewrite a prompt for text-to-image."""

from .blueprint import HEADS


DESIGN_PROMPT = f"""\
You are the designer of a picture edit. Look at the picture and plan the edit that the instruction asks for, so that \
a painter who reads your plan can paint the edited picture.

Instruction: {{instruction}}

Write exactly these five numbered parts, in this order and under these headings, each in full sentences:

1. {HEADS[0]}: Say precisely and without ambiguity what is to be changed.
2. {HEADS[1]}: Name all key objects of the picture and say where each of them is.
3. {HEADS[2]}: Describe the shape, colour, texture and state of each of these objects.
4. {HEADS[3]}: Say which objects or regions change, and where they are. All else stays as it is.
5. {HEADS[4]}: Describe how the whole picture looks after the edit, with stress on the changed areas.

Write nothing before, between or after these five parts: no comment, no greeting, no summary."""

REPAIR_PROMPT = f"""\
That is not usable: {{problem}}

Write the whole plan once more, with exactly the five numbered parts "{'", "'.join(HEADS)}", in this order, each as \
"number. heading: text" and none of them empty. Write nothing else."""

REWRITE_PROMPT = """\
Rewrite this text-to-image prompt so that a painter knows what to paint. Keep all that it says: every object, \
number, colour, place, relation, style and every quoted word. Add what it leaves open: how the objects look, where \
they are, the background, the light and the style. Write one paragraph of plain English and nothing else.

Prompt: {prompt}"""

REWRITE_REPAIR_PROMPT = """\
That is not usable: {problem}

Write the rewritten prompt alone, as one paragraph of plain English, and nothing else."""
