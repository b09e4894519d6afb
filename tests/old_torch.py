"""Skip tests that need a newer torch: older versions have bugs, or differ in what the test counts.

Found with torch 2.6.0 and 2.11.0 (scripts/dev/test_with.sh). Tests that fail on 2.11 were not tried on 2.12.
"""

from __future__ import annotations

import pytest
import torch

_FAKE_CUDA = "autograd of fake CUDA tensors fails without a GPU"
_INTERPRETER = "Triton's interpreter fails with NumPy 2.4"
_DTENSOR = "DTensor warns on a mesh of CPUs"

NEEDS = {
    "test_calls_do_not_grow_with_the_tensors": ("2.13", "no _foreach_clone before 2.12"),
    "test_torch_compile_adds_no_graph_breaks": ("2.13", "torch.compile breaks graphs in more places"),
    "test_default_device_and_dtype_have_no_effect": ("2.13", "AdamW fails on a default device"),
    "test_an_added_group_has_its_own_lr_and_decay[Adagrad]": ("2.13", "Adagrad takes no added group"),
    "test_dtensor_shards_step_like_the_whole_with_one_collective[Muon": ("2.13", "Muon takes no shards"),
    "test_fsdp2_trains_like_one_process_with_one_collective[Muon": ("2.13", "Muon takes no shards"),
    "test_dtensor_shards_step_like_the_whole": ("2.11", _DTENSOR),
    "test_fsdp2_trains_like_one_process": ("2.11", _DTENSOR),
    "test_torch_can_step_shards_of_most_bases": ("2.11", _DTENSOR),
    "test_steps_of_shards_are_scaled_with_one_collective": ("2.11", _DTENSOR),
    "test_ddp_trains_like_one_process": ("2.11", _DTENSOR),
    "test_the_fsdp_example_trains_like_one_process": ("2.11", _DTENSOR),
    "test_a_compiled_step_scales_the_step_of_the_base": ("2.11", "torch.compile breaks graphs in more places"),
    "test_counts_equal_a_count_by_hand": ("2.11", _FAKE_CUDA),
    "test_memory_and_open_files_do_not_grow_in_500_updates": ("2.11", "memory grows once, by 12 MB"),
    "test_unmarked_commands_run_and_write_the_stated_files[docs/export.md": (
        "2.11",
        "onnxscript 0.5 and newer fail",
    ),
    "test_decoupled_decay_is_part_of_the_ratio_or_left_to_adamw": ("2.7", "Adam has no decoupled_weight_decay"),
    "test_every_scheduler_acts_as_on_the_plain_base[SequentialLR": (
        "2.11",
        "SequentialLR warns",
    ),
    "test_a_cosine_equals_torchs_linear_and_cosine_in_sequence": ("2.11", "SequentialLR warns"),
    "test_restart_equals_torchs_linear_and_polynomial_in_sequence": ("2.11", "SequentialLR warns"),
    "test_a_layer_on_cuda_uses_the_kernels_in_channels_last": ("2.13", _FAKE_CUDA),
    "test_one_ghost_batch_uses_the_kernels_only_if_large": ("2.11", _FAKE_CUDA),
    "test_fake_tensors_and_compiled_models_avoid_the_kernels": ("2.13", _FAKE_CUDA),
    "test_calls_do_not_grow_with_the_ghost_batches": ("2.13", _FAKE_CUDA),
    "test_ghost_norm.py::test_no_call_waits_for_the_device": ("2.13", _FAKE_CUDA),
    "test_one_ghost_batch_on_cuda_uses_torchs_batch_norm": ("2.13", _FAKE_CUDA),
    "test_torch_compile_makes_one_graph_with_the_same_results": ("2.13", "torch.compile breaks graphs in more places"),
    "test_interpreted_kernels_agree_with_float64": ("2.13", _INTERPRETER),
    "test_results_do_not_depend_on_the_number_of_ghost_batches": ("2.13", _INTERPRETER),
    "test_interpreted_fused_kernels_agree_with_float64": ("2.13", _INTERPRETER),
    "test_interpreted_relu_keeps_what_is_not_a_number": ("2.13", _INTERPRETER),
    "test_compiled_fused_kernels_make_the_fewest_passes": ("2.11", "Triton 3.2 compiles the kernels differently"),
    "test_compiled_blocks_are_one_graph_without_the_kernels": ("2.13", "torch.compile breaks graphs in more places"),
    "test_resnet_50_takes_few_operations": ("2.13", "autograd dispatches other operations"),
    "test_the_page_has_the_counted_operations_bytes_and_bounds": ("2.13", "autograd dispatches other operations"),
    "test_compiled_kernels_make_eight_passes": ("2.11", "Triton 3.2 compiles the kernels differently"),
    "test_a_cuda_graph_can_capture_a_step": ("2.11", _FAKE_CUDA),
    "test_onnx_graph_gives_the_networks_logits": ("2.11", "onnxscript 0.5 and newer fail"),
    "test_an_onnx_export_contains_the_blur": ("2.11", "onnxscript 0.5 and newer fail"),
    "test_an_onnx_graph_with_other_logits_is_not_kept": ("2.11", "onnxscript 0.5 and newer fail"),
}
"""For a part of a test's id: the version of torch that the test needs, and why."""


def skip(items: list[pytest.Item]) -> None:
    """Mark the tests that need a newer torch than this one."""
    needs = [(part, *needed) for part, needed in NEEDS.items() if torch.__version__ < needed[0]]
    for item in items:
        for part, version, why in needs:
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=f"needs torch {version}: {why}"))
