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
"""The options of examples/app.py, and what it offers to begin with."""

import importlib.util
from pathlib import Path

import pytest

from diffusers_dim.designers import OpenAIDesigner, SelfDesigner
from diffusers_dim.tiny.designer import ShapesDesigner, design_edit


SCRIPT = Path(__file__).parents[2] / "examples" / "app.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("app_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def designers(script, *options, embedded=True):
    return script.load_designers(script.parse_args(list(options)), None, embedded)


def test_the_embedded_models_designer_goes_by_rule(script):
    found, called, chosen = designers(script)
    assert isinstance(found["shapes"], ShapesDesigner) and found["none"] is None and len(found) == 2
    assert chosen == "shapes" and [name for _, name in called] == list(found)


def test_other_models_design_themselves(script):
    found, _, chosen = designers(script, embedded=False)
    assert isinstance(found["self"], SelfDesigner) and list(found) == ["self", "none"] and chosen == "self"


def test_a_server_can_be_added(script):
    options = ["--designer", "openai", "--designer_model", "writer", "--designer_base_url", "http://localhost:1/v1"]
    found, called, chosen = designers(script, *options)
    assert isinstance(found["openai"], OpenAIDesigner) and chosen == "openai" and ("writer", "openai") in called


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--designer", "openai"], "--designer openai: needs --designer_model"),
        (["--designer", "none", "--designer_model", "writer"], "--designer none: takes no --designer_... options"),
    ],
)
def test_options_that_do_not_fit_are_named(script, options, words):
    with pytest.raises(ValueError, match=words):
        designers(script, *options)


def test_limits_have_to_be_positive(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--max_steps", "0"])
    assert "--max_steps has to be at least 1, but is 0." in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(script):
    with pytest.raises(ValueError, match="--model nowhere: is neither a folder here nor a Hub repository id"):
        script.main(script.parse_args(["--model", "nowhere"]))


def test_all_examples_can_be_designed(script):
    for embedded in (True, False):
        for image, instruction in script.load_examples(embedded):
            assert "Edit Area Localization" in design_edit(image, instruction)
