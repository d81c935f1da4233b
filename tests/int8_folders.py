"""Folders of 8-bit models: loaded to be trained on, and written in our own layout."""

from transformers import AutoModelForCausalLM

from hf_stateless import Int8TrainingConfig


def load_int8_folder(folder, kind=AutoModelForCausalLM, **kwargs):
    """Load a folder that `save_pretrained` wrote, to train on with its bytes."""
    return kind.from_pretrained(folder, quantization_config=Int8TrainingConfig(), **kwargs)


def save_in_own_layout(model, folder, **kwargs):
    """Write `weight` and `weight_scale` as they stand in the state dict, and the arguments of the config."""
    quantizer, config = model.hf_quantizer, model.hf_quantizer.quantization_config
    described, config._described = config._described, None
    quantizer.get_state_dict_and_metadata = lambda model: (None, {})
    try:
        model.save_pretrained(folder, **kwargs)
    finally:
        config._described = described
        del quantizer.get_state_dict_and_metadata
    return folder
