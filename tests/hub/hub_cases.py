"""What the tests of the Hub share."""

import numpy as np
import torch


REPO_ID = "me/shapes"
PROMPT = "A red circle on a table."


def paint_edit(pipe, edit) -> np.ndarray:
    """The picture that `without_package.py` paints, too."""
    generator = torch.Generator().manual_seed(1)
    return pipe(edit.source, edit.instruction, num_inference_steps=2, generator=generator, output_type="np").images
