"""Measure the files of a pruned ResNet-50.

    python benchmarks/file_sizes.py              # three minutes on two cores
    python benchmarks/file_sizes.py docs/file-sizes-table.md

A ResNet-50 of 1000 classes is pruned in ten steps on scikit-learn's digits. Sizes are
in units of 10^6 bytes. The columns:

dense     The state dict of the dense model, by ``torch.save``.
masked    The state dict of the model with masks, by ``torch.save``.
sparse    ``save_sparse``.
compact   ``save_sparse`` of the compacted model.
"""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path

import torch
from harness.options import add_threads, parser_of, use_threads
from harness.tables import markdown, percent
from torch import nn

from force_plugin import compact, force_prune, save_sparse
from force_plugin.files import write_whole
from force_plugin.zoo import load_data, load_dataset, load_model

TITLES = ("sparsity", "dense", "masked", "sparse", "compact")


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


def sparse(model: nn.Module) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_sparse(model, path)
        return path.read_bytes()


def row(sparsity: float, method: str) -> list[str]:
    """Return the sizes of all files, as text."""
    torch.manual_seed(0)
    model = load_model("resnet50", num_classes=1000)
    dense = saved(model)
    loader = load_data(model, load_dataset(), batch_size=128)
    force_prune(model, loader, sparsity, method=method, steps=10, on_collapse="warn")
    small = compact(model, torch.randn(2, 3, 64, 64), progress=False)
    files = dense, saved(model), sparse(model), sparse(small)
    return [percent(sparsity), *(f"{len(file) / 1e6:.2f}" for file in files)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("table", type=Path, nargs="?", help="Markdown file to write")
    parser.add_argument(
        "--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.99, 0.995]
    )
    parser.add_argument("--method", default="force")
    add_threads(parser)
    args = parser.parse_args()
    use_threads(args)
    warnings.simplefilter("ignore")
    rows = [row(sparsity, args.method) for sparsity in args.sparsities]
    text = "\n".join(markdown(TITLES, rows))
    print(text)
    if args.table:
        write_whole(args.table, f"{text}\n".encode())


if __name__ == "__main__":
    main()
