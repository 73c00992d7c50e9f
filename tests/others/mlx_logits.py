"""Run by a python that has mlx-lm: FOLDER IDS OUT. Logits [L,V] fp32 of a row of ids, in fp32."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

folder, ids, out = sys.argv[1:]
mx.set_default_device(mx.cpu)
model, _ = load_model(Path(folder), lazy=True)
model.set_dtype(mx.float32)
np.save(out, np.array(model(mx.array(np.load(ids)[None]))[0]))
