"""Tensors to loss: the backbone, mixture of experts, fusion, objectives. Of data_prep it sees only the sample schema."""
