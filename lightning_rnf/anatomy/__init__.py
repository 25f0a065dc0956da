"""What a model is made of: units, heads, shared parameters, and what flows into what.

A trace of one batch says which layers run and which head makes the logits; the graph of the forward says which channels
are read by whom. All that is learned about a network is learned here, and everybody above asks here.
"""

from lightning_rnf.anatomy.calls import node_argument
from lightning_rnf.anatomy.channels import Channels, Known, LiteralArgument, effect_of_function, effect_of_module
from lightning_rnf.anatomy.embeddings import looks_up, rows_read
from lightning_rnf.anatomy.explained import Explained
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
from lightning_rnf.anatomy.kinds import OUTPUT_AXIS, TRANSPOSED, is_layer, is_transposed, register_layer
from lightning_rnf.anatomy.layers import BATCH_NORMS, CHANNEL_NORMS, SilentHook, UnitLayer, mixes_channels
from lightning_rnf.anatomy.matching import check_kinds
from lightning_rnf.anatomy.packed import OUTPUT, ROLES, Packed, by_parts, is_attention
from lightning_rnf.anatomy.predict import (
    Flat,
    Predict,
    answers,
    logits_of,
    measure,
    predict_checked,
    supervised,
    true_labels,
)
from lightning_rnf.anatomy.recurrent import RECURRENT, Cells, cells_of, is_recurrent, parameter_names, why_not_units
from lightning_rnf.anatomy.routing import Routes, joined
from lightning_rnf.anatomy.targets import (
    Layout,
    ignored_by,
    in_front,
    is_numbers,
    largest_logits,
    rows_of_samples,
)
from lightning_rnf.anatomy.trace import form
from lightning_rnf.anatomy.units import UnitMap, norm_parameters
from lightning_rnf.anatomy.wider import Places, Wider, content, widened
from lightning_rnf.anatomy.wiring import Wiring

__all__ = [
    "BATCH_NORMS",
    "CHANNEL_NORMS",
    "LAYERS",
    "OUTPUT",
    "OUTPUT_AXIS",
    "RECURRENT",
    "ROLES",
    "TRANSPOSED",
    "Cells",
    "Channels",
    "Explained",
    "Flat",
    "Flow",
    "Inputs",
    "Known",
    "Layout",
    "LiteralArgument",
    "NotFollowedError",
    "Packed",
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
    "by_parts",
    "cells_of",
    "check_kinds",
    "computes_itself",
    "content",
    "described",
    "effect_of_function",
    "effect_of_module",
    "folded",
    "followed",
    "form",
    "ignored_by",
    "in_front",
    "is_attention",
    "is_layer",
    "is_numbers",
    "is_recurrent",
    "is_transposed",
    "joined",
    "largest_logits",
    "layer_form",
    "logits_of",
    "looks_up",
    "measure",
    "mixes_channels",
    "node_argument",
    "norm_parameters",
    "parameter_names",
    "predict_checked",
    "register_layer",
    "rows_of_samples",
    "rows_read",
    "silenced",
    "supervised",
    "tensor_copy",
    "torch_class",
    "true_labels",
    "why_not_units",
    "widened",
]
