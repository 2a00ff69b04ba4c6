"""Settings: the YAML file and `--key=value` arguments come in, a checked `TrainConfig` goes out.

`values` reads a value as the type of its field wants it, `schema` turns dataclasses into typed configurations, and
both know nothing of training; `config` holds the dataclasses of a run. The ready-made YAML files are in
training/configs. Nothing else of `training` is imported here.
"""
