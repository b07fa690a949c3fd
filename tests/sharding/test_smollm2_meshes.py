"""SmolLM2-135M (9 heads, 3 KV heads, 30 layers) on meshes has the greedy outputs of transformers in float32."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize(
    "axes", ["tensor=3", "sequence=2", "tensor=3,sequence=2", "pipeline=2", "pipeline=4", "tensor=3,pipeline=2"]
)
def test_greedy_outputs(smollm2_path: Path, axes: str):
    script = Path(__file__).parent / "smollm2_on_meshes.py"
    done = subprocess.run([sys.executable, str(script), axes], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "partitioned over" in done.stdout
    if axes == "pipeline=4":
        assert "4 stages of 8, 8, 7, 7 layers" in done.stdout
