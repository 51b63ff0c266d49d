"""
diffusers' older tester mixins for pipelines, those that most of its own pipelines are tested with, against ours.

They run as tests/diffusers_mixins/test_pipelines.py says, and need the packages
`parameterized` and `requests-mock`.
"""

import unittest

import pytest
import torch
from diffusers_repo import import_tests
from golden_components import components
from pipeline_cases import EditInputs, TextToImageInputs, embeddings_for, output_of_encoded_prompt


for package in ("parameterized", "requests_mock"):
    pytest.importorskip(package, reason=f"diffusers' older tester mixins import the package {package}")

common = import_tests("pipelines.test_pipelines_common")


class CommonPipelineTests(common.PipelineLatentTesterMixin, common.PipelineTesterMixin):
    """The older tester mixins, which most of diffusers' pipelines are tested with."""

    test_xformers_attention = False
    test_layerwise_casting = True
    test_group_offloading = True
    image_latents_params = frozenset()  # sources are pictures, never latents

    def get_dummy_components(self):
        return components(self.kind)

    def get_dummy_inputs(self, device, seed=0):
        return {**self.inputs(), "generator": torch.Generator().manual_seed(seed)}

    def test_save_load_optional_components(self):
        # Without the text side embeddings are the only way in.
        self.get_dummy_inputs = lambda device, seed=0: embeddings_for(self.inputs())
        super().test_save_load_optional_components()

    def test_encode_prompt_works_in_isolation(self):
        # The mixin's own keeps only components with "text" or "tokenizer" in their names: ours have other names.
        output = output_of_encoded_prompt(self.pipeline_class, self.inputs(), self.kind)
        expected = self.pipeline_class(**components(self.kind))(**self.inputs())[0]
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)

    def test_attention_slicing_forward_pass(self):
        # It compares pictures with their channels last.
        self.get_dummy_inputs = lambda device, seed=0: {**self.inputs(), "output_type": "np"}
        super().test_attention_slicing_forward_pass()

    @unittest.skip("It puts AutoencoderKL and others in the VAE's place; these pipelines take an AutoencoderDC.")
    def test_multi_vae(self):
        pass


class TestEditPipelineCommon(EditInputs, CommonPipelineTests, unittest.TestCase):
    pass


class TestTextToImagePipelineCommon(TextToImageInputs, CommonPipelineTests, unittest.TestCase):
    pass
