"""How files of the hub name the tensors that transformers holds in memory under its present names.

A literal table, written down from the hub's files and not derived from the product's own renaming rules.
"""

import re

#: model_type -> (the beginning of a present name, the beginning of the hub's)
HUB_NAMES = {
    "gemma3": (
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
    ),
    "qwen2_5_vl": ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    # The text families' names have never changed.
    "gemma3_text": (),
    "llama": (),
    "mistral": (),
    "qwen2": (),
}


def hub_name(present: str, model_type: str) -> str:
    """The name in files of the hub of the tensor that transformers calls `present`."""
    for pattern, old in HUB_NAMES[model_type]:
        if re.match(pattern, present):
            return re.sub(pattern, old, present)
    return present
