"""One file a family of published checkpoints; the listing of this folder is the registry.

A file defines

    MODEL_TYPES                 the `model_type`s of config.json that it serves
    config(fields, tensors)     the model: an `lm.Config`
    rules(config)               our weights <-> its tensors, see `rearrange`
    describe(config)            optional: the fields of config.json of a model that was not read
                                from one, and its config with every size written out; or None
    TIED                        optional: the names of embedding and head, if not the usual ones
    respelled(tensors)          optional: tensors by their published names, where transformers saves
                                them under others
    QUANTIZED                   optional: the `quant_method`s whose files it reads
    IGNORED                     optional: patterns of names of tensors that are not of the model
"""
