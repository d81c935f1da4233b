"""Which flags of a command are published, and what their values may look like; of all others nothing is told.

A list of what is known, because nobody can list all names of secrets. `tests/test_published_command.py` sees to it
that the flags of the recipes are in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


NUMBERS = _names(
    """
    num_train_epochs max_steps learning_rate lr warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon
    max_grad_norm label_smoothing_factor neftune_noise_alpha gradient_accumulation_steps seed data_seed
    per_device_train_batch_size per_device_eval_batch_size eval_accumulation_steps torch_empty_cache_steps
    logging_steps eval_steps eval_delay save_steps save_total_limit dataloader_num_workers
    dataloader_prefetch_factor average_tokens_across_devices bf16 fp16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing gradient_checkpointing torch_compile use_liger_kernel use_cache auto_find_batch_size
    logging_first_step logging_nan_inf_filter include_num_input_tokens_seen disable_tqdm prediction_loss_only
    eval_on_start batch_eval_metrics save_only_model save_on_each_node push_to_hub hub_private_repo
    hub_always_push load_best_model_at_end greater_is_better ignore_data_skip full_determinism use_cpu
    dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers remove_unused_columns
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_timeout
    skip_memory_metrics do_train do_eval do_predict local_rank cpu_threads load_in_8bit_training load_in_8bit
    load_in_4bit use_peft lora_r lora_alpha lora_dropout use_rslora use_dora use_bnb_nested_quant
    trust_remote_code streaming held_out_fraction vocab_size block_size max_eval_tokens max_train_rows
    max_eval_rows example_rows train_size eval_size eval_samples task_seed dataset_streaming dataset_num_proc
    max_length shuffle_dataset packing eval_packing padding_free pad_to_multiple_of completion_only_loss
    assistant_only_loss activation_offloading disable_dropout precompute_ref_log_probs label_smoothing beta
    sync_ref_model ref_model_sync_steps num_generations num_generations_eval max_completion_length
    generation_batch_size steps_per_generation temperature top_p top_k min_p repetition_penalty num_iterations
    epsilon epsilon_high delta scale_rewards use_vllm vllm_gpu_memory_utilization mask_truncated_completions
    log_completions num_processes num_machines machine_rank main_process_port nproc_per_node nnodes node_rank
    master_port num_cpu_threads_per_process multi_gpu use_fsdp cpu standalone fsdp_version push_dashboard
    """
)
"""Numbers and switches."""
WORDS = _names(
    """
    optim lr_scheduler_type logging_strategy eval_strategy save_strategy hub_strategy report_to log_level
    log_level_replica metric_for_best_model ddp_backend dtype torch_compile_backend torch_compile_mode fsdp
    train_sampling_strategy optim_target_modules attn_implementation lora_target_modules lora_task_type
    bnb_4bit_quant_type bnb_4bit_quant_storage model_config text_column dataset_config dataset_train_split
    dataset_test_split dataset_text_field packing_strategy truncation_mode loss_type answer_tag
    importance_sampling_level vllm_mode mixed_precision dynamo_backend adamw_rates
    """
)
"""One name or several."""
TASKS = frozenset({"task", "example_tasks"})
"""Names, perhaps with numbers as options: `chain_sum:max_digits=1`."""
PLACES = _names(
    """
    config config_file output_dir resume_from_checkpoint model_config model_name_or_path model tokenizer_name
    dataset_name train_files validation_files chat_template_path model_revision hub_model_id
    """
)
"""Files, folders, and ids on the Hub."""
OPTIONS = frozenset({"optim_args", "lr_scheduler_kwargs"})
"""Pairs of names and values."""
NAMED = _names(
    """
    hub_token push_to_hub_token hub_revision push_without run_name project trackio_space_id trackio_bucket_id prompt
    system_prompt model_init_kwargs gradient_checkpointing_kwargs accelerator_config fsdp_config deepspeed
    vllm_server_base_url vllm_server_host main_process_ip master_addr rdzv_endpoint
    """
)
"""Known flags whose values are nobody's business."""
SUBCOMMANDS = _names(
    """
    accelerate torchrun trl hf-stateless launch run train sft dpo grpo kto reward rloo
    """
)
"""Programs and their subcommands, before a script or its flags."""

_NUMBER = re.compile(
    r"[-+]?(\d{1,12}(\.\d{0,12})?|\.\d{1,12})(e[-+]?\d{1,3})?|true|false|yes|no|none|inf", re.IGNORECASE
)
_OPTION = rf"\w{{1,40}}=({_NUMBER.pattern})"
_TASK = re.compile(rf"[A-Za-z]\w{{0,79}}(:{_OPTION}(,{_OPTION})*)?", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z][\w.+,-]{0,79}|10m|60m|130m|350m|1b")
_PLACE = re.compile(r"~?[\w.{][\w .@+=,{}/\\-]{0,199}|~")


def shape_of(flag: str) -> Callable[[str], bool] | None:
    """Return what says whether a value of a flag may be told; None for a flag that is not known.

    Args:
        flag: as it was typed, such as `--learning-rate`.
    """
    name = name_of(flag)
    kinds = ((NUMBERS, is_number), (WORDS, is_word), (TASKS, is_task), (PLACES, is_place), (NAMED | OPTIONS, _never))
    found = [test for names, test in kinds if name in names]
    return (lambda text: any(test(text) for test in found)) if found and flag.startswith("--") else None


def _never(text: str) -> bool:
    return False


def name_of(flag: str) -> str:
    """Return the name of an argument that a flag sets."""
    return flag.lstrip("-").replace("-", "_")


def is_number(text: str) -> bool:
    """Tell whether a value is a number or a switch."""
    return _NUMBER.fullmatch(text) is not None


def is_word(text: str) -> bool:
    """Tell whether a value is a plain name, or several joined by commas."""
    return _WORD.fullmatch(text) is not None or is_number(text)


def is_task(text: str) -> bool:
    """Tell whether a value is the name of a task, perhaps with numbers as its options."""
    return _TASK.fullmatch(text) is not None


def is_place(text: str) -> bool:
    """Tell whether a value is a plain file name, path or id."""
    return _PLACE.fullmatch(text) is not None
