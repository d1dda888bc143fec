"""The sets of scene types there are, and drawing a site of one of them."""

from __future__ import annotations

import numpy as np

from data_prep.simulate.arrangements import HARD, draw_hard
from data_prep.simulate.landcover import SCENES, Ground, draw_ground

SCENE_TYPES: dict[str, tuple[str, ...]] = {"basic": tuple(SCENES), "hard": tuple(HARD)}


def draw_scene(scene_types: str, scene: int, side_m: int, rng: np.random.Generator) -> Ground:
    """One site of type number `scene` of a set."""
    name = SCENE_TYPES[scene_types][scene]
    return draw_ground(name, side_m, rng) if scene_types == "basic" else draw_hard(name, side_m, rng)
