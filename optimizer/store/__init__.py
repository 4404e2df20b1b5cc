"""Saving and loading: one file, data only, checked before anything is made of it.

    store.save("model.gw", Archive([Variant(program, plan, example)], meta))
    archive = store.load("model.gw")

The file is a safetensors file (any reader of that format lists its tensors). Its metadata hold one entry,
``graphwright``: the schema version, a sha256 and the JSON of the graphs; the JSON holds a sha256 of each run of tensor
data. No pickle, no imports or evaluation by the file's word.
"""

from graphwright.store.archive import SCHEMA, Archive, Variant, load, peek, save

__all__ = ["SCHEMA", "Archive", "Variant", "load", "peek", "save"]
