"""The recipes of BENCHMARKS.md as a PyTorch user writes them, for comparison with `hone train`.

usage: finetune_torch.py WEIGHTS.safetensors DATA --train head|layer4|all [--augment none|standard] [--lr-backbone 1e-4]
                         [--epochs 6] [--size 128] [--seeds 0,1,2]

Batch norm as in hone: trained layers use batch statistics, frozen ones the stored. Prints the best validation accuracy of
each seed, the mean, and the wall time of a seed.
"""
import argparse, time
import torch, torchvision
from safetensors.torch import load_file
from torch import nn
from torchvision import datasets, transforms as T

ap = argparse.ArgumentParser()
ap.add_argument("weights"); ap.add_argument("data"); ap.add_argument("--train", default="head")
ap.add_argument("--augment", default="none"); ap.add_argument("--lr", type=float, default=1e-3)
ap.add_argument("--lr-backbone", type=float, default=1e-4); ap.add_argument("--epochs", type=int, default=6)
ap.add_argument("--size", type=int, default=128); ap.add_argument("--seeds", default="0,1,2")
a = ap.parse_args()
state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(a.weights).items()}
norm = T.Compose([T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
plain = T.Compose([T.Resize(round(a.size * 256 / 224)), T.CenterCrop(a.size), norm])
random = T.Compose([T.RandomResizedCrop(a.size), T.RandomHorizontalFlip(), norm])
tr = datasets.ImageFolder(f"{a.data}/train", random if a.augment == "standard" else plain)
va = datasets.ImageFolder(f"{a.data}/val", plain)
order = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
trained = order[{"head": 6, "layer4": 5, "all": 0}[a.train]:]
best_of = []
for seed in map(int, a.seeds.split(",")):
    start = time.time(); torch.manual_seed(seed)
    m = torchvision.models.resnet18(num_classes=state["fc.weight"].shape[0]); m.load_state_dict(state)
    m.fc = nn.Linear(512, len(tr.classes)); m = m.to(memory_format=torch.channels_last)
    for p in m.parameters(): p.requires_grad = False
    body = [p for name in trained if name != "fc" for p in getattr(m, name).parameters()]
    groups = [{"params": list(m.fc.parameters()), "lr": a.lr}] + ([{"params": body, "lr": a.lr_backbone}] if body else [])
    for g in groups:
        for p in g["params"]: p.requires_grad = True
    opt, crit, best = torch.optim.Adam(groups), nn.CrossEntropyLoss(), 0.0
    dl = lambda d, s: torch.utils.data.DataLoader(d, batch_size=32, shuffle=s, num_workers=2, persistent_workers=True)
    trl, val = dl(tr, True), dl(va, False)
    for _ in range(a.epochs):
        m.train()
        for name in order:
            if name not in trained: getattr(m, name).eval()
        for x, y in trl:
            loss = crit(m(x.contiguous(memory_format=torch.channels_last)), y); opt.zero_grad(); loss.backward(); opt.step()
        m.eval(); hits = 0
        with torch.no_grad():
            for x, y in val: hits += (m(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum().item()
        best = max(best, hits / len(va))
    best_of.append(best); print(f"seed {seed}: best val accuracy {best:.4f}, {time.time() - start:.1f} s", flush=True)
print(f"mean {sum(best_of) / len(best_of):.4f}")
