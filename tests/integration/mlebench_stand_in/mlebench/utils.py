import importlib

import pandas as pd


def read_csv(path, **options):
    return pd.read_csv(path, **options)


def load_answers(path):
    return pd.read_csv(path)


def import_fn(name):
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
