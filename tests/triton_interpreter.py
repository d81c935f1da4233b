"""Triton's interpreter, mended: to be imported by tests whose kernels run in it."""

import contextlib

import numpy


with contextlib.suppress(ImportError):
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _with_index(tensor, scope):
        """Give numbers in kernels an `__index__`: that of Triton 3.6 takes arrays of one, which numpy 2.4 refuses."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(numpy.squeeze(self.handle.data)))

    interpreter._patch_lang_tensor = _with_index
