"""
Runs a script of diffusers' `examples` with its options: `python run_stock_script.py SCRIPT --option ...`.

Those scripts prepare pictures with torchvision, which does not import beside a CPU build of torch. Where it is not
installed, a stand-in makes tensors of pictures that have the asked size already.
"""

import importlib.util
import runpy
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import diffusers.image_processor  # noqa: F401
import numpy as np
import torch
import transformers.image_utils  # noqa: F401


class Compose:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, picture):
        for step in self.steps:
            picture = step(picture)
        return picture


def to_tensor():
    return lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def normalize(mean, std):
    return lambda pixels: (pixels - mean[0]) / std[0]


def as_it_is(*args, **kwargs):
    return lambda picture: picture


def add_stand_in() -> None:
    # diffusers and transformers, imported above, have looked for torchvision and go on without it.
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        sys.modules[name] = importlib.util.module_from_spec(ModuleSpec(name, None))
    torchvision, transforms, functional = (sys.modules[name] for name in names)
    torchvision.transforms = transforms
    transforms.functional = functional
    transforms.Compose, transforms.ToTensor, transforms.Normalize = Compose, to_tensor, normalize
    transforms.Resize = transforms.CenterCrop = transforms.RandomHorizontalFlip = as_it_is
    transforms.Lambda = lambda function: function
    transforms.InterpolationMode = SimpleNamespace(BILINEAR="bilinear")
    functional.crop = None  # imported, and not called with --center_crop


if __name__ == "__main__":
    if importlib.util.find_spec("torchvision") is None:
        add_stand_in()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
