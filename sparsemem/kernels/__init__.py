"""Fast forms of the model's formulas: autograd functions that save passes over memory, and the faster of the libraries
inside torch.

Each file has the plain formula, `..._reference`, beside its fast form, and a test holds them together.
`SPARSEMEM_KERNELS=reference` runs the whole model on the plain ones: for a new reader, a new processor, or to find out
whether a kernel is at fault. Losses then agree to rounding, not to the bit. A kernel must not know layers.
"""

import os

from sparsemem.values import ConfigError

_CHOICES = ("fast", "reference")
_CHOSEN = os.environ.get("SPARSEMEM_KERNELS") or "fast"
if _CHOSEN not in _CHOICES:
    raise ConfigError(
        f"environment variable SPARSEMEM_KERNELS has the value {_CHOSEN!r}; choose one of {', '.join(_CHOICES)}"
    )
REFERENCE = _CHOSEN == "reference"
