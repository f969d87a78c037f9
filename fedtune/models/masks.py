"""Attention masks under `torch.func.vmap`."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import transformers


@contextmanager
def masks_from_shapes() -> Iterator[None]:
    """A context in which transformers builds attention masks without reading the values of a padding mask, which vmap does not allow.

    transformers does this during tracing, so only its check for tracing is patched. Passing our own 4-D masks would be wrong for layers
    with different masks (sliding windows) and for position ids, which are derived from the 2-D mask.
    """
    with mock.patch.object(transformers.masking_utils, "is_tracing", lambda *args: True):
        yield
