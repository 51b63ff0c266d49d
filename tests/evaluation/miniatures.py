"""Miniatures of the five benchmarks' data, in the layouts in which these were released, with prompts of our own."""

import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, Dinov2Config, Dinov2Model

from diffusers_dim.evaluation.shapes import write_held_out


IMGEDIT_TYPES = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
GEDIT_GROUPS = (
    *("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change"),
    *("subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer"),
)
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MJHQ_CATEGORIES = (
    *("animals", "art", "fashion", "food", "indoor", "landscape", "logo", "people", "plants", "vehicles"),
)

IMGEDIT_PROMPT = """\
How well was this {edit_type} edit done? The edit: <edit_prompt>. Give two whole numbers from 1 to 5, as in:
Brief reasoning: the cat is there
Prompt Compliance: 4
Visual Seamlessness: 3
"""
VIE_PROMPTS = '''\
_context_no_delimit = """You judge pictures. Answer in JSON alone: {"score": [...], "reasoning": "..."}"""
_context = "not used here"
_prompts_0shot_two_image_edit_rule = """From 0 to 10: two scores, of success and of overediting, as "score": [a, b]."""
_prompts_0shot_tie_rule_SC = """
The instruction: <instruction>"""
_prompts_0shot_rule_PQ = """From 0 to 10: two scores, of naturalness and of artifacts, as "score": [a, b]."""
'''


def draw(name, size=(80, 64)):
    """A picture of its own for each name."""
    rng = random.Random(name)
    image = Image.new("RGB", size, tuple(rng.choices(range(60, 256), k=3)))
    for _ in range(3):
        left, top = rng.randrange(size[0] - 24), rng.randrange(size[1] - 24)
        box = (left, top, left + rng.randrange(12, 24), top + rng.randrange(12, 24))
        ImageDraw.Draw(image).ellipse(box, fill=tuple(rng.choices(range(256), k=3)))
    return image


def encode(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def write_imgedit(folder, count=9):
    """`basic_edit.json`, `prompts.json` and the sources of `count` edits, type after type."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = {}
    for index in range(count):
        edit_type = IMGEDIT_TYPES[index % len(IMGEDIT_TYPES)]
        source = f"animal/{index:09}.jpg"
        path = folder / "singleturn" / source
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(f"imgedit {index}").save(path, quality=95)
        cases[str(1000 + index)] = {"id": source, "prompt": f"Make edit {index} of it.", "edit_type": edit_type}
    (folder / "basic_edit.json").write_text(json.dumps(cases, indent=4))
    prompts = {edit_type: IMGEDIT_PROMPT.replace("{edit_type}", edit_type) for edit_type in IMGEDIT_TYPES}
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=4))
    return folder


def write_gedit(folder, count=11):
    """A Parquet file of `count` edits in English, group after group, and as many in Chinese; and `vie_prompts.py`."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        for language, instruction in (("en", f"Change {index} in it."), ("cn", f"改变{index}。")):
            picture = encode(draw(f"gedit {index}"))
            rows.append(
                {
                    "key": f"{language}{index:030x}",
                    "task_type": GEDIT_GROUPS[index % len(GEDIT_GROUPS)],
                    "instruction": instruction,
                    "instruction_language": language,
                    "input_image": {"bytes": encode(draw(f"gedit {index}").resize((64, 64))), "path": "input.png"},
                    "input_image_raw": {"bytes": picture, "path": "raw.png"},
                    "Intersection_exist": index % 2 == 0,
                }
            )
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "train-00000-of-00001.parquet")
    (folder / "vie_prompts.py").write_text(VIE_PROMPTS, encoding="utf-8")
    return folder


def write_geneval(folder, count=6):
    """`evaluation_metadata.jsonl` of `count` prompts, tag after tag."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "tag": GENEVAL_TAGS[index % len(GENEVAL_TAGS)],
            "include": [{"class": "bench", "count": 1 + index}],
            "prompt": f"a photo of {1 + index} benches",
        }
        for index in range(count)
    ]
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_geneval_results(run):
    """What GenEval's evaluator writes about a run's pictures; half of them are correct."""
    rows = []
    for metadata in sorted((run / "pictures").glob("*/metadata.jsonl")):
        row = json.loads(metadata.read_text())
        for index, sample in enumerate(sorted(metadata.parent.glob("samples/*.png"))):
            found = {"tag": row["tag"], "prompt": row["prompt"], "correct": index % 2 == 0, "reason": ""}
            rows.append({"filename": str(sample), **found, "metadata": json.dumps(row), "details": "{}"})
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_mjhq(folder, count=20):
    """`meta_data.json` of `count` prompts, category after category, and the reference pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {}
    for index in range(count):
        key, category = f"{index:040x}", MJHQ_CATEGORIES[index % len(MJHQ_CATEGORIES)]
        rows[key] = {"category": category, "prompt": f"Picture {index}, of {category}, --ar 1:1"}
        path = folder / "mjhq30k_imgs" / category / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(f"mjhq {index}").save(path)
    (folder / "meta_data.json").write_text(json.dumps(rows))
    return folder


def write_shapes(folder, count=8):
    """Held-out edits of the picture world and their blueprints."""
    return write_held_out(folder, count, seed=5)


WRITERS = {
    "imgedit": write_imgedit,
    "gedit": write_gedit,
    "geneval": write_geneval,
    "mjhq": write_mjhq,
    "shapes": write_shapes,
}


def write_dino(folder):
    """A random DINOv2 model for pictures of 28x28 pixels."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    CLIPImageProcessorPil(crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def write_clip(folder):
    """A random CLIP model for pictures of 28x28 pixels, with 8 features."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 32},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder
