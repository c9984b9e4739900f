"""dus-edge: depth up-scale a checkpoint and run it on the hardware people own.

One idea carries the package: a *Checkpoint* is a lazy source of named tensors, an
up-scaled model is a *view* of one, and *sinks* (safetensors, GGUF) stream any of them.
"""

__version__ = "0.1.0"
