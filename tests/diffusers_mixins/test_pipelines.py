"""
diffusers' tester mixins for pipelines against ours, with components of the golden models' size.

None of diffusers' tests are in its package, so they come from a checkout:

    DIFFUSERS_REPO=/path/to/diffusers python -m pytest tests/diffusers_mixins

`MemoryTesterMixin` is skipped whole on a machine without an accelerator. Its parts are composed here one by one: then
only those of its tests are skipped that ask for an accelerator themselves.
"""

import torch
from diffusers_repo import import_tests
from golden_components import HEIGHT, WIDTH, components
from pipeline_cases import EditInputs, TextToImageInputs, embeddings_for, output_of_encoded_prompt


mixins = import_tests("pipelines.testing_utils")


class Config(mixins.BasePipelineTesterConfig):
    output_shape = (3, HEIGHT, WIDTH)

    def get_dummy_components(self, num_layers=2):
        return components(self.kind, num_layers)

    def get_dummy_inputs(self):
        return self.inputs()


class LoraConfig(Config):
    denoiser_target_modules = {
        **mixins.LoraTesterMixin.denoiser_target_modules,
        "connector": ["linear_1", "linear_2"],
    }


class PipelineTests(Config, mixins.PipelineTesterMixin):
    def test_save_load_optional_components(self, tmp_path):
        # Without the text side embeddings are the only way in.
        self.get_dummy_inputs = lambda: embeddings_for(self.inputs())
        super().test_save_load_optional_components(tmp_path)

    def test_encode_prompt_works_in_isolation(self, base_pipe_output):
        # The mixin's own keeps only components with "text" or "tokenizer" in their names: ours have other names.
        output = output_of_encoded_prompt(self.pipeline_class, self.inputs(), self.kind)
        torch.testing.assert_close(output, base_pipe_output, atol=1e-4, rtol=1e-4)


class TestEditPipeline(EditInputs, PipelineTests):
    pass


class TestEditPipelineOffload(EditInputs, Config, mixins.PipelineOffloadTesterMixin):
    pass


class TestEditPipelineGroupOffload(EditInputs, Config, mixins.GroupOffloadTesterMixin):
    pass


class TestEditPipelineLayerwiseCasting(EditInputs, Config, mixins.LayerwiseCastingTesterMixin):
    pass


class TestEditPipelineLora(EditInputs, LoraConfig, mixins.LoraTesterMixin):
    pass


class TestEditPipelineLoraMemory(EditInputs, LoraConfig, mixins.LoraMemoryTesterMixin):
    pass


class TestEditPipelinePyramidAttentionBroadcast(EditInputs, Config, mixins.PyramidAttentionBroadcastTesterMixin):
    pass


class TestEditPipelineFasterCache(EditInputs, Config, mixins.FasterCacheTesterMixin):
    FASTER_CACHE_CONFIG = {**mixins.FasterCacheTesterMixin.FASTER_CACHE_CONFIG, "tensor_format": "BCHW"}


class TestEditPipelineFirstBlockCache(EditInputs, Config, mixins.FirstBlockCacheTesterMixin):
    pass


class TestEditPipelineTaylorSeerCache(EditInputs, Config, mixins.TaylorSeerCacheTesterMixin):
    pass


class TestEditPipelineMagCache(EditInputs, Config, mixins.MagCacheTesterMixin):
    pass


class TestTextToImagePipeline(TextToImageInputs, PipelineTests):
    pass


class TestTextToImagePipelineOffload(TextToImageInputs, Config, mixins.PipelineOffloadTesterMixin):
    pass


class TestTextToImagePipelineGroupOffload(TextToImageInputs, Config, mixins.GroupOffloadTesterMixin):
    pass


class TestTextToImagePipelineLayerwiseCasting(TextToImageInputs, Config, mixins.LayerwiseCastingTesterMixin):
    pass


class TestTextToImagePipelineLora(TextToImageInputs, LoraConfig, mixins.LoraTesterMixin):
    pass


class TestTextToImagePipelineLoraMemory(TextToImageInputs, LoraConfig, mixins.LoraMemoryTesterMixin):
    pass


class TestTextToImagePipelinePyramidAttentionBroadcast(
    TextToImageInputs, Config, mixins.PyramidAttentionBroadcastTesterMixin
):
    pass


class TestTextToImagePipelineFasterCache(TextToImageInputs, Config, mixins.FasterCacheTesterMixin):
    FASTER_CACHE_CONFIG = {**mixins.FasterCacheTesterMixin.FASTER_CACHE_CONFIG, "tensor_format": "BCHW"}


class TestTextToImagePipelineFirstBlockCache(TextToImageInputs, Config, mixins.FirstBlockCacheTesterMixin):
    pass


class TestTextToImagePipelineTaylorSeerCache(TextToImageInputs, Config, mixins.TaylorSeerCacheTesterMixin):
    pass


class TestTextToImagePipelineMagCache(TextToImageInputs, Config, mixins.MagCacheTesterMixin):
    pass
