"""A model saved by hone, loaded by PyTorch: run by hand, with torch, torchvision and safetensors installed.

usage: load_in_torch.py HONE_BINARY MODEL.safetensors

Loads MODEL with strict=True, sends random images through both programs and compares the logits.
"""
import json, os, subprocess, sys, tempfile
import torch, torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

hone, path = sys.argv[1], sys.argv[2]
state = load_file(path)
with safe_open(path, "pt") as f:
    metadata = f.metadata()
classes = json.loads(metadata["classes"])
model = torchvision.models.resnet18(num_classes=len(classes)).eval()
print(model.load_state_dict(state, strict=True), "classes", classes, "image size", metadata["image_size"])
x = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
with tempfile.TemporaryDirectory() as folder:
    source, target = os.path.join(folder, "x.safetensors"), os.path.join(folder, "y.safetensors")
    save_file({"input": x}, source)
    subprocess.run([hone, "features", path, source, "--out", target, "--json"], check=True)
    got = load_file(target)["logits"]
with torch.no_grad():
    want = model(x)
error = ((got - want).norm() / want.norm()).item()
print(f"relative L2 error of the logits: {error:.2e}")
sys.exit(0 if error <= 1e-4 else 1)
