"""Conversion between PyTorch folders of GPT-Neo or GPT-2 and checkpoint folders; installed as `gsa_jax.convert`.

hub.py          where a folder comes from       folder.py       which files of it are read
reader.py       formats of weight files         torch_files.py  that of PyTorch, with unpickler.py
names.py        which tensor is which parameter, and donors.py how each model stores them
importer.py     PyTorch -> checkpoint           exporter.py     checkpoint -> Hugging Face folder
verify.py       both models, side by side       splat_folder.py trained splats without their model
pytorch/        the model with splats in PyTorch, copied into exports

May be changed here: this map, and which names are public.
"""

from gsa_jax.convert.exporter import ExportReport, export
from gsa_jax.convert.importer import ConversionReport, convert

__all__ = ["ConversionReport", "ExportReport", "convert", "export"]
