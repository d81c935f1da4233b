"""What DeepSpeed's keys mean to a person who trains with FSDP2: the ones that are not converted."""

from __future__ import annotations

from .settings import Settings


NO_MEANING = "about DeepSpeed's own messages, buffers and files, no meaning in FSDP2: nothing to type"
UNKNOWN = "not known to this command, so nothing was written for it: look it up in DeepSpeed's documentation"
# What is said, and of which keys; a block stands for all that is in it. `zero.` is zero_optimization.
ADVICE = {
    NO_MEANING: """
    zero.contiguous_gradients zero.reduce_scatter zero.reduce_bucket_size zero.use_multi_rank_bucket_allreduce
    zero.allgather_partitions zero.allgather_bucket_size zero.overlap_comm zero.round_robin_gradients
    zero.sub_group_size zero.prefetch_bucket_size zero.param_persistence_threshold zero.model_persistence_threshold
    zero.max_live_parameters zero.max_reuse_distance zero.module_granularity_threshold zero.leaf_module
    zero.use_all_reduce_for_fetch_params zero.allgather_sequential zero.parameter_alignment zero.legacy_stage1
    zero.ignore_unused_parameters zero.memory_efficient_linear zero.override_module_apply zero.elastic_checkpoint
    zero.log_trace_cache_warnings zero.enable_sanity_checks zero.pipeline_loading_checkpoint zero.compute_grad_norm
    zero.load_from_fp32_weights zero.mics_hierarchical_params_gather zero.fast_sharding_for_leaf_module
    zero.save_muon_momentum_buffer_in_memory zero.gather_16bit_weights_on_model_save zero.mics_shard_size
    zero.gather_fp16_weights_on_model_save zero.offload_param zero.offload_optimizer zero.cpu_offload
    zero.cpu_offload_param zero.cpu_offload_params zero.cpu_offload_use_pin_memory zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer disable_allgather prescale_gradients gradient_predivide_factor aio vocabulary_size
    managed_gradient_accumulation use_data_before_expert_parallelism disable_python_gc deepspeed_moe_layer_cls_names
    zero3_init_flag optimizer.legacy_fusion bf16.immediate_grad_update bf16.check_grad_overflow
    """,
    "no quantised communication in FSDP2: nothing to type, more bytes are sent": """
    zero.zero_quantized_weights zero.zero_quantized_nontrainable_weights zero.zero_quantized_gradients
    zero.zeropp_loco_param
    """,
    "no counterpart, a second copy of the weights in each node: nearest is HSDP, type parallelism_config with "
    "parallelism_config_dp_shard_size: GPUs of a node": "zero.zero_hpz_partition_size",
    "no counterpart, DeepSpeed's way to hide the step of an offloaded optimizer: nothing to type": """
    zero.zenflow zero.offload_optimizer.super_offload zero.offload_optimizer.ratio
    """,
    "no counterpart, attention is the model's: type from_pretrained(..., attn_implementation=...)": "sparse_attention",
    "the Trainer logs instead: type TrainingArguments(logging_steps=..., report_to=...)": """
    steps_per_print wall_clock_breakdown memory_breakdown dump_state timers log_level tensorboard wandb csv_monitor
    comet monitor_config flops_profiler comms_logger
    """,
    "the Trainer saves instead: type TrainingArguments(save_strategy=..., save_steps=...)": """
    checkpoint nebula datastates_config
    """,
    "no counterpart: type TrainingArguments(auto_find_batch_size=True), or ask hf-stateless memory": "autotuning",
    "no counterpart, go on with other numbers of processes: type resume_from_checkpoint": "elasticity",
    "no counterpart: type hf_stateless.quantize(model) where weights are to be small": """
    compression_training quantize_training weight_quantization eigenvalue
    """,
    "no counterpart, it is for the dataset and the model to do": """
    data_efficiency curriculum_learning progressive_layer_drop
    """,
    "no counterpart in the Trainer: type from_pretrained(..., tp_plan='auto') to cut layers instead": "pipeline",
    "type from_pretrained(..., tp_plan='auto') instead": "tensor_parallel autotp_size expert_parallel",
    "type parallelism_config with parallelism_config_cp_size instead": "sequence_parallel_size",
    "no counterpart: type use_vllm=True in TRL's config for fast generation": "hybrid_engine",
    "type TrainingArguments(torch_compile=True) instead": "compile",
    "read only by scripts that call deepspeed.checkpointing, so it is not converted: type "
    "TrainingArguments(gradient_checkpointing=True), or fsdp_activation_checkpointing: true, not both": """
    activation_checkpointing
    """,
    "FSDP2 reduces gradients in the type of the mixed precision: nothing to type": """
    communication_data_type seq_parallel_communication_data_type data_types sparse_gradients
    """,
    "FSDP2 keeps float32 weights under mixed precision: for 2 bytes a weight load the model in bfloat16 and type "
    "bf16=False": "bf16 fp16.fp16_master_weights_and_grads torch_autocast",
    "TrainingArguments has no settings of the loss scale: torch's starts at 65536": "fp16",
    "NVIDIA's apex has no counterpart: type TrainingArguments(fp16=True) or bf16=True": "amp",
    "FSDP2 averages gradients: for their sum multiply the loss by the number of processes": "gradient_allreduce_op",
    "for DeepSpeed's own optimizer: type optim_args= where the new one has such a setting": "optimizer",
    "no value of TrainingArguments by itself: type lr_scheduler_kwargs= where the schedule has it": "scheduler",
    "MS-AMP has no counterpart: type mixed_precision: fp8 in the accelerate config": "msamp",
    "accelerate starts each machine by itself: type --machine_rank R --main_process_ip IP, and gpu_ids": """
    deepspeed_hostfile deepspeed_multinode_launcher deepspeed_exclusion_filter deepspeed_inclusion_filter
    """,
}
_SAID = {name: text for text, names in ADVICE.items() for name in names.split()}
_OFF: tuple[object, ...] = ({}, [], None, False, 0, "none", "auto", "mean", "false", "")


def advice(settings: Settings) -> list[str]:
    """Return one line for each kind of value that nobody has taken, with what to type instead.

    What is switched off is passed over; a key that is not known is named in any case.
    """
    lines: dict[str, list[str]] = {}
    for key, value in settings.left().items():
        text = _advice_of(key)
        # A size or a part of 1 is the whole.
        is_off = settings.is_off(key) or value in _OFF or (key.endswith(("_size", ".ratio")) and value == 1)
        if text in (UNKNOWN, NO_MEANING) or not is_off:
            lines.setdefault(text, []).append(settings.name(key))
    return [f"{', '.join(short(names))}: {text}." for text, names in lines.items()]


def _advice_of(key: str) -> str:
    """Return what is said about a key: what stands at the longest of its beginnings."""
    parts = key.replace("zero_optimization.", "zero.").replace("zero.stage3_", "zero.").split(".")
    beginnings = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((_SAID[name] for name in beginnings if name in _SAID), UNKNOWN)


def short(names: list[str]) -> list[str]:
    """Leave out the block of a name where the name before has the same."""
    blocks = [name.rpartition(".") for name in names]
    return [
        name if index == 0 or not block or block != blocks[index - 1][0] else last
        for index, (name, (block, _, last)) in enumerate(zip(names, blocks, strict=True))
    ]
