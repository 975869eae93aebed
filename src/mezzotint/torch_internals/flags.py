"""Switches of CUDA's libraries, read without starting a driver."""

from collections.abc import Callable

from mezzotint.torch_internals.registry import Feature, value

_GHOST = (Feature.GHOST,)

allows_tf32_matmul: Callable[[], bool] = value(
    "torch._C._get_cublas_allow_tf32", "whether TF32 is allowed in matmuls", needed_by=_GHOST
)
allows_tf32_convolution: Callable[[], bool] = value(
    "torch._C._get_cudnn_allow_tf32", "whether TF32 is allowed in convolutions", needed_by=_GHOST
)
allow_tf32_matmul: Callable[[bool], None] = value(
    "torch._C._set_cublas_allow_tf32", "allowing TF32 in matmuls", needed_by=_GHOST
)
allow_tf32_convolution: Callable[[bool], None] = value(
    "torch._C._set_cudnn_allow_tf32", "allowing TF32 in convolutions", needed_by=_GHOST
)
is_cudnn_benchmark: Callable[[], bool] = value(
    "torch._C._get_cudnn_benchmark", "the switch of cuDNN's benchmarks", needed_by=_GHOST
)
set_cudnn_benchmark: Callable[[bool], None] = value(
    "torch._C._set_cudnn_benchmark", "setting back cuDNN's benchmarks", needed_by=_GHOST
)
is_cudnn_deterministic: Callable[[], bool] = value(
    "torch._C._get_cudnn_deterministic", "the switch of deterministic cuDNN", needed_by=_GHOST
)
set_cudnn_deterministic: Callable[[bool], None] = value(
    "torch._C._set_cudnn_deterministic", "setting back deterministic cuDNN", needed_by=_GHOST
)
