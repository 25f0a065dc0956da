"""What a model is made of: units, heads, shared parameters, and what flows into what.

A trace of one batch says which layers run and which head makes the logits; the graph of the forward says which channels
are read by whom. All that is learned about a network is learned here, and everybody above asks here.
"""

from lightning_rnf.anatomy.calls import function_name, node_argument
from lightning_rnf.anatomy.channels import (
    Channels,
    Effect,
    Known,
    LiteralArgument,
    Read,
    effect_of_function,
    effect_of_module,
)
from lightning_rnf.anatomy.graph import Traced, bare, computes_itself, silenced, tensor_copy, torch_class
from lightning_rnf.anatomy.grouped import LAYERS, absorbs, by_group, constant_output, folded, layer_form
from lightning_rnf.anatomy.layers import (
    BATCH_NORMS,
    CHANNEL_NORMS,
    OUTPUT_AXIS,
    TRANSPOSED,
    SilentHook,
    UnitLayer,
    check_kinds,
)
from lightning_rnf.anatomy.predict import Predict, answers, measure, predict_checked, supervised, true_labels
from lightning_rnf.anatomy.routing import Routes, joined
from lightning_rnf.anatomy.trace import form
from lightning_rnf.anatomy.units import UnitMap

__all__ = [
    "BATCH_NORMS",
    "CHANNEL_NORMS",
    "LAYERS",
    "OUTPUT_AXIS",
    "TRANSPOSED",
    "Channels",
    "Effect",
    "Known",
    "LiteralArgument",
    "Predict",
    "Read",
    "Routes",
    "SilentHook",
    "Traced",
    "UnitLayer",
    "UnitMap",
    "absorbs",
    "answers",
    "bare",
    "by_group",
    "check_kinds",
    "computes_itself",
    "constant_output",
    "effect_of_function",
    "effect_of_module",
    "folded",
    "form",
    "function_name",
    "joined",
    "layer_form",
    "measure",
    "node_argument",
    "predict_checked",
    "silenced",
    "supervised",
    "tensor_copy",
    "torch_class",
    "true_labels",
]
