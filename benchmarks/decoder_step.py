"""One guided denoising step of the decoder, ours beside the released code's, with the same weights: a quick look.

    python -m benchmarks.decoder_step --reference ../TransDiff --rounds 5 --output step

times what `benchmarks.sampling` times a hundred times a call, without encoder, sampler and checkpoint: minutes become
seconds. Ours gets the condition as the pipeline hands it over, its keys and values computed once.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from transdiff_pipelines import TransDiffTransformer2DModel
from transdiff_pipelines.files import home_path
from transdiff_pipelines.latents import pack_latents
from transdiff_pipelines.loaders.original_checkpoint import DECODER, key_table
from transdiff_pipelines.presets import PublishedModel, published_model

from .common.machine import CallClock, describe
from .common.operations import count_flops
from .common.reference import TorchWith, import_released
from .common.report import command_line, write_json


def released_decoder(checkout: Path, model: PublishedModel) -> torch.nn.Module:
    """The released denoising network of a published size in float32, its last linear not zero."""
    modules = import_released(checkout)
    vars(modules["diffdecoder"])["torch"] = TorchWith(bfloat16=torch.float32)
    size, block = model.size, modules["crossattention"].CrossAttentionBlock
    norm = lambda dim: torch.nn.LayerNorm(dim, eps=1e-6)  # noqa: E731
    blocks = [
        block(dim=size.width, cross_attention_dim=size.width, num_heads=size.num_attention_heads, norm_layer=norm)
        for _ in range(size.decoder_layers)
    ]
    network = modules["diffdecoder"].DiffusionDeocder(
        in_channels=16,
        model_channels=size.width,
        out_channels=16,
        z_channels=size.width,
        blocks=torch.nn.ModuleList(blocks),
        diff_seqlen=model.latent_size**2,
    )
    torch.nn.init.normal_(network.final_layer.linear.weight, std=0.02)
    return network.eval()


def our_decoder(network: torch.nn.Module, model: PublishedModel) -> TransDiffTransformer2DModel:
    """Our decoder with the weights of the released network, by the converter's table."""
    weights = {f"diffdecoder.net.{name}": tensor for name, tensor in network.state_dict().items()}
    rows = [row for row in key_table(0, model.size.decoder_layers) if row.sources[0] in weights]
    converted = {name.removeprefix(DECODER): tensor for row in rows for name, tensor in row.convert(weights).items()}
    with torch.device("meta"):
        decoder = TransDiffTransformer2DModel(**model.transformer_config())
    decoder.load_state_dict({name: tensor.clone() for name, tensor in converted.items()}, assign=True)
    return decoder.eval()


@torch.no_grad()
def measure(
    network: torch.nn.Module, decoder: TransDiffTransformer2DModel, condition_tokens: int, rounds: int
) -> dict[str, Any]:
    """Seconds of each round, ours and theirs, in turns, the relative error of the velocity, and the counts' limit."""
    config = decoder.config
    x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size)
    condition, timestep = torch.randn(2, condition_tokens, config.cross_attention_dim), torch.tensor([500.0])
    projected, tokens = decoder.project_condition(condition), pack_latents(x, 1)
    peers: dict[str, tuple[torch.nn.Module, Callable[[], torch.Tensor]]] = {
        "ours": (decoder, lambda: decoder(x, timestep, projected).sample),
        "released": (network, lambda: network(tokens, condition, timestep.expand(2))),
    }
    velocity, expected = pack_latents(peers["ours"][1](), 1), peers["released"][1]()
    operations = {name: count_flops(call).get_total_flops() for name, (_, call) in peers.items()}
    result: dict[str, Any] = {
        "condition_tokens": condition_tokens,
        "limit_by_operations": operations["released"] / operations["ours"],
        "relative_error": ((velocity - expected).abs().max() / expected.abs().max()).item(),
        **{name: {"seconds": [], "cpu_seconds": []} for name in peers},
    }
    for number in range(rounds):
        for name in sorted(peers, reverse=number % 2 == 1):
            module, call = peers[name]
            clock = CallClock(torch.device("cpu"), module)
            clock.time(call)
            result[name]["seconds"].append(clock.total)
            result[name]["cpu_seconds"].append(clock.cpu)
    for measure in ("seconds", "cpu_seconds"):
        pairs = zip(result["released"][measure], result["ours"][measure], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        result[f"ratio_{measure}"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="transdiff_b", help="published model whose decoder to take")
    parser.add_argument("--reference", type=home_path, required=True, help="checkout of the released code")
    tokens_help = "fewer than 256 for the first images of MRAR: 64, 128, 192"
    parser.add_argument("--condition-tokens", type=int, nargs="+", default=[256], help=tokens_help)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=home_path, required=True, help="the result goes to OUTPUT.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = published_model(options.model)
    network = released_decoder(options.reference, model)
    decoder = our_decoder(network, model)
    result = {
        "command": command_line("benchmarks.decoder_step"),
        "machine": describe(torch.device("cpu")),
        "steps": [measure(network, decoder, tokens, options.rounds) for tokens in options.condition_tokens],
    }
    write_json(options.output.with_suffix(".json"), result)
    print(result)


if __name__ == "__main__":
    main()
