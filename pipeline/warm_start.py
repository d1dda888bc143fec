"""`init.weights`: a run that starts from another run's weights, an exported backbone's, or a dense model's (upcycled into experts).

Only weights come over, of the average (teacher) by default: optimizer, schedules, data order and step count start anew. To go on with
all of them from another run's step, use `--resume PATH` instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.errors import RunFailure, UsageError
from cluster.ranks import Ranks
from model.warm_start import Filled, plan_fill, value_of
from pipeline.config import PretrainConfig
from pipeline.parallel.zero import logical

log = logging.getLogger(__name__)
BACKBONE = "skysense."


def start_warm(student: nn.Module, config: PretrainConfig, ranks: Ranks, device: torch.device) -> dict[str, Any] | None:
    """Fills the student before its engine is built, a rank's experts with what is theirs. Collective. None without `init.weights`.

    The first rank reads the source, whole; the others get one tensor after the other.

    Returns where the weights come from: `weights`, `step`, `samples`, `fingerprint`, `run_id`, and what was filled.

    Raises:
        UsageError: no such run, or a backbone that does not fit, unless `init.partial` allows it.
    """
    if config.init.weights is None:
        return None
    source: dict[str, Tensor] = {}
    box: list[Any] = [None]
    if ranks.is_first:
        try:
            source, facts = read_weights(str(config.init.weights), config.init.owner)
            shapes = {name: logical(parameter)[0] for name, parameter in student.named_parameters()}
            filled = plan_fill(shapes, source)
            refuse_gaps(filled, config.init.partial)
            box = [({**facts, "filled": str(filled)}, (*filled.copied, *filled.upcycled))]
        except (UsageError, RunFailure) as error:
            box = [f"init.weights={config.init.weights}: {error}"]
    if ranks.world > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], str):
        raise UsageError(box[0])
    told, names = box[0]
    _fill(student, names, source, config, ranks, device)
    if ranks.is_first:
        log.info("weights of %s: %s", told["weights"], told["filled"])
    return told


@torch.no_grad()
def _fill(
    student: nn.Module, names: Iterable[str], source: Mapping[str, Tensor], config: PretrainConfig, ranks: Ranks,
    device: torch.device,
) -> None:  # fmt: skip
    """One read of the storage, whatever the number of ranks, and beside it one whole tensor at a time."""
    parameters = dict(student.named_parameters())
    for name in names:
        parameter = parameters[name]
        shape, first = logical(parameter)
        if ranks.is_first:
            value = value_of(name, shape, source, config.model.moe.top_k, config.train.seed)
            whole = value.to(device, torch.float32).contiguous()
        else:
            whole = torch.empty(shape, device=device)
        if ranks.world > 1:
            dist.broadcast(whole, src=0)
        parameter.copy_(whole.view(-1)[first : first + parameter.numel()].view_as(parameter))


def refuse_gaps(filled: Filled, partial: bool) -> None:
    """A backbone that is filled in parts is a different experiment, and so asked for by name. Heads may always be new.

    Raises:
        UsageError: some tensor of the backbone or the fusion stays as drawn; without `partial`, or if all of them do.
    """
    gaps = filled.of(BACKBONE)
    if not gaps:
        return
    name, why = next(iter(gaps.items()))
    of = sum(one.startswith(BACKBONE) for one in (*filled.copied, *filled.upcycled)) + len(gaps)
    said = f"{len(gaps)} of {of} tensors of the backbone do not fit, the first being {name} ({why})"
    if len(gaps) == of:
        raise UsageError(f"{said}; is it a model of the same size and sensors?")
    if not partial:
        raise UsageError(f"{said}; make the model settings equal, or set init.partial=true to fill only the rest")


def read_weights(url: str, owner: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights under the student's names, where they come from) of an exported file, a checkpoint, or a run directory."""
    if url.endswith(".safetensors"):
        from pipeline.export import load_model

        model = load_model(url)
        facts = {key: model.facts.get(key) for key in ("step", "samples", "fingerprint", "run_id")}
        named = model.skysense.named_parameters()
        return {f"{BACKBONE}{name}": value.detach() for name, value in named}, {"weights": url, **facts}
    from pipeline.checkpoint import consolidated

    weights, checkpoint = consolidated(url, owner)
    kept = {key: checkpoint.manifest.get(key) for key in ("fingerprint", "run_id")}
    return weights, {"weights": checkpoint.url, "step": checkpoint.step, "samples": checkpoint.samples, **kept}
