"""
ComfyUI's node contract without ComfyUI: loads a node pack from its folder, and checks and runs workflows in the API
format by the rules of its `execution.py`. Three of its own nodes are here, too, that read, save and show.
"""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image


WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


def load_pack(folder: Path) -> ModuleType:
    """The folder as a module, as `load_custom_node` imports it: by its path, of no package."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class InvalidWorkflow(ValueError):
    """What the server answers 400 to, a line for each problem."""


class Graph:
    """
    Runs workflows, and keeps what nodes gave between them.

    Args:
        nodes (`dict`): Node classes by name.
        folder (`Path`): Where pictures are read from and saved to.
    """

    def __init__(self, nodes: dict[str, type], folder: Path):
        self.nodes = {**nodes, **builtin_nodes(folder)}
        self.executed: list[str] = []
        self._kept: dict[str, tuple[Any, tuple]] = {}

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """What the output nodes show, by their ids; `executed` says which nodes ran."""
        problems = [problem for node_id in workflow for problem in self.check(workflow, node_id)]
        if problems:
            raise InvalidWorkflow("\n".join(problems))
        self.executed = []
        shown = {}
        for node_id, node in workflow.items():
            if getattr(self.nodes[node["class_type"]], "OUTPUT_NODE", False):
                shown[node_id] = self._get(workflow, node_id)
        return shown

    def check(self, workflow: dict[str, Any], node_id: str) -> list[str]:
        """What is wrong with a node's inputs; values of widgets are brought to their types, as the server does."""
        node = workflow[node_id]
        if node["class_type"] not in self.nodes:
            return [f"{node_id}: there is no node {node['class_type']}"]
        node_class, problems = self.nodes[node["class_type"]], []
        types = node_class.INPUT_TYPES()
        for group in ("required", "optional"):
            for name, (kind, *rest) in types.get(group, {}).items():
                extra = rest[0] if rest else {}
                if name not in node["inputs"]:
                    problems += [f"{node_id}.{name}: is required"] if group == "required" else []
                    continue
                value = node["inputs"][name]
                if isinstance(value, list):
                    source, slot = value
                    found = self.nodes[workflow[source]["class_type"]].RETURN_TYPES[slot]
                    if kind not in ("*", found):
                        problems.append(f"{node_id}.{name}: takes {kind}, but is given {found}")
                elif isinstance(kind, list):
                    problems += [] if value in kind else [f"{node_id}.{name}: {value!r} is not in {kind}"]
                elif kind not in WIDGETS or extra.get("forceInput"):
                    problems.append(f"{node_id}.{name}: takes a wire of {kind}, but is given {value!r}")
                else:
                    value = node["inputs"][name] = WIDGETS[kind](value)
                    if value < extra.get("min", value) or value > extra.get("max", value):
                        problems.append(f"{node_id}.{name}: {value} is out of bounds")
        return problems

    def _get(self, workflow: dict[str, Any], node_id: str) -> tuple:
        node = workflow[node_id]
        node_class = self.nodes[node["class_type"]]
        types = node_class.INPUT_TYPES()
        known = {**types["required"], **types.get("optional", {})}
        inputs = {name: value for name, value in node["inputs"].items() if name in known}
        values = {
            name: self._get(workflow, value[0])[value[1]] if isinstance(value, list) else value
            for name, value in inputs.items()
        }
        widgets = {name: value for name, value in inputs.items() if not isinstance(value, list)}
        changed = node_class.IS_CHANGED(**widgets) if hasattr(node_class, "IS_CHANGED") else None
        wires = [
            (name, value[1], self._kept[value[0]][0]) for name, value in inputs.items() if isinstance(value, list)
        ]
        key = (node["class_type"], sorted(widgets.items()), wires, changed)
        if node_id not in self._kept or self._kept[node_id][0] != key:
            self.executed.append(node_id)
            result = getattr(node_class(), node_class.FUNCTION)(**values)
            self._kept[node_id] = (key, result)
        return self._kept[node_id][1]


def builtin_nodes(folder: Path) -> dict[str, type]:
    """ComfyUI's LoadImage, SaveImage and PreviewAny, on one folder."""

    class LoadImage:
        RETURN_TYPES, FUNCTION = ("IMAGE", "MASK"), "load_image"

        @classmethod
        def INPUT_TYPES(cls):
            names = sorted(path.name for path in folder.glob("*.png"))
            return {"required": {"image": (names, {"image_upload": True})}}

        @classmethod
        def IS_CHANGED(cls, image):
            return hashlib.sha256((folder / image).read_bytes()).hexdigest()

        def load_image(self, image):
            pixels = np.asarray(Image.open(folder / image).convert("RGB")).astype(np.float32) / 255.0
            return torch.from_numpy(pixels)[None], torch.zeros(1, 64, 64)

    class SaveImage:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "save_images", True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})}}

        def save_images(self, images, filename_prefix):
            paths = []
            for image in images:
                paths.append(folder / f"{filename_prefix}_{len(list(folder.glob('*.png'))):05}_.png")
                Image.fromarray(np.clip(255.0 * image.numpy(), 0, 255).astype(np.uint8)).save(paths[-1])
            return paths

    class PreviewAny:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "main", True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"source": ("*", {})}}

        def main(self, source):
            return source

    return {"LoadImage": LoadImage, "SaveImage": SaveImage, "PreviewAny": PreviewAny}


def to_api(workflow: dict[str, Any], nodes: dict[str, type]) -> dict[str, Any]:
    """A workflow of the editor's format in the API format, as its frontend makes it of wires and widgets' values."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    api = {}
    for node in workflow["nodes"]:
        types = nodes[node["type"]].INPUT_TYPES()
        known = {**types["required"], **types.get("optional", {})}
        inputs = {wire["name"]: links[wire["link"]] for wire in node["inputs"] if wire["link"] is not None}
        values = iter(node["widgets_values"])
        for name, (kind, *rest) in known.items():
            extra = rest[0] if rest else {}
            if (isinstance(kind, list) or kind in WIDGETS) and not extra.get("forceInput"):
                inputs[name] = next(values)
                for added in ("control_after_generate", "image_upload"):
                    if extra.get(added):
                        next(values)
        assert not list(values), f"{node['type']} has more values than widgets"
        api[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return api
