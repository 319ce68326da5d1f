"""Tests of both packages; ``tests.support``, what they share, also serves the benchmarks and docs/accuracy.md.

TRITON_INTERPRET=1 and KSSM_CUDA_ON_HOST=1 put the GPU backends on CPU tensors beside the others: a test that takes the
fixture ``backend`` then runs on them too. Done here, where a data loader's worker comes by as well.
"""

import os

from kssm_kernels.backends import cuda as library
from kssm_kernels.backends import triton
from tests.support.cuda_on_host.build import build
from tests.support.triton_interpreter import round_to_bfloat16

if os.environ.get("KSSM_CUDA_ON_HOST", "") == "1":
    library.use(build())
if triton.interpreting() and triton.status()[0]:
    round_to_bfloat16()
