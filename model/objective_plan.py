"""Which heads an objective has, with their input dims and parameter counts; no torch (the dry run counts with it too)."""

from __future__ import annotations

from data_prep.schema import MODALITIES
from model.config import ModelConfig, ObjectiveConfig

# of the decoder of masked tokens (`model.token_decoder`)
BLOCKS = 4  # blocks per side of a token's pixels
DAY_WAVES, PLACE_WAVES = 3, 4
DECODER_HEADS = 4
PROJECTION_DIM = 64


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


def cross_heads(objective: ObjectiveConfig) -> list[str]:
    """Heads of the cross-sensor term: one beside each fused head that scores one of its levels."""
    if not objective.cross_weight:
        return []
    return list(dict.fromkeys(head_of("fused", level, objective) for level in objective.cross_levels))


def restore_targets(model: ModelConfig) -> dict[str, int]:
    """Numbers per ground cell that restoration regresses, by sensor (`model.restore`)."""
    return {m: len(MODALITIES[m].bands) * (2 if MODALITIES[m].is_series else 4) for m in model.modalities}


def masked_targets(model: ModelConfig, objective: ObjectiveConfig) -> dict[str, int]:
    """Numbers per token that the token decoder predicts, by sensor."""
    found = {}
    for m in model.modalities:
        stride = model.stride(m)
        side = stride // BLOCKS if stride % BLOCKS == 0 else stride
        pixels = len(MODALITIES[m].bands) * (stride // side) ** 2 * (2 if side > 1 else 1)
        found[m] = {"pixels": pixels, "projection": PROJECTION_DIM, "teacher": model.dims[3]}[objective.masked_target]
    return found


def uses_ita(objective: ObjectiveConfig) -> bool:
    """ITA needs class embeddings; without a file it is off."""
    return bool(objective.ita_weight and objective.ita_embeddings)


def count_parameters(
    model: ModelConfig, objective: ObjectiveConfig, text_dim: int = 384, num_classes: int = 0
) -> dict[str, int]:
    """Parameters of heads, decoder layer with queries, ITA projection, geo-context and the prediction terms.

    text_dim: width of the text vectors. num_classes: dense classes of the shard set, for `labels_weight`.
    """
    fused = model.fusion_dim
    hidden, bottleneck, prototypes = objective.head_hidden, objective.head_bottleneck, objective.prototypes
    inputs = [*head_dims(model, objective).values(), *(model.dims[3] for _ in cross_heads(objective))]
    heads = sum(
        dim * hidden + hidden + hidden * hidden + hidden + hidden * bottleneck + bottleneck + prototypes * bottleneck
        for dim in inputs
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
        "prediction": _prediction(model, objective) + ((fused + 1) * num_classes if objective.labels_weight else 0),
    }


def _prediction(model: ModelConfig, objective: ObjectiveConfig) -> int:
    """Parameters of `model.prediction.Prediction` but for its label head."""
    x, dense, fused = objective.predictor_hidden, model.dims[3], model.fusion_dim
    total = 0
    if objective.restore_weight:
        out = sum(restore_targets(model).values())
        total += sum((dim + 1) * x + (x + 1) * out for dim in [*(dense for _ in model.modalities), fused])
    if objective.site_weight:
        total += sum((dim + 1) * x + (x + 1) * objective.head_bottleneck for dim in (dense, fused))
    if objective.masked_weight:  # query embeddings, memory, one block, outputs
        total += len(model.modalities) * x + (2 * DAY_WAVES + 1) * x + (4 * PLACE_WAVES + 1) * x
        total += 2 * fused + (fused + 1) * x + 4 * x + 4 * (x + 1) * x + 8 * x * x + 5 * x
        total += sum((x + 1) * out for out in masked_targets(model, objective).values())
    return total


def prediction_flops(
    model: ModelConfig, objective: ObjectiveConfig, tokens: dict[str, tuple[int, int]], cells: int
) -> int:
    """FLOPs of the prediction terms on one global view of one site, forward.

    tokens: (dates, final tokens per date) of each sensor. cells: of the fused grid.
    """
    x, dense, fused = objective.predictor_hidden, model.dims[3], model.fusion_dim
    sources, total = [*(dense for _ in model.modalities), fused], 0
    if objective.restore_weight:
        total += sum(2 * cells * x * (dim + sum(restore_targets(model).values())) for dim in sources)
    if objective.site_weight:
        total += sum(2 * x * (dim + objective.head_bottleneck) for dim in sources)
    if objective.masked_weight:
        number = sum(dates * per_date for dates, per_date in tokens.values())
        total += 2 * cells * fused * x + len(tokens) * 2 * cells * x * 2 * x  # memory; keys and values per sensor
        total += number * (2 * 10 * x * x + 4 * cells * x)  # query and output projections, FFN; scores
        total += sum(
            2 * d * n * x * out for (d, n), out in zip(tokens.values(), masked_targets(model, objective).values())
        )
    for head in cross_heads(objective):
        levels = [level for level in objective.mgcl_levels if head_of("fused", level, objective) == head]
        rows = sum(
            {"object": objective.object_clusters, "image": 1}.get(v, min(objective.pixel_pairs, cells)) for v in levels
        )
        hidden, bottleneck = objective.head_hidden, objective.head_bottleneck
        row = dense * hidden + hidden * hidden + hidden * bottleneck + bottleneck * objective.prototypes
        total += 2 * len(model.modalities) * rows * row
    return total
