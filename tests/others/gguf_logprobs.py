"""Run by a python that has xllamacpp (llama.cpp): FILE IDS OUT.

Log probabilities [V] fp64 of the token after a row of ids, in fp32 with an fp32 cache.
"""

import math
import sys

import numpy as np
import xllamacpp

file, ids, out = sys.argv[1:]
VOCAB = 2048  # of all models that come here
params = xllamacpp.CommonParams()
params.model.path = file
params.n_ctx, params.n_parallel, params.n_predict = 256, 1, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.fit_params = params.warmup = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
asked = {"prompt": np.load(ids).tolist(), "n_predict": 1, "n_probs": VOCAB, "temperature": 0.0}
answer = xllamacpp.Server(params).handle_completions(asked)
(first,) = answer["choices"][0]["logprobs"]["content"]
found = {one["id"]: one["logprob"] for one in first["top_logprobs"]}
np.save(out, np.array([found.get(token, math.nan) for token in range(VOCAB)]))
