"""Reads checkpoints of ``torch.distributed.checkpoint`` without running what is in them.

Their tensors are loaded with ``weights_only``, but torch unpickles the metadata, which can name any function to call.
Here it may name the few classes that metadata is made of.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from .checkpoint_files import METADATA, CheckpointError

_METADATA = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_CLASSES: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, name): getattr(metadata, name) for name in _METADATA},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    # Names by which pathlib's class was known to versions of Python.
    **{(module, "PosixPath"): Path for module in ("pathlib", "pathlib._local")},
}


class PlainReader(FileSystemReader):
    """As torch's, of metadata that holds nothing but metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """
        Raises:
            OSError: there is none.
            CheckpointError: it holds something else, which is named.
        """
        path = Path(self.path, METADATA)
        with path.open("rb") as file:
            try:
                read = _MetadataUnpickler(file).load()
            except CheckpointError:
                raise
            except Exception as error:  # whatever damaged bytes make of it
                raise CheckpointError(f"{str(path)!r} is damaged: {error}") from error
        if not isinstance(read, Metadata):
            raise CheckpointError(f"{str(path)!r} holds a {type(read).__name__}, no metadata")
        for info in (read.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path:
                raise CheckpointError(
                    f"{str(path)!r} points to {info.relative_path!r}, which is outside; do not use this checkpoint"
                )
        if read.storage_meta is None:
            read.storage_meta = StorageMeta()
        read.storage_meta.load_id = self.load_id
        return read


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _CLASSES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"the metadata of a checkpoint wants to call {module}.{name}, which is no metadata; do not use this checkpoint"
        )
