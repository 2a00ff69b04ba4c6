"""Messages of libraries below this one that say nothing a reader could act on, left out by their exact words.

Importing this module, before diffusers, puts a filter on each logger that writes such a message. Whatever else these
loggers say still appears. A message goes from the table when upstream stops writing it.
"""

import logging
import re
import warnings


MESSAGES = {
    # diffusers imports torchao wherever it is installed. The shared objects of torchao's wheels hold CUDA kernels
    # alone (cutlass for sm_90a, mxfp8): they cannot load beside a torch for CPUs, or for another CUDA or an older
    # torch than they were built for. Quantisation to int8, the one used here, is in Python and does without them.
    "torchao": r"Failed to load \S+torchao\S+_C\w*\.\S+so: Could not load this library: "
    r"|Skipping import of cpp extensions due to incompatible torch version",
    # torchao registers its enumerations with torch's pytree, which torch 2.13 does by itself.
    "torch.utils._pytree": r"<enum '(KernelPreference|ScaleCalculationMode)'> is an Enum subclass ",
    # diffusers looks for tensor classes that torchao 0.17 removed. It would need them to unpickle weights quantised
    # by an older torchao, and no weights are unpickled here.
    "diffusers.quantizers.torchao.torchao_quantizer": r"Unable to import `torchao` Tensor objects\. ",
    # diffusers 0.42 says this of every model that is cast, also where the list of such modules is empty.
    "diffusers.models.modeling_utils": r"There are modules in \w+ that should be kept in float32: \[\]\. ",
    # It holds for versions of torch older than those supported here. How slow float16 is, `half_precision` measures.
    "diffusers.pipelines.pipeline_utils": r"Pipelines loaded with `(torch_)?dtype=torch\.float16` cannot run with "
    r"`cpu` device\. ",
}


WARNINGS = {
    # diffusers 0.42 passes it on at every download, whatever its caller said.
    r"huggingface_hub\.utils\._validators": r"The `local_dir_use_symlinks` argument is deprecated and ignored in ",
}


class _LeaveOut(logging.Filter):
    """Drop the records whose message begins as `pattern` says."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.match(record.getMessage())


for _name, _pattern in MESSAGES.items():
    logging.getLogger(_name).addFilter(_LeaveOut(_pattern))

for _module, _pattern in WARNINGS.items():
    warnings.filterwarnings("ignore", message=_pattern, category=UserWarning, module=_module)
