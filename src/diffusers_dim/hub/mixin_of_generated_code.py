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
"""Saves with pipelines that were loaded from generated code that same code. `mixin.py` is what the package has."""

import json
import os
import sys
from pathlib import Path
from typing import Any


class DIMHubMixin:
    """Saves a pipeline with the code that it and its components were loaded from, so that it loads as it did."""

    components: dict[str, Any]

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves `model_index.json`, and beside it the code that it names."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]
        path = Path(save_directory) / "model_index.json"
        index = json.loads(path.read_text(encoding="utf-8"))
        code = {"pipeline.py": Path(__file__)}
        index["_class_name"] = ["pipeline", type(self).__name__]
        for name, component in self.components.items():
            module = type(component).__module__
            if module.startswith("diffusers_modules."):
                file = Path(sys.modules[module].__file__)
                index[name] = [file.stem, type(component).__name__]
                code[f"{name}/{file.name}"] = file
        for name, file in code.items():
            (path.parent / name).parent.mkdir(exist_ok=True)
            (path.parent / name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
