"""Settings: the YAML file and `--key=value` arguments come in, a checked `TrainConfig` goes out.

`schema` turns dataclasses into typed configurations and knows nothing of training; `config` holds the dataclasses of a
run. The ready-made YAML files are in training/configs. Nothing else of `training` is imported here.
"""
