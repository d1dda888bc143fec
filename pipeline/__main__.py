"""`python -m pipeline COMMAND …`: train, probe, export, embed, compare, benchmark."""

from __future__ import annotations

import sys

from cluster.cli import dispatch

COMMANDS = {
    "train": ("pipeline.commands.train", "pretrain: any number of processes, ZeRO and expert parallelism, resumable"),
    "probe": ("pipeline.commands.probe", "k-NN, linear or segmentation score of a checkpoint"),
    "evaluate": (
        "pipeline.commands.evaluate",
        "published labelled data sets: seven tasks, frozen or fine-tuned, beside baselines",
    ),
    "export": ("pipeline.commands.export", "one safetensors file with all experts, loadable without DeepSpeed"),
    "embed": ("pipeline.commands.embed", "features of one multi-modal site"),
    "compare": ("pipeline.commands.compare", "runs side by side, and what makes them incomparable"),
    "tour": ("pipeline.commands.tour", "one page: data, curves, features, probes, comparison"),
    "ablate": ("pipeline.commands.ablate", "settings times seeds, compared: better, worse or not decided"),
    "schema": ("pipeline.commands.schema", "JSON schema of a config, for editors"),
    "text-embeddings": ("pipeline.commands.text_embeddings", "vectors of class names, for image-text alignment"),
    "sync": ("pipeline.commands.sync", "bring MLflow level with a run directory"),
    "layout": ("pipeline.commands.layout", "engines of chosen ranks of a large world, built here, against the plan"),
    "bench": (
        "pipeline.commands.bench",
        "loader, step, moe, checkpoint, tracking, gpu: figures beside the alternatives",
    ),
}

if __name__ == "__main__":
    # `deepspeed --module pipeline train …` puts this before the command; the environment says the same
    sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    dispatch("pipeline", __doc__ or "", COMMANDS)
