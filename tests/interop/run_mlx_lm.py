"""What mlx-lm computes: run by its own interpreter, which needs nothing of ours. See test_mlx_lm.py.

Reads jobs from a JSON file, {name: {base, adapter, ids, save}}, and writes their logits to an npz file. save: the
adapter is not read but made, as mlx-lm's training makes and saves one.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config


def trained(model, folder, said):
    """The model with adapters that are not zero, which are saved as mlx_lm.lora saves them."""
    model.freeze()
    use_dora = said["fine_tune_type"] == "dora"
    linear_to_lora_layers(model, said["num_layers"], said["lora_parameters"], use_dora=use_dora)
    mx.random.seed(1)
    new = tree_map(lambda p: p + mx.random.normal(p.shape) * 0.3, model.trainable_parameters())
    model.update(new)
    folder = Path(folder)
    folder.mkdir()
    save_config(said, folder / "adapter_config.json")
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(new)))
    return model


def main(jobs, out):
    found = {"version": np.array(mlx_lm.__version__)}
    mx.set_default_device(mx.cpu)
    for name, job in json.loads(Path(jobs).read_text()).items():
        model, _ = load_model(Path(job["base"]))
        if job.get("save"):
            model = trained(model, job["adapter"], job["save"])
        elif job["adapter"]:
            model = load_adapters(model, job["adapter"])
        model.eval()
        found[name] = np.array(model(mx.array(job["ids"])).astype(mx.float32))
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
