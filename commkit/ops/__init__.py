"""commkit's kernels as torch operators: schema, fake and pure-torch reference in one place.

The reference is registered as the default kernel, so that a compiled kernel for one device takes over by
registering for the same name and no caller changes. Payload formats are part of the contract and are the
same for every kernel, bit for bit.
"""

from . import native
from .definitions import NAMESPACE, OPS
from .functions import (
    accumulate_blocks_,
    accumulate_e3m0_,
    accumulate_signs_,
    combine_tiles_,
    correct_momentum_,
    dequantize_blocks,
    dequantize_codebook,
    dequantize_e3m0,
    dequantize_natural,
    dgc_step_,
    encode_signs,
    frozen_adam_,
    largest_of_rows,
    pack_codes,
    pack_nibbles,
    pack_signs,
    pack_ternary,
    quantize_blocks,
    quantize_buckets,
    quantize_codebook,
    quantize_e3m0,
    quantize_natural,
    sample_threshold,
    scatter_accumulate_,
    select_at_least,
    stratified_indices,
    ternarize,
    two_norm,
    uniform_noise,
    unpack_codes,
    unpack_nibbles,
    unpack_signs,
    unpack_ternary,
    write_blocks_,
    write_e3m0_,
    write_signs_,
)
from .native import empty
from .selection import largest_from

native.register()

__all__ = [
    "NAMESPACE",
    "OPS",
    "accumulate_blocks_",
    "accumulate_e3m0_",
    "accumulate_signs_",
    "combine_tiles_",
    "correct_momentum_",
    "dequantize_blocks",
    "dequantize_codebook",
    "dequantize_e3m0",
    "dequantize_natural",
    "dgc_step_",
    "empty",
    "encode_signs",
    "frozen_adam_",
    "largest_from",
    "largest_of_rows",
    "pack_codes",
    "pack_nibbles",
    "pack_signs",
    "pack_ternary",
    "quantize_blocks",
    "quantize_buckets",
    "quantize_codebook",
    "quantize_e3m0",
    "quantize_natural",
    "sample_threshold",
    "scatter_accumulate_",
    "select_at_least",
    "stratified_indices",
    "ternarize",
    "two_norm",
    "uniform_noise",
    "unpack_codes",
    "unpack_nibbles",
    "unpack_signs",
    "unpack_ternary",
    "write_blocks_",
    "write_e3m0_",
    "write_signs_",
]
