"""What this package uses of other packages without their promise to keep it: data only.

`tests/test_architecture.py` finds every such use in the sources and demands a row for it, and a use for every row;
`tests/test_registration.py` looks each part up and names it when upstream has moved it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivatePart:
    """One thing that is private upstream, or public and used as nobody promised."""

    part: str
    """`module:attribute`; `module#name` for what only objects have: it is looked for in the source of the module."""
    used_by: tuple[str, ...]
    """Our files, below `hf_stateless/`."""
    why: str
    upstream: str
    """Where it is upstream, and what was asked for there if anything was."""
    until: str
    """When our use can be deleted."""
    everywhere: bool = True
    """False for what some supported versions do not have."""


_TRAINING_ARGS = "transformers/training_args.py; transformers#31875 and transformers#34358 asked for names as plugins"
_NAMES = "transformers accepts names that are not members of its enum"
_HOOKS = "transformers/quantizers/base.py"
_FOREACH = "torch/_foreach; the optimizers of torch are written with these"
_HUB_ERRORS = "huggingface_hub raises errors of its own for failures of the network"

PRIVATE_PARTS = (
    PrivatePart(
        part="transformers.core_model_loading#_weight_conversions",
        used_by=("weights/int8/convert.py",),
        why="a loaded model tells how its weights were converted from those of its file, and packed codes cannot be",
        upstream="transformers/core_model_loading.py; get_model_conversion_mapping tells it of a model that was made",
        until="conversions of transformers take packed weights, or a model tells them by a method",
    ),
    PrivatePart(
        part="transformers.distributed.tensor_parallel#_hf_quantized_needs_local_tp",
        used_by=("weights/int8/linear.py", "weights/int8/tables.py"),
        why="a module says by it that its forward computes with this rank's parts of weights, and not with DTensors",
        upstream="transformers/distributed/tensor_parallel.py, for its own quantizers of torchao and fp8",
        until="modules can say it by a name without an underscore",
        everywhere=False,
    ),
    PrivatePart(
        part="huggingface_hub.utils._http:_GLOBAL_CLIENT_FACTORY",
        used_by=("reports/card/hub_client.py",),
        why="a client that somebody has set keeps what it has, and gets bounds for what it waits",
        upstream="huggingface_hub/utils/_http.py: set_client_factory has no counterpart that reads",
        until="huggingface_hub has timeouts of its own and bounds Retry-After",
    ),
    PrivatePart(
        part="transformers.training_args:OptimizerNames._member_map_",
        used_by=("trainer/names.py",),
        why="iteration and OptimizerNames[name] know a new name",
        upstream=_TRAINING_ARGS,
        until=_NAMES,
    ),
    PrivatePart(
        part="transformers.training_args:OptimizerNames._member_names_",
        used_by=("trainer/names.py",),
        why="iteration knows a new name, and its position",
        upstream=_TRAINING_ARGS,
        until=_NAMES,
    ),
    PrivatePart(
        part="transformers.training_args:OptimizerNames._value2member_map_",
        used_by=("trainer/names.py",),
        why="OptimizerNames(value) knows a new name",
        upstream=_TRAINING_ARGS,
        until=_NAMES,
    ),
    PrivatePart(
        part="transformers.training_args:OptimizerNames._hashable_values_",
        used_by=("trainer/names.py",),
        why="`value in OptimizerNames` knows a new name",
        upstream="CPython's enum, from late 3.13",
        until=_NAMES,
        everywhere=False,
    ),
    PrivatePart(
        part="transformers.trainer_optimizer:_OPTIMIZER_HANDLERS",
        used_by=("trainer/names.py",),
        why="the Trainer looks up who makes the optimizer of a name",
        upstream="transformers/trainer_optimizer.py, since 5.2.0 (transformers#43738)",
        until="transformers has a public function that adds a handler",
    ),
    PrivatePart(
        part="transformers.trainer:_parse_optim_args",
        used_by=("trainer/patches.py",),
        why="a malformed optim_args gets one clear line",
        upstream="transformers/trainer_optimizer.py",
        until="transformers reports the malformed part itself",
    ),
    PrivatePart(
        part="transformers:Trainer.train",
        used_by=("trainer/patches.py",),
        why="replaced, so that hooks of layer-wise updates sleep when it has ended or failed",
        upstream="transformers/trainer.py; public; it calls optimizer.train() before each forward",
        until="the Trainer calls optimizer.eval() at its end, errors included",
    ),
    PrivatePart(
        part="transformers:Trainer.create_optimizer",
        used_by=("trainer/patches.py",),
        why="replaced, so that a subclass's get_decay_parameter_names says what decays",
        upstream="transformers/trainer.py; public; OptimizerContext has the arguments and the model, not the trainer",
        until="OptimizerContext has the names of what decays",
    ),
    PrivatePart(
        part="transformers.trainer:load_fsdp_optimizer",
        used_by=("trainer/patches.py",),
        why="replaced, also in accelerate.accelerator, so that tables take the rule of a checkpoint before it is read",
        upstream="accelerate/utils/fsdp_utils.py; public; torch reads the tensors that the optimizer has now",
        until="torch asks the optimizer what to read",
    ),
    PrivatePart(
        part="transformers.modeling_utils#_tp_size",
        used_by=("trainer/parallel_models.py",),
        why="a loaded model tells over how many ranks it was cut, also where its parts are plain tensors",
        upstream="transformers/distributed/mixin.py, before 5.17 transformers/modeling_utils.py",
        until="every supported transformers cuts into DTensors",
        everywhere=False,
    ),
    PrivatePart(
        part="torch.distributed.tensor.placement_types:_StridedShard",
        used_by=("weights/cuts.py",),
        why="how DTensor writes what FSDP2 and tensor parallelism both cut, and projections packed in one",
        upstream="torch/distributed/tensor/placement_types.py",
        until="torch makes the placement public",
    ),
    PrivatePart(
        part="transformers:Trainer._mixed_mesh_grad_norm",
        used_by=("trainer/clipping.py",),
        why="replaced, so that under tensor parallelism clipping counts gradients that backward has freed",
        upstream="transformers/trainer.py, since 5.17 or before",
        until="torch lets an optimizer take part in clipping",
        everywhere=False,
    ),
    PrivatePart(
        part="transformers:Trainer.get_decay_parameter_names",
        used_by=("trainer/partition.py",),
        why="the Trainer's rule of weight decay without a Trainer: the method does not look at its self",
        upstream="transformers/trainer.py",
        until="transformers has the rule as a function",
    ),
    PrivatePart(
        part="transformers.quantizers:HfQuantizer._process_model_before_weight_loading",
        used_by=("weights/int8/hf_quantizer.py",),
        why="8-bit layers are put in before weights are read; quantizers are made to override it",
        upstream=_HOOKS,
        until="the hook is renamed",
    ),
    PrivatePart(
        part="transformers.quantizers:HfQuantizer._process_model_after_weight_loading",
        used_by=("weights/int8/hf_quantizer.py",),
        why="8-bit layers take over what was read; quantizers are made to override it",
        upstream=_HOOKS,
        until="the hook is renamed",
    ),
    PrivatePart(
        part="transformers.quantizers.auto:AutoHfQuantizer.merge_quantization_configs",
        used_by=("weights/int8/config.py",),
        why="wrapped: a folder of compressed-tensors is trained on where a user passes an Int8TrainingConfig",
        upstream="transformers/quantizers/auto.py; public, with no place for a config of another class",
        until="a config can say which folders of other methods it takes",
    ),
    PrivatePart(
        part="transformers.integrations.peft#_hf_peft_config_loaded",
        used_by=("weights/int8/hf_quantizer.py",),
        why="codes are not packed where adapters alone are saved",
        upstream="transformers/integrations/peft.py",
        until="quantizers are told what is saved",
    ),
    PrivatePart(
        part="transformers:PreTrainedModel._init_weights",
        used_by=("weights/int8/hf_quantizer.py",),
        why="a layer that a folder in 8 bits lacks is initialised in float; models are made to override it",
        upstream="transformers/modeling_utils.py",
        until="transformers initialises one module by a public function",
    ),
    PrivatePart(
        part="transformers.quantizers:HfQuantizer._dequantize",
        used_by=("weights/int8/hf_quantizer.py",),
        why="model.dequantize() gives float weights back; quantizers are made to override it",
        upstream=_HOOKS,
        until="the hook is renamed",
    ),
    PrivatePart(
        part="accelerate:Accelerator.clip_grad_norm_",
        used_by=("trainer/clipping.py",),
        why="replaced, so that clipping and the logged grad_norm count gradients that backward has freed",
        upstream="accelerate/accelerator.py; public, but nobody promised that the Trainer clips by it",
        until="accelerate lets an optimizer take part in clipping",
    ),
    PrivatePart(
        part="torch.nn.utils.clip_grad:_clip_grads_with_norm_",
        used_by=("trainer/clipping.py",),
        why="replaced, so that clip_grad_norm_ of torch counts gradients that backward has freed",
        upstream="torch/nn/utils/clip_grad.py; clip_grad_norm_ calls it with the norm that it returns",
        until="torch lets an optimizer take part in clipping",
    ),
    PrivatePart(
        part="torch.nn.utils:clip_grad_value_",
        used_by=("trainer/clipping.py",),
        why="replaced, so that it says once that it does not see gradients that backward has freed",
        upstream="torch/nn/utils/clip_grad.py; public",
        until="torch lets an optimizer take part in clipping",
    ),
    PrivatePart(
        part="torch.nn.parallel:DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
        used_by=("trainer/patches.py",),
        why="keeps parameters that are updated in backward out of the buckets of DDP",
        upstream="torch/nn/parallel/distributed.py",
        until="DDP takes the names as an argument",
    ),
    PrivatePart(
        part="torch.nn.parallel.distributed#_ddp_ignored",
        used_by=("optimizer/release.py",),
        why="tells which parameters DDP was told to leave alone",
        upstream="torch/nn/parallel/distributed.py",
        until="DDP tells what it averages",
    ),
    PrivatePart(
        part="torch._dynamo.eval_frame#_orig_mod",
        used_by=("trainer/patches.py",),
        why="the prefix of names in a model that torch.compile has wrapped",
        upstream="torch/_dynamo/eval_frame.py",
        until="DDP takes parameters instead of names",
    ),
    PrivatePart(
        part="torch.nn:Module._apply",
        used_by=("weights/int8/holder.py", "weights/int8/linear.py"),
        why="model.to(dtype) must not cast codes and scales; torch's own modules override it so",
        upstream="torch/nn/modules/module.py",
        until="torch has a public hook for it",
    ),
    PrivatePart(
        part="transformers:PreTrainedModel.save_pretrained",
        used_by=("weights/int8/sharded_folder.py",),
        why="wrapped: a state that was gathered from all ranks is packed, and not dropped for what one rank has",
        upstream="transformers/modeling_utils.py; public, and tells the quantizer nothing of this state",
        until="get_state_dict_and_metadata is told the state_dict that a caller passes",
    ),
    PrivatePart(
        part="torch:Tensor._make_wrapper_subclass",
        used_by=("weights/int8/sharded.py",),
        why="makes a tensor that counts as float and holds codes: what FSDP2's extension for all-gathers asks for",
        upstream="torch/_tensor.py; as in torch.testing._internal.two_tensor, no public counterpart",
        until="torch has a public base class for such tensors",
    ),
    PrivatePart(
        part="torch:ops.aten._to_copy",
        used_by=("weights/int8/sharded.py",),
        why="what `Tensor.to` arrives as: codes are moved, and keep being codes",
        upstream="ATen/native/native_functions.yaml",
        until="a tensor subclass can say how it is moved",
    ),
    PrivatePart(
        part="torch:ops.aten._pin_memory",
        used_by=("weights/int8/sharded.py",),
        why="what `Tensor.pin_memory` arrives as: FSDP2 pins what it offloads",
        upstream="ATen/native/native_functions.yaml",
        until="a tensor subclass can say how it is moved",
    ),
    PrivatePart(
        part="torch.distributed.fsdp._fully_shard._fsdp_param#param_data.new_zeros",
        used_by=("weights/int8/weight.py",),
        why="FSDP2 cuts a parameter by torch.chunk and copies its chunk into new_zeros: both lead to the codes",
        upstream="torch/distributed/fsdp/_fully_shard/_fsdp_param.py: fsdp_pre_all_gather is for what is cut already",
        until="FSDP2 asks a parameter for its part",
    ),
    PrivatePart(
        part="torch.nn.modules.module#_parameters",
        used_by=(
            "weights/int8/awaited.py",
            "weights/int8/holder.py",
            "weights/int8/linear.py",
            "weights/int8/parallel.py",
            "weights/int8/sharded.py",
            "weights/int8/sharded_layer.py",
            "weights/int8/tables.py",
        ),
        why="takes codes and scales out of the way while torch moves or loads the rest; lends floats in their place",
        upstream="torch/nn/modules/module.py",
        until="torch has public hooks for both",
    ),
    PrivatePart(
        part="torch.nn:Module._load_from_state_dict",
        used_by=("weights/int8/holder.py", "weights/int8/linear.py"),
        why="a float weight of a checkpoint is quantised as it is loaded; torch names it as the place for that",
        upstream="torch/nn/modules/module.py",
        until="torch has a public hook for it",
    ),
    PrivatePart(
        part="torch.nn:Module._save_to_state_dict",
        used_by=("weights/int8/holder.py", "weights/int8/linear.py"),
        why="codes are saved in a shape that no plain layer takes; torch names it as the place for that",
        upstream="torch/nn/modules/module.py",
        until="8-bit weights are saved in a format that others read",
    ),
    PrivatePart(
        part="transformers.core_model_loading#_is_hf_initialized",
        used_by=("weights/int8/awaited.py", "weights/int8/linear.py", "weights/int8/tables.py"),
        why="tells codes and scales that were read from those that were missing and made anew",
        upstream="transformers/core_model_loading.py, set_param_for_module",
        until="quantizers are told which tensors were missing",
    ),
    PrivatePart(
        part="torch.autograd:Variable._execution_engine",
        used_by=("optimizer/release.py",),
        why="a callback at the end of backward, before DDP waits for other ranks",
        upstream="torch/autograd/variable.py; DDP and FSDP2 use it so",
        until="torch has a public hook for the end of backward",
    ),
    PrivatePart(
        part="torch:_foreach_copy_",
        used_by=("optimizer/adamw.py",),
        why="many tensors in one launch",
        upstream=_FOREACH,
        until="torch gives them public names",
    ),
    PrivatePart(
        part="torch:_foreach_sub_",
        used_by=("optimizer/adamw.py",),
        why="many tensors in one launch",
        upstream=_FOREACH,
        until="torch gives them public names",
    ),
    PrivatePart(
        part="torch:_foreach_norm",
        used_by=("ranks/placement.py",),
        why="many tensors in one launch",
        upstream=_FOREACH,
        until="torch gives them public names",
    ),
    PrivatePart(
        part="torch:_foreach_add_",
        used_by=("optimizer/unread_flags.py",),
        why="many tensors in one launch",
        upstream=_FOREACH,
        until="torch gives them public names",
    ),
    PrivatePart(
        part="torch._subclasses.fake_tensor:FakeTensorMode",
        used_by=("reports/predicted/estimate.py",),
        why="runs a step on tensors without contents",
        upstream="torch/_subclasses/fake_tensor.py",
        until="torch has it under a public name",
    ),
    PrivatePart(
        part="torch._subclasses.fake_tensor:FakeTensor",
        used_by=("reports/predicted/trace.py",),
        why="tells a tensor without contents",
        upstream="torch/_subclasses/fake_tensor.py",
        until="torch has it under a public name",
    ),
    PrivatePart(
        part="torch.utils._python_dispatch:TorchDispatchMode",
        used_by=("reports/predicted/trace.py",),
        why="sees every operation of forward and backward",
        upstream="torch/utils/_python_dispatch.py",
        until="torch has it under a public name",
    ),
    PrivatePart(
        part="torch.utils._pytree:tree_iter",
        used_by=("reports/predicted/batch.py", "reports/predicted/trace.py"),
        why="finds the tensors among the arguments of an operation",
        upstream="torch/utils/_pytree.py; torch.utils.pytree has no iterator",
        until="torch.utils.pytree has one",
    ),
    PrivatePart(
        part="torch:UntypedStorage._cdata",
        used_by=("reports/predicted/trace.py",),
        why="tells storages apart, with and without contents",
        upstream="torch/storage.py",
        until="storages without contents have a public identity",
    ),
    PrivatePart(
        part="torch:ops.aten._local_scalar_dense",
        used_by=("reports/predicted/trace.py",),
        why="a number that is read from a tensor without contents gets a value",
        upstream="aten/src/ATen/native/native_functions.yaml",
        until="tensors without contents answer item()",
    ),
    PrivatePart(
        part="torch:ops.aten._scaled_dot_product_flash_attention_for_cpu",
        used_by=("reports/predicted/fused.py",),
        why="what fused attention keeps, on the meta device",
        upstream="aten/src/ATen/native/native_functions.yaml",
        until="the meta device takes the fused kernel of the device that it stands for",
    ),
    PrivatePart(
        part="torch.nn.functional:scaled_dot_product_attention",
        used_by=("reports/predicted/fused.py",),
        why="replaced while memory is predicted, for the meta device has no fused kernel",
        upstream="torch/nn/functional.py; public",
        until="the meta device takes the fused kernel of the device that it stands for",
    ),
    PrivatePart(
        part="torch.nn.functional:grouped_mm",
        used_by=("reports/predicted/fused.py",),
        why="replaced while memory is predicted, for the meta device cannot read the sizes of its groups",
        upstream="torch/nn/functional.py; public, from torch 2.10",
        until="the meta device computes it",
        everywhere=False,
    ),
    PrivatePart(
        part="huggingface_hub.utils:httpx",
        used_by=("reports/card/hub_client.py", "reports/card/pushing.py"),
        why="the errors of a network that fails, from whichever httpx the Hub client uses",
        upstream="huggingface_hub/utils/__init__.py; not exported",
        until=_HUB_ERRORS,
    ),
    PrivatePart(
        part="huggingface_hub.utils:yaml_dump",
        used_by=("reports/card/render.py",),
        why="writes metadata as the Hub's own cards do",
        upstream="huggingface_hub/utils/__init__.py; not exported",
        until="huggingface_hub exports it",
    ),
    PrivatePart(
        part="deepspeed.runtime.zero.partition_parameters#ds_shape",
        used_by=("ranks/slices.py",),
        why="a parameter that zero.Init has cut is empty, and what is a matrix is told by its shape",
        upstream="deepspeed/runtime/zero/partition_parameters.py; transformers and peft read it too",
        until="DeepSpeed has a function that tells the shape of a parameter",
        everywhere=False,
    ),
    PrivatePart(
        part="deepspeed.runtime.zero.partition_parameters#ds_numel",
        used_by=("ranks/slices.py",),
        why="how many parameters lie in a part follows from their sizes",
        upstream="deepspeed/runtime/zero/partition_parameters.py; transformers and peft read it too",
        until="DeepSpeed has a function that tells the shape of a parameter",
        everywhere=False,
    ),
)
"""The rows, by upstream."""
