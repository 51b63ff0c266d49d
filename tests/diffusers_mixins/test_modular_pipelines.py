"""
diffusers' tester mixins for modular pipelines against our blocks, run as test_pipelines.py beside it says.

Their loading tests call `ModularPipeline.from_pretrained`, which knows diffusers' own classes alone: here that name is
our class. Tests of offloading ask for an accelerator.
"""

import json
from functools import partialmethod
from pathlib import Path

import pytest
from diffusers_repo import import_tests
from golden_components import components
from pipeline_cases import EditInputs, TextToImageInputs

from diffusers_dim import (
    DIMBlocks,
    DIMEditBlocks,
    DIMEditModularPipeline,
    DIMEditPipeline,
    DIMModularPipeline,
    DIMPipeline,
)


mixins = import_tests("modular_pipelines.testing_utils")
loading = import_tests("modular_pipelines.testing_utils.loading")
memory = import_tests("modular_pipelines.testing_utils.memory")


class Config(mixins.BaseModularPipelineTesterConfig):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def folder(cls, request, tmp_path_factory):
        """The components in a folder of the pipeline's, as any converted model is."""
        folder = tmp_path_factory.mktemp(request.cls.kind)
        request.cls.standard_pipeline_class(**components(request.cls.kind)).save_pretrained(folder)
        request.cls.pretrained_model_name_or_path = str(folder)

    @pytest.fixture(autouse=True)
    def own_pipeline_class(self, monkeypatch):
        for module in (loading, memory):
            monkeypatch.setattr(module, "ModularPipeline", self.pipeline_class)

    def get_dummy_inputs(self, seed=0):
        return {name: value for name, value in self.inputs().items() if name != "guidance_scale"}


class EditBlocks(EditInputs):
    pipeline_class = DIMEditModularPipeline
    pipeline_blocks_class = DIMEditBlocks
    standard_pipeline_class = DIMEditPipeline
    # Modular pipelines take guidance from a guider, and embeddings by leaving the encoder out.
    params = frozenset(["image", "prompt", "negative_prompt", "height", "width"])
    batch_params = frozenset(["image", "prompt", "negative_prompt"])
    not_params = frozenset(["guidance_scale", "prompt_embeds", "image_latents"])


class TextToImageBlocks(TextToImageInputs):
    pipeline_class = DIMModularPipeline
    pipeline_blocks_class = DIMBlocks
    standard_pipeline_class = DIMPipeline
    params = frozenset(["prompt", "negative_prompt", "height", "width"])
    batch_params = frozenset(["prompt", "negative_prompt"])
    not_params = frozenset(["guidance_scale", "prompt_embeds", "image"])


class Loading(Config, mixins.ModularLoadingTesterMixin):
    def names_in(self, index):
        """The components that a `model_index.json` or `modular_model_index.json` names."""
        names = {name for name, value in json.loads(index.read_text()).items() if isinstance(value, list)}
        return names - {"_class_name"}

    def names_loaded(self, pipe):
        parts = pipe.components.items()
        return {name for name, part in parts if getattr(part, "_diffusers_load_id", "null") != "null"}

    def test_load_expected_components_from_pretrained(self, tmp_path):
        # The mixin reads a modular_model_index.json; a converted model has a model_index.json.
        folder = Path(self.pretrained_model_name_or_path)
        assert self.names_loaded(self.get_pipeline()) == self.names_in(folder / "model_index.json")

    def test_load_expected_components_from_save_pretrained(self, tmp_path):
        # The mixin does not expect a config value of None, as that of the designer is.
        self.get_pipeline().save_pretrained(tmp_path)
        pipe = self.pipeline_class.from_pretrained(tmp_path)
        pipe.load_components()
        assert self.names_loaded(pipe) == self.names_in(tmp_path / "modular_model_index.json")

    def test_modular_index_consistency(self, tmp_path, monkeypatch):
        # The mixin is of the time when the index kept naming where components had come from by default.
        save = partialmethod(self.pipeline_class.save_pretrained, overwrite_modular_index=False)
        monkeypatch.setattr(self.pipeline_class, "save_pretrained", save)
        super().test_modular_index_consistency(tmp_path)


class TestEditBlocks(EditBlocks, Config, mixins.ModularPipelineTesterMixin):
    pass


class TestEditBlocksGuider(EditBlocks, Config, mixins.ModularGuiderTesterMixin):
    pass


class TestEditBlocksLoading(EditBlocks, Loading):
    pass


class TestEditBlocksMemory(EditBlocks, Config, mixins.ModularMemoryTesterMixin):
    pass


class TestTextToImageBlocks(TextToImageBlocks, Config, mixins.ModularPipelineTesterMixin):
    pass


class TestTextToImageBlocksGuider(TextToImageBlocks, Config, mixins.ModularGuiderTesterMixin):
    pass


class TestTextToImageBlocksLoading(TextToImageBlocks, Loading):
    pass
