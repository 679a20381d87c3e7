"""Our bottleneck adapters against the `adapters` library's on its own transformers: same weights, same inputs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.environments import environment
from tests.tiny import make_tiny_base
from tests.workers.methods.trying import attach, disturb, random_rows

# The library's own defaults but for the size, so that ours are compared as well.
CASES = {
    "houlsby": ("DoubleSeqBnConfig", {"non_linearity": "silu"}),  # the library's default here, by its other name, swish
    "pfeiffer": ("SeqBnConfig", {}),
    "parallel": ("ParBnConfig", {}),
}
FACTOR = 4


@pytest.mark.slow
@pytest.mark.parametrize("placement", CASES)
def test_logits_and_gradients_are_those_of_the_adapters_library(placement: str, tmp_path: Path) -> None:
    torch_version = torch.__version__.split("+")[0]
    python = environment("adapters", [f"torch=={torch_version}", "adapters==1.3.0", "transformers~=4.57.6"])
    config, settings = CASES[placement]
    base = make_tiny_base(tmp_path / "base", "llama")
    adapted = attach(
        "bottleneck", base, "float32", {"placement": placement, "reduction_factor": FACTOR, **settings}
    ).eval()
    disturb(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    ids = random_rows(40, 40)
    request = {
        "base": str(base),
        "adapter": str(tmp_path / "adapter" / "adapter_model.safetensors"),
        "config": config,
        "arguments": {"reduction_factor": FACTOR},
        "ids": ids,
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("bottleneck_in_adapters.py")
    done = subprocess.run(
        [python, "-I", script, tmp_path / "request.json", tmp_path / "answer.safetensors"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "answer.safetensors")

    ids_BT = torch.tensor(ids)
    logits_BTV = adapted(input_ids=ids_BT, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    loss.backward()
    ours = {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad(), adapted.disable_adapter():
        without = adapted(input_ids=ids_BT, use_cache=False).logits
    assert (without - logits_BTV).abs().max() > 0.1, "the adapter must matter for the comparison to say anything"

    assert theirs.keys() == ours.keys() | {"logits", "loss"}
    differences = {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}
    print(
        f"{placement}: logits {(logits_BTV - theirs['logits']).abs().max():.2g} of {logits_BTV.abs().max():.3g}, "
        f"loss {(loss - theirs['loss']).abs().max():.2g} of {loss:.4g}, "
        f"gradients {max(differences.values()):.2g} of {max(one.abs().max() for one in ours.values()):.3g}"
    )
    torch.testing.assert_close(logits_BTV, theirs["logits"], rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(theirs["loss"].item(), abs=1e-5)
    for name, gradient in ours.items():
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-5, atol=1e-5)
