"""TensorRT plugins of the project's operators, built from Triton's ahead-of-time PTX; no C++, nothing compiled at run.

TensorRT embeds the PTX in the engine and launches it with the pointers of the inputs, then integers, then the pointers
of the outputs. `spec.py`: what a plugin is, without TensorRT; `dilated_attention.py`, `pool_norm_pad.py`: the two of
them; `kernels.py`: the kernel that needs another order of parameters; `ptx.py`: the entry of a kernel as TensorRT
launches it; `register.py`: the only file that imports `tensorrt`, and only when called.
"""
