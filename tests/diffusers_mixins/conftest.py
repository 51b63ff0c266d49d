"""The marks that diffusers' tester mixins carry."""

MARKERS = (
    "attention autoround big_accelerator bitsandbytes cache compile context_parallel cpu_offload gguf group_offload"
    " ip_adapter lora memory modelopt nightly quantization quanto sdnq single_file tensor_parallel torchao training"
)


def pytest_configure(config):
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: set by diffusers' tester mixins")
