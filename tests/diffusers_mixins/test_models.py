"""
diffusers' tester mixins for models against ours at the golden models' size; they run as test_pipelines.py says.

The mixins for memory, training and compilation are skipped whole on a machine without an accelerator. Here they lack
that mark: then only those of their tests are skipped that ask for an accelerator themselves or, marked below, cannot
do without one.
"""

import pytest
import torch
from diffusers_repo import import_tests
from golden_components import transformer_config

from diffusers_dim import DIMConnector, DIMTransformer2DModel


mixins = import_tests("models.testing_utils")
torch_device = import_tests("testing_utils").torch_device

# They put part of a model on device 0, or move weights on a stream.
needs_accelerator = pytest.mark.skipif(torch_device == "cpu", reason="test requires an accelerator or its streams")


def without_mark(mixin: type) -> type:
    """A copy of a mixin without its class's pytest marks."""
    members = {
        name: member for name, member in vars(mixin).items() if name not in ("pytestmark", "__dict__", "__weakref__")
    }
    return type(mixin.__name__, mixin.__bases__, members)


class TransformerConfig(mixins.BaseModelTesterConfig):
    model_class = DIMTransformer2DModel
    main_input_name = "hidden_states"
    output_shape = (4, 16, 16)
    model_split_percents = [0.7, 0.7, 0.9]

    def get_init_dict(self):
        return transformer_config("edit")

    def get_dummy_inputs(self, height=16, width=16):
        generator = torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(2, 8, height, width, generator=generator),
            "encoder_hidden_states": torch.randn(2, 7, 48, generator=generator),
            "timestep": torch.tensor([900, 300]),
            "encoder_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 4 + [0.0] * 3]),
        }
        return {name: value.to(torch_device) for name, value in inputs.items()}


class ConnectorConfig(mixins.BaseModelTesterConfig):
    model_class = DIMConnector
    main_input_name = "hidden_states"
    output_shape = (7, 48)

    def get_init_dict(self):
        return {"hidden_size": 32, "caption_channels": 48, "max_sequence_length": 16}

    def get_dummy_inputs(self):
        hidden_states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
        return {"hidden_states": hidden_states.to(torch_device), "null_length": 5}


class TestTransformer(TransformerConfig, mixins.ModelTesterMixin):
    pass


@needs_accelerator
class TestTransformerOffload(TransformerConfig, mixins.CPUOffloadTesterMixin):
    pass


@needs_accelerator
class TestTransformerGroupOffload(TransformerConfig, mixins.GroupOffloadTesterMixin):
    pass


class TestTransformerLayerwiseCasting(TransformerConfig, mixins.LayerwiseCastingTesterMixin):
    pass


class TestTransformerTraining(TransformerConfig, without_mark(mixins.TrainingTesterMixin)):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"DIMTransformer2DModel"})


class TestTransformerAttention(TransformerConfig, mixins.AttentionTesterMixin):
    pass


class TestTransformerAttentionBackends(TransformerConfig, mixins.AttentionBackendTesterMixin):
    pass


class TestTransformerLora(TransformerConfig, mixins.LoraTesterMixin):
    pass


class TestTransformerLoraHotSwapping(TransformerConfig, mixins.LoraHotSwappingForModelTesterMixin):
    different_shapes_for_compilation = [(8, 8), (8, 16), (16, 16)]


class TestTransformerCompile(TransformerConfig, without_mark(mixins.TorchCompileTesterMixin)):
    different_shapes_for_compilation = [(8, 8), (8, 16), (16, 16)]

    def test_torch_compile_repeated_blocks(self):
        # The first block's input is the patch embedding's, of other strides than the later blocks': two graphs.
        super().test_torch_compile_repeated_blocks(recompile_limit=2)

    @needs_accelerator
    def test_compile_with_group_offloading(self):
        super().test_compile_with_group_offloading()


class TestTransformerPyramidAttentionBroadcast(TransformerConfig, mixins.PyramidAttentionBroadcastTesterMixin):
    pass


class TestTransformerFasterCache(TransformerConfig, mixins.FasterCacheTesterMixin):
    pass


class TestTransformerFirstBlockCache(TransformerConfig, mixins.FirstBlockCacheTesterMixin):
    pass


class TestTransformerMagCache(TransformerConfig, mixins.MagCacheTesterMixin):
    pass


class TestTransformerTaylorSeerCache(TransformerConfig, mixins.TaylorSeerCacheTesterMixin):
    # The cache's own names of attention layers end in "attn", SANA's in "attn1" and "attn2".
    TAYLORSEER_CACHE_CONFIG = {
        **mixins.TaylorSeerCacheTesterMixin.TAYLORSEER_CACHE_CONFIG,
        "cache_identifiers": [r"transformer_blocks\.\d+\.attn[12]"],
    }


class TestTransformerContextParallel(TransformerConfig, mixins.ContextParallelTesterMixin):
    pass


class TestTransformerTensorParallel(TransformerConfig, mixins.TensorParallelTesterMixin):
    pass


class TestConnector(ConnectorConfig, mixins.ModelTesterMixin):
    pass


@needs_accelerator
class TestConnectorOffload(ConnectorConfig, mixins.CPUOffloadTesterMixin):
    pass


@needs_accelerator
class TestConnectorGroupOffload(ConnectorConfig, mixins.GroupOffloadTesterMixin):
    pass


class TestConnectorLayerwiseCasting(ConnectorConfig, mixins.LayerwiseCastingTesterMixin):
    pass


class TestConnectorTraining(ConnectorConfig, without_mark(mixins.TrainingTesterMixin)):
    pass


class TestConnectorCompile(ConnectorConfig, without_mark(mixins.TorchCompileTesterMixin)):
    @needs_accelerator
    def test_compile_with_group_offloading(self):
        super().test_compile_with_group_offloading()
