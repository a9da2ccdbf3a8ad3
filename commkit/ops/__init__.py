"""commkit's kernels as torch operators: schema, fake and pure-torch reference in one place.

The reference is registered as the default kernel, so that a compiled kernel for one device takes over by
registering for the same name and no caller changes. Payload formats are part of the contract and are the
same for every kernel, bit for bit.
"""

from . import native
from .definitions import NAMESPACE, OPS
from .functions import (
    accumulate_blocks_,
    accumulate_signs_,
    dequantize_blocks,
    dequantize_codebook,
    dequantize_natural,
    encode_signs,
    pack_codes,
    pack_nibbles,
    pack_signs,
    pack_ternary,
    quantize_blocks,
    quantize_buckets,
    quantize_codebook,
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
    write_signs_,
)
from .native import empty

native.register()

__all__ = [
    "NAMESPACE",
    "OPS",
    "accumulate_blocks_",
    "accumulate_signs_",
    "dequantize_blocks",
    "dequantize_codebook",
    "dequantize_natural",
    "empty",
    "encode_signs",
    "pack_codes",
    "pack_nibbles",
    "pack_signs",
    "pack_ternary",
    "quantize_blocks",
    "quantize_buckets",
    "quantize_codebook",
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
    "write_signs_",
]
