"""Which heads an objective has, with their input dims and parameter counts; no torch (the dry run counts with it too)."""

from __future__ import annotations

from model.config import ModelConfig, ObjectiveConfig


def head_of(space: str, level: str, objective: ObjectiveConfig) -> str:
    """Head that scores `level` features of `space` ("dense" or "fused"): shared by the levels, or one each."""
    return space if objective.heads == "shared" else f"{space}_{level}"


def head_dims(model: ModelConfig, objective: ObjectiveConfig) -> dict[str, int]:
    """Input dim of every projection head, in construction order. A term with weight 0 has no head."""
    dims: dict[str, int] = {}
    if objective.mgcl_weight:
        for space, dim in (("dense", model.dims[3]), ("fused", model.fusion_dim)):
            dims.update({head_of(space, level, objective): dim for level in objective.mgcl_levels})
    if objective.qsacl_weight:
        dims["query"] = model.fusion_dim
    return dims


def uses_ita(objective: ObjectiveConfig) -> bool:
    """ITA needs class embeddings; without a file it is off."""
    return bool(objective.ita_weight and objective.ita_embeddings)


def count_parameters(model: ModelConfig, objective: ObjectiveConfig, text_dim: int = 384) -> dict[str, int]:
    """Parameters of heads, decoder layer with queries, ITA projection and geo-context; `text_dim`: width of the text vectors."""
    fused = model.fusion_dim
    hidden, bottleneck, prototypes = objective.head_hidden, objective.head_bottleneck, objective.prototypes
    heads = sum(
        dim * hidden + hidden + hidden * hidden + hidden + hidden * bottleneck + bottleneck + prototypes * bottleneck
        for dim in head_dims(model, objective).values()
    )
    decoder = 0
    if objective.qsacl_weight:  # two attentions (q, kv, out), an FFN of ×4, four norms, the queries
        decoder = (
            2 * (4 * fused * fused + 4 * fused) + 8 * fused * fused + 5 * fused + 8 * fused + objective.queries * fused
        )
    return {
        "heads": heads,
        "decoder": decoder,
        "ita": fused * text_dim + text_dim + 1 if uses_ita(objective) else 0,
        "geo_context": 2 * fused * fused + fused if objective.geo_context else 0,
    }
