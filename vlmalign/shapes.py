"""Shape annotations for array arguments: jaxtyping's where it is installed, plain `Any` where it is not.

The numerical rooms must import with nothing but jax, flax, optax, numpy and safetensors, so jaxtyping (a test
dependency, where every annotation is checked) cannot be required here.
"""

try:
    from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, UInt, UInt8
except ImportError:
    from typing import Any

    from jax import Array
    from jax.typing import ArrayLike

    class _Unchecked:
        def __class_getitem__(cls, item: object) -> object:
            return Any

    Bool = Float = Int = Key = UInt = UInt8 = _Unchecked

__all__ = ["Array", "ArrayLike", "Bool", "Float", "Int", "Key", "UInt", "UInt8"]
