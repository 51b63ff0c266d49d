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
"""Which pictures go together in one call of a pipeline."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar


Item = TypeVar("Item")


def make_batches(
    items: Iterable[Item], group_of: Callable[[Item], Any], batch_size: int
) -> list[tuple[Any, list[Item]]]:
    """Batches of items of one group each, such as a size, in the order of their first items."""
    groups: dict[Hashable, list[tuple[int, Item]]] = {}
    for place, item in enumerate(items):
        groups.setdefault(group_of(item), []).append((place, item))
    batches = [
        (group, members[start : start + batch_size])
        for group, members in groups.items()
        for start in range(0, len(members), batch_size)
    ]
    batches.sort(key=lambda batch: batch[1][0][0])
    return [(group, [item for _, item in members]) for group, members in batches]
