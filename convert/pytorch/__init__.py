"""The model with its splats in PyTorch: two files that an export copies beside the weights.

`transformers` runs them from there, without this package, so they import nothing of it; each other, relatively. They
compute the definition as it stands in docs/attention.md, in quadratic time, and are the second oracle of the tests.

May be changed here: which files these are.
"""

CODE_FILES = ("configuration_gsa.py", "modeling_gsa.py")

AUTO_MAP = {
    "AutoConfig": "configuration_gsa.GSAConfig",
    "AutoModel": "modeling_gsa.GSAModel",
    "AutoModelForCausalLM": "modeling_gsa.GSAForCausalLM",
}
"""For a `config.json`: which class of these files `transformers` takes for what."""
