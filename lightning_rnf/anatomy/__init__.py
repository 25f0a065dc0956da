"""What a model is made of: units, heads, shared parameters, and what flows into what.

A trace of one batch says which layers run and which head makes the logits; the graph of the forward says which channels
are read by whom. All that is learned about a network is learned here, and everybody above asks here.
"""

from lightning_rnf.anatomy.channels import Channels, Known, LiteralArgument, effect_of_function, effect_of_module
from lightning_rnf.anatomy.exported import followed
from lightning_rnf.anatomy.flow import Flow, Stop, described
from lightning_rnf.anatomy.graph import (
    NotFollowedError,
    Traced,
    bare,
    computes_itself,
    silenced,
    tensor_copy,
    torch_class,
)
from lightning_rnf.anatomy.grouped import LAYERS, by_group, folded, layer_form
from lightning_rnf.anatomy.inputs import Inputs
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
from lightning_rnf.anatomy.wider import Places, Wider, content, widened
from lightning_rnf.anatomy.wiring import Wiring

__all__ = [
    "BATCH_NORMS",
    "CHANNEL_NORMS",
    "LAYERS",
    "OUTPUT_AXIS",
    "TRANSPOSED",
    "Channels",
    "Flow",
    "Inputs",
    "Known",
    "LiteralArgument",
    "NotFollowedError",
    "Places",
    "Predict",
    "Routes",
    "SilentHook",
    "Stop",
    "Traced",
    "UnitLayer",
    "UnitMap",
    "Wider",
    "Wiring",
    "answers",
    "bare",
    "by_group",
    "check_kinds",
    "computes_itself",
    "content",
    "described",
    "effect_of_function",
    "effect_of_module",
    "folded",
    "followed",
    "form",
    "joined",
    "layer_form",
    "measure",
    "predict_checked",
    "silenced",
    "supervised",
    "tensor_copy",
    "torch_class",
    "true_labels",
    "widened",
]
