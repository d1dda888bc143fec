"""How many operations a step launches, and how often the host waits for the device in it: counts, the same on any machine and load.

Operations are what torch dispatches, forward and backward, less those that only look at memory another way. A wait is an operation
whose result the host must see before it can go on; on a CPU nothing waits, but the same calls would on an accelerator.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = frozenset(
    [
        "view",
        "t",
        "transpose",
        "permute",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "_unsafe_view",
        "detach",
        "split",
        "split_with_sizes",
        "unbind",
        "alias",
        "as_strided",
        "diagonal",
        "lift_fresh",
        "unfold",
        "_reshape_alias",
    ]
)
WAITS = frozenset(
    [
        "_local_scalar_dense",
        "nonzero",
        "bincount",
        "masked_select",
        "_unique",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "is_nonzero",
        "equal",
        "_linalg_check_errors",
    ]
)
READS = (
    torch.Tensor.tolist,
    torch.Tensor.cpu,
)  # to the host in one call that dispatches nothing when it is there already


class Operations(TorchDispatchMode):
    """Counts within a `with` block; `names` by operation, `waits` by cause."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._reads = _Reads(self.waits)

    @property
    def count(self) -> int:
        return sum(number for name, number in self.names.items() if name not in VIEWS)

    @property
    def synchronisations(self) -> int:
        return sum(self.waits.values())

    def __enter__(self) -> Operations:
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._reads.__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.names[name] += 1
        by_mask = name == "index" and any(t is not None and t.dtype is torch.bool for t in args[1])
        by_data = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITS or by_mask or by_data:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))
