"""The element-wise operations of Wan's block as Triton kernels: the functions of `wan_ext.fused_ops` by their names.

What: each function of `wan_ext.fused_ops`, whose docstrings say what it computes, as one kernel that reads its operands
once and writes its result once. The sums over tokens that only a trained modulation or a trained norm needs are the
reference's own.

How: `wan_ext.fused_ops.ops_for(device)` imports this package where it applies: it imports Triton, so nothing that a CPU
user runs may import it by itself. One program a row of the residual stream, all of the row in registers; rows may lie
apart (a slice of tokens, a slice of channels). Offsets are 64 bits wide: 75,600 tokens of 13,824 numbers are 2 GB in
bfloat16, and a batch of them is more than 2^31 numbers.

Cost: the bytes of operands and result, in one pass. At 32,760 tokens of width 5,120: norm + modulation 1.0 GB, query or
key norm + rotation 0.67 GB, gate + residual 1.7 GB; unfused they are 3 to 5 times that. Each kernel compiles on its
first use, a second or two for each combination of dtypes.

Exact: everything between load and store is float32. float64 is refused: it would be rounded.
"""

from wan_ext.fused_ops import gate_residual_sum, norm_modulate_sums, rms_rope_sum, row_rrms
from wan_ext.kernels.gate_residual import gate_residual_backward, gate_residual_forward
from wan_ext.kernels.gelu import gelu_backward, gelu_forward
from wan_ext.kernels.norm_modulate import norm_modulate_backward, norm_modulate_forward
from wan_ext.kernels.rms_rope import rms_rope_backward, rms_rope_forward

__all__ = [
    "gate_residual_backward",
    "gate_residual_forward",
    "gate_residual_sum",
    "gelu_backward",
    "gelu_forward",
    "norm_modulate_backward",
    "norm_modulate_forward",
    "norm_modulate_sums",
    "rms_rope_backward",
    "rms_rope_forward",
    "rms_rope_sum",
    "row_rrms",
]
