"""The GPU's backend: Triton kernels for CUDA and ROCm. Arguments arrive checked, see `ops`.

Importing this needs Triton but no GPU. Under TRITON_INTERPRET=1 the same functions take CPU tensors: Triton's
interpreter runs the kernels, to test what they compute. `unlearn_kernels.aot` holds that they compile for each GPU.
No GPU has timed them: block sizes and thread counts are reasoned, and marked as guesses.
"""

from unlearn_kernels.triton.combine import combine_
from unlearn_kernels.triton.grams import gram
from unlearn_kernels.triton.preconditioned import preconditioned_gram
from unlearn_kernels.triton.samples import noise_and_target, weighted_loss

__all__ = ["combine_", "gram", "noise_and_target", "preconditioned_gram", "weighted_loss"]
