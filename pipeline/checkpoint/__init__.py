"""Checkpoints in a layout-independent form: pieces of logical parameters, committed whole or not at all.

```
checkpoints/step-00000100/rank-00000.TOKEN.safetensors   pieces rank 0 answered for: student/NAME@START, exp_avg/…, exp_avg_sq/…,
                          rank-00001.TOKEN.safetensors   teacher/… (1-D fp32; START counts in the flattened logical parameter)
                          manifest.json                  everything else, and the sha256 of every file; written last
checkpoints/LATEST                                       name of the newest; moved after the manifest stands
```

The manifest is the commit, on every storage: a folder without one, or whose files do not match it, is no checkpoint. TOKEN is of the
start that wrote the file, so a step that is written again lies beside what it replaces until its own manifest stands. The
manifest is written under the run's lease (`cluster.lease`): a start that has been overtaken cannot bring a commit to its end.
Stock `safetensors` reads the tensor files.
"""

from pipeline.checkpoint.load import consolidated, restore
from pipeline.checkpoint.save import Saver
from pipeline.checkpoint.store import Checkpoint, committed, open_checkpoint

__all__ = ["Checkpoint", "Saver", "committed", "consolidated", "open_checkpoint", "restore"]
