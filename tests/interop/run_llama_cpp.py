"""What llama.cpp computes: run by an interpreter with llama-cpp-python, which needs nothing of ours. See test_llama_cpp.py.

Reads jobs from a JSON file, {name: {base, adapter, ids}}, and writes the logits of each row of ids to an npz file.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def logits(model, adapter, ids):
    """(tokens, vocab) of one row."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_threads = params.n_threads_batch = 1
    # its own default is float16, and flash attention rounds to it
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, "no context"
    # an activated adapter starts where its tokens occur last; the tokens before are the base's
    start = invocation(adapter, ids) if adapter else len(ids)
    found = [decoded(context, model, ids, 0, start)] if start else []
    if start < len(ids):
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(1.0)
        assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales) == 0
        found.append(decoded(context, model, ids, start, len(ids)))
    llama_cpp.llama_free(context)
    return np.concatenate(found)


def invocation(adapter, ids):
    """The first position that the adapter acts at."""
    n = llama_cpp.llama_adapter_get_alora_n_invocation_tokens(adapter)
    if not n:
        return 0
    tokens = llama_cpp.llama_adapter_get_alora_invocation_tokens(adapter)[:n]
    return max((i for i in range(len(ids)) if ids[i : i + n] == list(tokens)), default=len(ids))


def decoded(context, model, ids, start, end):
    batch = llama_cpp.llama_batch_init(end - start, 0, 1)
    batch.n_tokens = end - start
    for i, token in enumerate(ids[start:end]):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    n = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [llama_cpp.llama_get_logits_ith(context, i) for i in range(end - start)]
    found = np.stack([np.ctypeslib.as_array(row, (n,)) for row in rows])  # its memory: a copy
    llama_cpp.llama_batch_free(batch)
    return found


def main(jobs, out):
    llama_cpp.llama_backend_init()
    found = {"version": np.array(llama_cpp.__version__)}
    for name, job in json.loads(Path(jobs).read_text()).items():
        params = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(job["base"].encode(), params)
        assert model, f"{name}: the base does not load"
        adapter = None
        if job["adapter"]:
            adapter = llama_cpp.llama_adapter_lora_init(model, job["adapter"].encode())
            assert adapter, f"{name}: the adapter does not load"
        found[name] = np.stack([logits(model, adapter, row) for row in job["ids"]])
        llama_cpp.llama_model_free(model)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
