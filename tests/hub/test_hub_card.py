"""Model cards: what those of released models tell, and what a check refuses."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from diffusers_dim import TINY_SHAPES, __version__
from diffusers_dim.evaluation.paper import PAPER
from diffusers_dim.hub.card import check_card, render_released_card, validate_model_card
from diffusers_dim.hub.facts import CITATION, INGREDIENTS, RELEASED, SPEED


REPOSITORY = Path(__file__).parents[2]
WHOLE = """---
license: mit
library_name: diffusers
pipeline_tag: image-to-image
base_model: me/base
---

# A model

It edits.

## Use

```python
pipe = load("<repository>")  # TODO is code, not the card's
```
"""


@pytest.fixture(params=list(RELEASED))
def released(request):
    return RELEASED[request.param]


def test_released_card_is_whole(released, tmp_path):
    render_released_card(released.name).save(tmp_path / "README.md")
    validate_model_card(tmp_path / "README.md")


def test_released_card_names_what_the_model_is_made_of(released):
    card = render_released_card(released.name, "me/mine")
    data = card.data
    assert data.library_name == "diffusers" and data.license == "other"
    assert data.pipeline_tag == {"edit": "image-to-image", "t2i": "text-to-image"}[released.kind]
    assert data.base_model == [
        released.repo_id,
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
        "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers",
    ]
    assert data.datasets == [INGREDIENTS[name].repo_id for name in released.datasets]
    licences = card.text[card.text.index("## Licences") :]
    for words in ("CC BY-NC 4.0", "Qwen Research License", "non-commercial", "NVIDIA License", "MIT", "Apache-2.0"):
        assert words in licences
    for section in ("Training", "Evaluation", "Speed and memory", "Limits", "Bias", "How to cite"):
        assert f"## {section}\n" in card.text


def test_released_card_says_how_to_load_it_both_ways(released):
    blocks = re.findall(r"```python\n(.*?)```", render_released_card(released.name, "me/mine").text, re.DOTALL)
    for block in blocks:
        compile(block, "card", "exec")
    assert f'{released.kind == "edit" and "DIMEditPipeline" or "DIMPipeline"}.from_pretrained("me/mine"' in blocks[0]
    assert "diffusers_dim" not in blocks[1] and 'from_pretrained("me/mine", trust_remote_code=True' in blocks[1]


def test_every_published_figure_is_in_the_card_with_its_judge(released):
    rows = [
        (benchmark, row)
        for benchmark, names in released.rows.items()
        for table in PAPER[benchmark]
        for row in table.rows
        if row.model in names
    ]
    card = render_released_card(released.name)
    assert [result.metric_value for result in card.data.eval_results] == [row.figures["overall"] for _, row in rows]
    assert all(re.search("judged by .", result.metric_name) for result in card.data.eval_results)
    for _, row in rows:
        assert re.search(rf"^\| .* {row.figures['overall']:.2f} \| [^|]+ \|$", card.text, re.MULTILINE)


def test_edit_card_has_the_papers_designers():
    names = [result.metric_name for result in render_released_card("DIM-4.6B-Edit").data.eval_results]
    assert names[0] == "ImgEdit overall, judged by GPT-4.1"
    assert names[-1] == "ImgEdit overall with GPT-4o as designer, judged by GPT-4.1"
    assert len(names) == 7


def test_speed_is_what_was_measured_and_the_rest_is_said_to_be_unmeasured(released):
    measured = json.loads((REPOSITORY / "benchmarks" / "results" / "cpu.json").read_text())["call"]
    part, own, stock = SPEED[released.kind]
    variants = measured["results"][part]["variants"]
    assert (own, stock) == tuple(round(variants[name]["median_seconds"], 2) for name in ("ours", "stock"))
    text = render_released_card(released.name).text
    setting = f"{measured['device']}, {measured['threads']} CPU threads, {measured['dtype']}: {measured['layers']} of"
    assert setting in text and f"{measured['size']} px, {measured['steps']} steps" in text
    assert "Time and memory of these weights were not measured" in text


def test_citation_is_that_of_the_repository():
    cited = (REPOSITORY / "CITATION.cff").read_text()
    number = re.search(r"arXiv:([\d.]+)", cited)[1]
    assert f"eprint = {{{number}}}" in CITATION and "International Conference on Learning Representations" in cited
    card = render_released_card("DIM-4.6B-Edit").text
    assert f"version = {{{__version__}}}" in card and f"version: {__version__}" in cited


def test_unknown_released_model_is_refused():
    with pytest.raises(ValueError, match=r"no released model 'DIM-9B': it has to be one of \['DIM-4.6B-T2I'"):
        render_released_card("DIM-9B")


def test_card_of_the_embedded_model_is_whole():
    validate_model_card(Path(TINY_SHAPES) / "README.md")


def test_template_of_the_repository_is_the_packages():
    assert (REPOSITORY / "model_card.md").read_text().startswith("---\n{{ card_data }}\n---")


def test_whole_card_passes():
    assert check_card(WHOLE) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("license: mit\n", "", "license: missing or empty"),
        ("library_name: diffusers\n", "library_name: ''\n", "library_name: missing or empty"),
        ("pipeline_tag: image-to-image\n", "", "pipeline_tag: missing or empty"),
        ("base_model: me/base\n", "base_model: []\n", "base_model: missing or empty"),
        ("base_model: me/base\n", "base_model: me/base\nlanguage:\n", "language: empty"),
        ("license: mit", "license: other", "license_name: missing; a license that is other has to be named"),
        ("library_name: diffusers", "library_name: sana", "library_name: has to be diffusers, but is sana"),
        (
            "image-to-image",
            "text-to-video",
            "pipeline_tag: has to be one of ['image-to-image', 'text-to-image'], but is text-to-video",
        ),
        ("me/base", "<owner/model>", "base_model: holds the placeholder <owner/model>"),
        ("license: mit", "license: TODO", "license: holds the placeholder TODO"),
        ("It edits.", "[More Information Needed]", "section A model: holds the placeholder [More Information Needed]"),
        ("It edits.", "It edits {{ what }}.", "section A model: holds the placeholder {{ what }}"),
        ("It edits.", "It edits <your words>.", "section A model: holds the placeholder <your words>"),
        ("It edits.", "TODO: say what it does", "section A model: holds the placeholder TODO"),
        ("It edits.", "It edits.\n\n## Bias\n\n## More\n\nIt does.", "section Bias: empty"),
        ("It edits.", "It edits.\n\n## Bias\n\n<!-- nothing yet -->", "section Bias: empty"),
        ("# A model\n", "", "title: missing"),
        (
            "It edits.",
            "| score | value | judge |\n| --- | --- | --- |\n| ImgEdit | 3 | |",
            "section A model: ImgEdit has no judge",
        ),
    ],
)
def test_check_says_what_is_wrong(old, new, problem):
    assert old in WHOLE
    assert check_card(WHOLE.replace(old, new)) == [problem]


def test_metric_without_a_judge_is_refused():
    card = str(render_released_card("DIM-4.6B-Edit-Stage1")).replace(", judged by GPT-4.1", "")
    assert [line for line in check_card(card) if "ImgEdit overall: does not say who judged it" in line]


def test_everything_wrong_is_told_at_once(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n\nTBD\n")
    with pytest.raises(ValueError) as error:
        validate_model_card(tmp_path / "README.md")
    for words in ("library_name", "pipeline_tag", "base_model", "section A model: holds the placeholder TBD"):
        assert words in str(error.value)


@pytest.mark.parametrize("text", ["# A model\n\nIt edits.\n", "---\nlicense: [\n---\n# A\n", "---\n- a\n---\n# A\n"])
def test_card_without_readable_front_matter_is_refused(text):
    assert len(check_card(text)) == 1 and check_card(text)[0].startswith("front matter: ")


def test_missing_card_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        validate_model_card(tmp_path / "README.md")


def test_model_from_scratch_needs_no_base_model():
    card = WHOLE.replace("base_model: me/base", "tags: [trained-from-scratch]")
    assert check_card(card) == []


def test_html_and_links_are_no_placeholders():
    card = WHOLE.replace("It edits.", '<img src="a.png" width="300"> See <https://example.com> and `<name>`.<br>')
    assert check_card(card) == []


def test_what_diffusers_writes_by_itself_is_refused():
    card = ModelCard.from_template(ModelCard(WHOLE).data, model_description="A pipeline.")
    assert any("More Information Needed" in line for line in check_card(str(card)))
